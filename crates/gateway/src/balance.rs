//! Which replica gets a request: the one that has likely read the prompt's beginning before, as long as it has no more to do than
//! its share. Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016, <https://arxiv.org/abs/1608.01350>),
//! over rendezvous hashing, with tokens for balls.
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// No replica has more than this many times the mean when it is given one request more.
const BALANCE: f64 = 1.25;
/// After the first failure, and at most.
const BACK_OFF: Duration = Duration::from_millis(500);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(8);
/// Until the EndpointSlice says of a replica that drains what it said itself.
const DRAINING: Duration = Duration::from_secs(10);

/// What every replica has to do, and which are better left alone.
#[derive(Debug, Default)]
pub struct Balance(HashMap<SocketAddr, Replica>);

#[derive(Debug, Default)]
struct Replica {
    /// Tokens that are asked of it.
    outstanding: u64,
    /// Failures since it last answered.
    failures: u32,
    /// Not before then.
    after: Option<Instant>,
    /// It rests since it shuts down.
    drains: bool,
}

impl Balance {
    /// Chooses among `ready` the replica for a request of `key` (model and beginning of the prompt) and charges it with `tokens`.
    ///
    /// One that drains gets nothing; one that just failed gets nothing while there is another. `None`: nobody is left.
    pub fn choose(
        &mut self,
        ready: &[SocketAddr],
        key: u64,
        tokens: u64,
        now: Instant,
    ) -> Option<SocketAddr> {
        let open: Vec<SocketAddr> = ready.iter().filter(|a| !self.rests(a, now)).copied().collect();
        let chosen = match open.is_empty() {
            false => self.bounded(&open, key, tokens),
            // A try is better than a refusal: the one whose rest ends first.
            true => {
                let failed = ready.iter().filter(|a| !self.0.get(a).is_some_and(|r| r.drains));
                failed.min_by_key(|a| self.0.get(a).and_then(|r| r.after)).copied()
            }
        }?;
        self.charge(chosen, tokens);
        Some(chosen)
    }

    /// Chooses among `ready` a replica with less to do than `full`, which had no room, and charges it with `tokens`.
    pub fn roomier(
        &mut self,
        ready: &[SocketAddr],
        full: SocketAddr,
        tokens: u64,
        now: Instant,
    ) -> Option<SocketAddr> {
        let limit = self.outstanding(&full);
        let open = ready.iter().filter(|a| **a != full && !self.rests(a, now) && self.outstanding(a) < limit);
        let chosen = open.min_by_key(|a| self.outstanding(a)).copied()?;
        self.charge(chosen, tokens);
        Some(chosen)
    }

    /// Takes back what a request was charged with, once it is over.
    pub fn release(&mut self, replica: SocketAddr, tokens: u64) {
        if let Some(state) = self.0.get_mut(&replica) {
            state.outstanding = state.outstanding.saturating_sub(tokens);
        }
    }

    /// It answered.
    pub fn answered(&mut self, replica: SocketAddr) {
        if let Some(state) = self.0.get_mut(&replica) {
            (state.failures, state.after, state.drains) = (0, None, false);
        }
    }

    /// Its connection failed: it rests, twice as long each time.
    pub fn failed(&mut self, replica: SocketAddr, now: Instant) {
        let state = self.0.entry(replica).or_default();
        let rest = BACK_OFF.saturating_mul(1 << state.failures.min(8)).min(LONGEST_BACK_OFF);
        state.failures = state.failures.saturating_add(1);
        (state.after, state.drains) = (now.checked_add(rest), false);
    }

    /// It said that it shuts down.
    pub fn drains(&mut self, replica: SocketAddr, now: Instant) {
        let state = self.0.entry(replica).or_default();
        (state.after, state.drains) = (now.checked_add(DRAINING), true);
    }

    /// Forgets replicas that are gone and have nothing to do any more.
    pub fn keep(&mut self, known: &BTreeSet<SocketAddr>) {
        self.0.retain(|address, state| known.contains(address) || state.outstanding > 0);
    }

    /// Whether nobody has anything to do.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.0.values().all(|state| state.outstanding == 0)
    }

    /// Somebody has no more than the mean, so somebody is always below the bound.
    fn bounded(&self, open: &[SocketAddr], key: u64, tokens: u64) -> Option<SocketAddr> {
        let total: u64 = open.iter().map(|a| self.outstanding(a)).sum();
        let bound = BALANCE * (total + tokens.max(1)) as f64 / open.len() as f64;
        let within = open.iter().filter(|a| (self.outstanding(a) as f64) < bound);
        within.max_by_key(|a| weight(key, a)).copied()
    }

    fn rests(&self, replica: &SocketAddr, now: Instant) -> bool {
        self.0.get(replica).and_then(|state| state.after).is_some_and(|after| now < after)
    }

    fn charge(&mut self, replica: SocketAddr, tokens: u64) {
        let state = self.0.entry(replica).or_default();
        state.outstanding = state.outstanding.saturating_add(tokens);
    }

    fn outstanding(&self, replica: &SocketAddr) -> u64 {
        self.0.get(replica).map_or(0, |state| state.outstanding)
    }
}

