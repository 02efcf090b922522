//! Which replica gets a request: the one that has likely read the prompt's beginning before, as long as it has no more to do than
//! its share. Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016, <https://arxiv.org/abs/1608.01350>),
//! over rendezvous hashing, with tokens for balls.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::flow::ReplicaLoad;

/// No replica has more than this many times the mean when it is given one request more.
const BALANCE: f64 = 1.25;
/// Of what a replica decodes at a time: with no more to do its cache is worth more than another's leisure.
const FEW: u32 = 4;
/// After the first failure, and at most.
const BACK_OFF: Duration = Duration::from_millis(500);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(8);
/// Errors of its own, one after the other, after which a replica is taken for one that failed.
const ERRORS: u32 = 5;
/// Until the EndpointSlice says of a replica that drains what it said itself.
const DRAINING: Duration = Duration::from_secs(10);
/// What a replica said of its queue is believed for so long: those that waited when it said so may run since.
const WORD: Duration = Duration::from_secs(5);

/// The balance of every service, by its UID: no two services share a replica's state, whatever their addresses are.
#[derive(Debug, Default)]
pub struct Balances(Mutex<HashMap<String, Arc<Shared>>>);

/// A service's balance, which all of its requests share.
#[derive(Debug, Default)]
pub struct Shared(Mutex<Balance>);

impl Balances {
    /// That of this service.
    pub fn of(&self, uid: &str) -> Arc<Shared> {
        let mut all = self.lock();
        match all.get(uid) {
            Some(shared) => Arc::clone(shared),
            None => Arc::clone(all.entry(uid.to_owned()).or_default()),
        }
    }