/// The hash of a request's model and the beginning of its prompt: FNV-1a, the same on every gateway.
pub fn key(service: &str, model: &str, beginning: &[u8]) -> u64 {
    let parts = [service.as_bytes(), b"/", model.as_bytes(), b"\0", beginning];
    hash(0xcbf2_9ce4_8422_2325, parts.into_iter().flatten())
}

fn weight(key: u64, replica: &SocketAddr) -> u64 {
    let ip: Vec<u8> = match replica {
        SocketAddr::V4(v4) => v4.ip().octets().to_vec(),
        SocketAddr::V6(v6) => v6.ip().octets().to_vec(),
    };
    // FNV alone leaves neighbours in order; the end of splitmix64 mixes them.
    let mut z = hash(key, ip.iter().chain(&replica.port().to_be_bytes()));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn hash<'a>(start: u64, bytes: impl Iterator<Item = &'a u8>) -> u64 {
    bytes.fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas(count: u8) -> Vec<SocketAddr> {
        (1..=count).map(|at| SocketAddr::from(([10, 0, 0, at], 8080))).collect()
    }

    #[test]
    fn a_prompts_beginning_finds_its_replica_again_and_others_spread() {
        let (ready, now) = (replicas(8), Instant::now());
        let mut balance = Balance::default();
        let mut counts = HashMap::new();
        for prompt in 0..8000u32 {
            let key = key("uid", "m", &prompt.to_be_bytes());
            let first = balance.choose(&ready, key, 10, now).unwrap();
            balance.release(first, 10);
            let again = balance.choose(&ready, key, 10, now).unwrap();
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
            let before = Balance::default().choose(&few, key, 10, now).unwrap();
            let after = Balance::default().choose(&many, key, 10, now).unwrap();
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
            balance.choose(&ready, 7, tokens, now).unwrap();
            let most = ready.iter().map(|a| balance.outstanding(a)).max().unwrap();
            let bound = BALANCE * total as f64 / 5.0 + largest as f64;
            assert!(most as f64 <= bound, "{most} is over {bound}");
        }
    }

    #[test]
    fn what_failed_rests_longer_each_time_while_another_is_there() {
        let (ready, start) = (replicas(2), Instant::now());
        let mut balance = Balance::default();
        let favourite = balance.choose(&ready, 7, 0, start).unwrap();
        for (failures, rest) in [500, 1000, 2000, 4000, 8000, 8000].into_iter().enumerate() {
            balance.failed(favourite, start);
            let at = |millis| start + Duration::from_millis(millis);
            assert_ne!(balance.choose(&ready, 7, 0, at(rest - 1)), Some(favourite), "{failures}");
            assert_eq!(balance.choose(&ready, 7, 0, at(rest)), Some(favourite), "{failures}");
        }
        // Alone, it is tried: better than a refusal.
        assert_eq!(balance.choose(&[favourite], 7, 0, start), Some(favourite));
        balance.answered(favourite);
        assert_eq!(balance.choose(&ready, 7, 0, start), Some(favourite));
    }

    #[test]
    fn what_drains_gets_nothing_even_where_it_is_alone() {
        let (ready, start) = (replicas(1), Instant::now());
        let mut balance = Balance::default();
        balance.drains(ready[0], start);
        assert_eq!(balance.choose(&ready, 7, 1, start), None);
        assert_eq!(balance.choose(&ready, 7, 1, start + DRAINING), Some(ready[0]));
    }

    #[test]
    fn after_a_refusal_only_one_with_less_to_do_is_asked() {
        let (ready, now) = (replicas(3), Instant::now());
        let mut balance = Balance::default();
        for (replica, tokens) in ready.iter().zip([100, 100, 40]) {
            balance.choose(&[*replica], 7, tokens, now).unwrap();
        }
        assert_eq!(balance.roomier(&ready, ready[0], 60, now), Some(ready[2]));
        assert_eq!(balance.roomier(&ready, ready[0], 60, now), None);
    }

    #[test]
    fn a_replica_that_is_gone_is_forgotten_once_it_has_nothing_to_do() {
        let (ready, now) = (replicas(1), Instant::now());
        let mut balance = Balance::default();
        balance.choose(&ready, 7, 5, now).unwrap();
        balance.keep(&BTreeSet::new());
        assert_eq!(balance.outstanding(&ready[0]), 5);
        balance.release(ready[0], 5);
        balance.keep(&BTreeSet::new());
        assert!(balance.0.is_empty());
    }
}