    /// Forgets services and replicas that are gone and have nothing to do any more.
    pub fn keep(&self, known: &BTreeMap<String, BTreeSet<SocketAddr>>) {
        self.lock().retain(|uid, shared| match known.get(uid) {
            Some(replicas) => {
                shared.with(|balance| balance.keep(replicas));
                true
            }
            // Requests that are open hold it.
            None => Arc::strong_count(shared) > 1,
        });
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Shared>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody has anything to do.
    #[cfg(test)]
    pub fn are_idle(&self) -> bool {
        let idle = |balance: &mut Balance| balance.0.values().all(|state| state.requests == 0);
        self.lock().values().all(|shared| shared.with(idle))
    }
}

impl Shared {
    /// Changes it; every change is whole.
    pub fn with<T>(&self, change: impl FnOnce(&mut Balance) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What every replica of a service has to do, and which are better left alone.
#[derive(Debug, Default)]
pub struct Balance(HashMap<SocketAddr, Replica>);

#[derive(Clone, Copy, Debug, Default)]
struct Replica {
    /// Tokens that are asked of it.
    outstanding: u64,
    /// In so many requests.
    requests: u32,
    /// Failures since it last answered.
    failures: u32,
    /// Errors since it last answered without one.
    errors: u32,
    rest: Option<Rest>,
    word: Option<Word>,
}

/// What a replica said of its load.
#[derive(Clone, Copy, Debug)]
struct Word {
    at: Instant,
    running: u32,
    waiting: u32,
    /// Requests there that are not this gateway's.
    others: u32,
}

/// A time in which a replica is left alone.
#[derive(Clone, Copy, Debug)]
struct Rest {
    since: Instant,
    until: Instant,
    /// It shuts down.
    drains: bool,
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Of the model and the prompt's beginning.
    pub key: u64,
    /// That it will take.
    pub tokens: u64,
    /// Requests that a replica decodes at a time.
    pub slots: u32,
}

impl Balance {
    /// Chooses among `ready` the replica for a request and charges it with that.
    ///
    /// One that drains gets nothing; one that just failed gets nothing while there is another. `None`: nobody is left.
    pub fn choose(&mut self, ready: &[SocketAddr], ask: Ask, now: Instant) -> Option<SocketAddr> {
        let states: Vec<_> = ready.iter().map(|a| (*a, self.state(a))).collect();
        let open = || states.iter().filter(|(_, state)| !state.rests(now));
        let chosen = match open().count() {
            // A try is better than a refusal: the one whose rest ends first.
            0 => {
                let failed = states.iter().filter_map(|(a, state)| Some((a, state.rest?)));
                let (chosen, _) =
                    failed.filter(|(_, rest)| !rest.drains).min_by_key(|(_, rest)| rest.until)?;
                *chosen
            }
            // Somebody has no more than the mean, so somebody is always below the bound.
            count => {
                let total: u64 = open().map(|(_, state)| state.outstanding).sum();
                let bound = BALANCE * (total + ask.tokens.max(1)) as f64 / count as f64;
                let few = (ask.slots / FEW).max(1);
                let within = open().filter(|(_, s)| s.requests < few || (s.outstanding as f64) < bound);
                within.max_by_key(|(a, _)| weight(ask.key, a))?.0
            }
        };
        self.charge(chosen, ask.tokens);
        Some(chosen)
    }

    /// Whether anybody of `replicas` is not left alone.
    pub fn has_open(&self, replicas: &[SocketAddr], now: Instant) -> bool {
        replicas.iter().any(|replica| !self.state(replica).rests(now))
    }

    /// Chooses among `ready` a replica with less to do than `full`, which had no room, and charges it with `tokens`.
    pub fn roomier(
        &mut self,
        ready: &[SocketAddr],
        full: SocketAddr,
        tokens: u64,
        now: Instant,
    ) -> Option<SocketAddr> {
        let limit = self.state(&full).outstanding;
        let states = ready.iter().filter(|a| **a != full).map(|a| (*a, self.state(a)));
        let open = states.filter(|(_, state)| !state.rests(now) && state.outstanding < limit);
        let (chosen, _) = open.min_by_key(|(_, state)| state.outstanding)?;
        self.charge(chosen, tokens);
        Some(chosen)
    }

    /// Takes back what a request was charged with, once it is over.
    pub fn release(&mut self, replica: SocketAddr, tokens: u64) {
        if let Some(state) = self.0.get_mut(&replica) {
            state.outstanding = state.outstanding.saturating_sub(tokens);
            state.requests = state.requests.saturating_sub(1);
        }
    }

    /// It answered a request that was sent at `sent`. That says nothing of what happened since: a rest that began later stays, and
    /// that of one that drains ends by time alone.
    pub fn answered(&mut self, replica: SocketAddr, sent: Instant) {
        let Some(state) = self.0.get_mut(&replica) else { return };
        state.errors = 0;
        if state.rest.is_none_or(|rest| if rest.drains { sent >= rest.until } else { sent >= rest.since }) {
            (state.failures, state.rest) = (0, None);
        }
    }

    /// Its connection failed, or it never answered: it rests, twice as long each time. While it rests already that is no news: all
    /// the requests that it had fail at once.
    pub fn failed(&mut self, replica: SocketAddr, now: Instant) {
        let state = self.0.entry(replica).or_default();
        if state.rests(now) {
            return;
        }
        let rest = BACK_OFF.saturating_mul(1 << state.failures.min(8)).min(LONGEST_BACK_OFF);
        state.failures = state.failures.saturating_add(1);
        state.rest = Some(Rest { since: now, until: now + rest, drains: false });
    }

    /// It answered with an error of its own. One that does so again and again is fast, so it would get ever more.
    pub fn erred(&mut self, replica: SocketAddr, now: Instant) {
        let state = self.0.entry(replica).or_default();
        state.errors = state.errors.saturating_add(1);
        if state.errors >= ERRORS {
            self.failed(replica, now);
        }
    }

    /// It said that it shuts down.
    pub fn drains(&mut self, replica: SocketAddr, now: Instant) {
        let state = self.0.entry(replica).or_default();
        state.rest = Some(Rest { since: now, until: now + DRAINING, drains: true });
    }

    /// What it said of itself with an answer.
    pub fn told(&mut self, replica: SocketAddr, load: &ReplicaLoad, at: Instant) {
        let Some(state) = self.0.get_mut(&replica) else { return };
        let ReplicaLoad { running, waiting, capacity: _ } = *load;
        let others = running.saturating_add(waiting).saturating_sub(state.requests);
        state.word = Some(Word { at, running, waiting, others });
    }

    /// How many of this gateway's requests are worked on, and how many wait at a replica, whose pods decode so many at a time.
    pub fn in_flight(&self, slots: u32, now: Instant) -> (f64, f64) {
        let each = self.0.values().map(|state| (f64::from(state.requests), state.waiting(slots, now)));
        each.fold((0.0, 0.0), |(running, waiting), (all, waits)| (running + all - waits, waiting + waits))
    }

    fn keep(&mut self, known: &BTreeSet<SocketAddr>) {
        self.0.retain(|address, state| known.contains(address) || state.requests > 0);
    }

    fn charge(&mut self, replica: SocketAddr, tokens: u64) {
        let state = self.0.entry(replica).or_default();
        state.outstanding = state.outstanding.saturating_add(tokens);
        state.requests = state.requests.saturating_add(1);
    }

    fn state(&self, replica: &SocketAddr) -> Replica {
        self.0.get(replica).copied().unwrap_or_default()
    }
}

impl Replica {
    fn rests(&self, now: Instant) -> bool {
        self.rest.is_some_and(|rest| now < rest.until)
    }

    /// Those of this gateway's requests that wait there: its share of all that are beyond what the replica decodes, so that the sum
    /// over the gateways counts none twice.
    fn waiting(&self, slots: u32, now: Instant) -> f64 {
        let word = self.word.filter(|word| now.saturating_duration_since(word.at) < WORD);
        // With a full cache fewer run than there are slots.
        let full = word.filter(|word| word.waiting > 0 && word.running > 0);
        let places = full.map_or(slots, |word| word.running.min(slots));
        let all = self.requests.saturating_add(word.map_or(0, |word| word.others));
        let share = f64::from(self.requests) / f64::from(all.max(1));
        f64::from(all.saturating_sub(places)) * share
    }
}

/// The hash of a request's model and the beginning of its prompt: FNV-1a, the same on every gateway.
pub fn key(service: &str, model: &str, beginning: &[u8]) -> u64 {
    let parts = [service.as_bytes(), b"/", model.as_bytes(), b"\0", beginning];
    hash(0xcbf2_9ce4_8422_2325, parts.into_iter().flatten())
}

/// A key that more belongs to.
pub fn with(key: u64, more: &[u8]) -> u64 {
    hash(key, [b"\0", more].into_iter().flatten())
}

fn weight(key: u64, replica: &SocketAddr) -> u64 {
    let of_ip = match replica.ip() {
        IpAddr::V4(ip) => hash(key, &ip.octets()),
        IpAddr::V6(ip) => hash(key, &ip.octets()),
    };
    mixed(hash(of_ip, &replica.port().to_be_bytes()))
}

/// FNV alone leaves neighbours in order; the end of splitmix64 mixes them.
pub fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn hash<'a>(start: u64, bytes: impl IntoIterator<Item = &'a u8>) -> u64 {
    bytes.into_iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas(count: u8) -> Vec<SocketAddr> {
        (1..=count).map(|at| SocketAddr::from(([10, 0, 0, at], 8080))).collect()
    }

    /// A request where a replica decodes one at a time.
    fn ask(key: u64, tokens: u64) -> Ask {
        Ask { key, tokens, slots: 1 }
    }

    #[test]
    fn a_prompts_beginning_finds_its_replica_again_and_others_spread() {
        let (ready, now) = (replicas(8), Instant::now());
        let mut balance = Balance::default();
        let mut counts = HashMap::new();
        for prompt in 0..8000u32 {
            let key = key("uid", "m", &prompt.to_be_bytes());
            let first = balance.choose(&ready, ask(key, 10), now).unwrap();
            balance.release(first, 10);
            let again = balance.choose(&ready, ask(key, 10), now).unwrap();
            balance.release(again, 10);
            assert_eq!(first, again);
            *counts.entry(first).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 8);
        // 1000 each, with a standard deviation of 30.
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_replica_more_moves_only_what_it_takes() {
        let (few, many, now) = (replicas(4), replicas(5), Instant::now());
        let mut moved = 0;
        for prompt in 0..5000u32 {
            let key = key("uid", "m", &prompt.to_be_bytes());
            let before = Balance::default().choose(&few, ask(key, 10), now).unwrap();
            let after = Balance::default().choose(&many, ask(key, 10), now).unwrap();
            assert!(before == after || after == many[4]);
            moved += u32::from(before != after);
        }
        assert!((850..1150).contains(&moved), "{moved}");
    }

    #[test]
    fn one_prompt_that_all_ask_is_spread_within_the_bound() {
        let (ready, now) = (replicas(5), Instant::now());
        let mut balance = Balance::default();
        let (mut total, mut largest) = (0, 0);
        for at in 0..500u64 {
            let tokens = 50 + at * 37 % 400;
            largest = largest.max(tokens);
            total += tokens;
            balance.choose(&ready, ask(7, tokens), now).unwrap();
            let most = ready.iter().map(|a| balance.state(a).outstanding).max().unwrap();
            let bound = BALANCE * total as f64 / 5.0 + largest as f64;
            assert!(most as f64 <= bound, "{most} is over {bound}");
        }
    }

    #[test]
    fn what_failed_rests_longer_each_time_while_another_is_there() {
        let (ready, mut now) = (replicas(2), Instant::now());
        let mut balance = Balance::default();
        let favourite = balance.choose(&ready, ask(7, 0), now).unwrap();
        for rest in [500, 1000, 2000, 4000, 8000, 8000].map(Duration::from_millis) {
            balance.failed(favourite, now);
            // Whatever else was open at it fails with it, and is no failure more.
            balance.failed(favourite, now);
            let last = now + rest - Duration::from_millis(1);
            assert_ne!(balance.choose(&ready, ask(7, 0), last), Some(favourite), "{rest:?}");
            // Alone, it is tried: better than a refusal.
            assert_eq!(balance.choose(&[favourite], ask(7, 0), last), Some(favourite));
            now += rest;
            assert_eq!(balance.choose(&ready, ask(7, 0), now), Some(favourite), "{rest:?}");
        }
        balance.answered(favourite, now);
        balance.failed(favourite, now);
        assert_eq!(balance.choose(&ready, ask(7, 0), now + BACK_OFF), Some(favourite));
    }

    #[test]
    fn an_answer_to_an_older_request_ends_no_rest() {
        let (ready, start) = (replicas(2), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        let mut balance = Balance::default();
        let favourite = balance.choose(&ready, ask(7, 0), start).unwrap();
        balance.failed(favourite, at(10));
        balance.answered(favourite, at(9));
        assert_ne!(balance.choose(&ready, ask(7, 0), at(11)), Some(favourite));
        // One that was sent since, where there was no other, does.
        balance.answered(favourite, at(12));
        assert_eq!(balance.choose(&ready, ask(7, 0), at(13)), Some(favourite));
    }

    #[test]
    fn what_drains_gets_nothing_even_where_it_is_alone_and_while_it_answers_the_rest() {
        let (ready, start) = (replicas(1), Instant::now());
        let mut balance = Balance::default();
        balance.drains(ready[0], start);
        assert_eq!(balance.choose(&ready, ask(7, 1), start), None);
        balance.answered(ready[0], start);
        balance.failed(ready[0], start);
        assert_eq!(balance.choose(&ready, ask(7, 1), start + DRAINING - Duration::from_millis(1)), None);
        assert_eq!(balance.choose(&ready, ask(7, 1), start + DRAINING), Some(ready[0]));
        balance.answered(ready[0], start + DRAINING);
        assert_eq!(balance.choose(&ready, ask(7, 1), start), Some(ready[0]));
    }

    #[test]
    fn one_that_errs_again_and_again_rests_as_if_it_had_failed() {
        let (ready, now) = (replicas(2), Instant::now());
        let mut balance = Balance::default();
        let favourite = balance.choose(&ready, ask(7, 0), now).unwrap();
        for _ in 1..ERRORS {
            balance.erred(favourite, now);
        }
        // An answer without one begins anew.
        balance.answered(favourite, now);
        for _ in 1..ERRORS {
            balance.erred(favourite, now);
        }
        assert_eq!(balance.choose(&ready, ask(7, 0), now), Some(favourite));
        balance.erred(favourite, now);
        assert_ne!(balance.choose(&ready, ask(7, 0), now), Some(favourite));
        // After its rest the first error is enough.
        let later = now + BACK_OFF;
        assert_eq!(balance.choose(&ready, ask(7, 0), later), Some(favourite));
        balance.erred(favourite, later);
        assert_ne!(balance.choose(&ready, ask(7, 0), later + BACK_OFF), Some(favourite));
    }

    /// One long request is not a load: those that follow its conversation find its cache.
    #[test]
    fn a_large_request_does_not_drive_small_ones_away_from_their_cache() {
        let (ready, now) = (replicas(2), Instant::now());
        let mut balance = Balance::default();
        let ask = |tokens| Ask { key: 7, tokens, slots: 16 };
        let favourite = balance.choose(&ready, ask(4000), now).unwrap();
        for _ in 1..16 / FEW {
            assert_eq!(balance.choose(&ready, ask(10), now), Some(favourite));
        }
        assert_ne!(balance.choose(&ready, ask(10), now), Some(favourite));
    }

    #[test]
    fn services_share_no_state_of_an_address() {
        let (ready, now) = (replicas(2), Instant::now());
        let balances = Balances::default();
        let [one, two] = ["one", "two"].map(|uid| balances.of(uid));
        let favourite = one.with(|b| b.choose(&ready, ask(7, 5), now)).unwrap();
        one.with(|b| b.failed(favourite, now));
        assert_eq!(two.with(|b| b.choose(&ready, ask(7, 5), now)), Some(favourite));
        drop(two);
        balances.keep(&BTreeMap::new());
        assert_eq!(balances.lock().keys().collect::<Vec<_>>(), ["one"]);
        assert!(!balances.are_idle());
        one.with(|b| b.release(favourite, 5));
        drop(one);
        balances.keep(&BTreeMap::new());
        assert!(balances.lock().is_empty());
    }

    #[test]
    fn after_a_refusal_only_one_with_less_to_do_is_asked() {
        let (ready, now) = (replicas(3), Instant::now());
        let mut balance = Balance::default();
        for (replica, tokens) in ready.iter().zip([100, 100, 40]) {
            balance.choose(&[*replica], ask(7, tokens), now).unwrap();
        }
        assert_eq!(balance.roomier(&ready, ready[0], 60, now), Some(ready[2]));
        assert_eq!(balance.roomier(&ready, ready[0], 60, now), None);
    }

    #[test]
    fn a_replica_that_is_gone_is_forgotten_once_it_has_nothing_to_do() {
        let (ready, now) = (replicas(1), Instant::now());
        let mut balance = Balance::default();
        balance.choose(&ready, ask(7, 5), now).unwrap();
        balance.keep(&BTreeSet::new());
        assert_eq!(balance.state(&ready[0]).outstanding, 5);
        balance.release(ready[0], 5);
        balance.keep(&BTreeSet::new());
        assert!(balance.0.is_empty());
    }

    #[test]
    fn what_waits_at_a_replica_is_shared_out_and_counted_once() {
        let (ready, now) = (replicas(1), Instant::now());
        let gateway = |requests: u32| {
            let mut balance = Balance::default();
            assert!((0..requests).all(|_| balance.choose(&ready, ask(1, 10), now).is_some()));
            balance
        };
        // Before the replica has said anything: what is beyond its slots.
        assert_eq!(gateway(10).in_flight(4, now), (4.0, 6.0));
        assert_eq!(gateway(3).in_flight(4, now), (3.0, 0.0));
        let told = |requests, running, waiting| {
            let mut balance = gateway(requests);
            balance.told(ready[0], &ReplicaLoad { running, waiting, capacity: None }, now);
            balance
        };
        // Two gateways' requests at one replica.
        assert_eq!(told(6, 4, 4).in_flight(4, now), (3.0, 3.0));
        assert_eq!(told(2, 4, 4).in_flight(4, now), (1.0, 1.0));
        // Whose cache is full decodes fewer than it has slots; that is believed for a while.
        let mut full = told(8, 2, 6);
        assert_eq!(full.in_flight(4, now), (2.0, 6.0));
        assert_eq!(full.in_flight(4, now + WORD), (4.0, 4.0));
        (0..6).for_each(|_| full.release(ready[0], 10));
        assert_eq!(full.in_flight(4, now), (2.0, 0.0));
        // One that has not begun yet says nothing of how many it decodes.
        assert_eq!(told(8, 0, 8).in_flight(16, now), (8.0, 0.0));
        // Nobody's numbers make more of ours wait than there are.
        let (running, waiting) = told(3, u32::MAX, u32::MAX).in_flight(1, now);
        assert!(running >= 0.0 && waiting <= 3.0 && running + waiting == 3.0, "{running} {waiting}");
    }
}
