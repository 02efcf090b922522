//! Pure: the seconds of all gateways, summed for each service.
use std::collections::{BTreeMap, HashMap, HashSet};

use lathe_contract::{Ended, Flow, MAX_REVISIONS, ServiceTraffic, TRAFFIC_SECONDS, Traffic};
use lathe_scaling::{Capacity, Report, Seconds, Window};

use super::gateway::{Gateway, Millis, Placed};

/// Seconds that are looked back: as many as gateways remember.
const KEPT: Seconds = TRAFFIC_SECONDS as Seconds;
/// A second that a gateway has not told after so many is decided without it.
const PATIENCE: Seconds = 2;
/// A second that a gateway has not told after so many is counted without it.
const SILENCE: Seconds = 30;

/// What the gateways told.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Those that are awaited, by their pods' UIDs.
    gateways: BTreeMap<String, Heard>,
    /// Sums by the services' UIDs; a second that is not there is zero.
    services: HashMap<String, BTreeMap<Seconds, Report>>,
    /// How requests ended, by the services' UIDs, seconds and revisions.
    ended: HashMap<String, BTreeMap<Seconds, BTreeMap<String, Ended>>>,
}

#[derive(Debug, Default)]
struct Heard {
    gateway: Gateway,
    /// It takes requests, or took some: what it does not tell is missing.
    counts: bool,
    restarted: bool,
    /// What a replica of each service can do, as one said last.
    capacities: HashMap<String, Capacity>,
}

/// A pod of the gateway that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awaited {
    pub uid: String,
    pub ip: String,
    /// It takes requests. One that never did, so far as anybody knows, has nothing to tell.
    pub ready: bool,
    /// Its container was started more than once.
    pub restarted: bool,
}

impl Ledger {
    /// From now on these are awaited and no others. What those that are gone have told stays.
    pub fn expect<'a>(&mut self, pods: impl IntoIterator<Item = &'a Awaited>) {
        let mut before = std::mem::take(&mut self.gateways);
        let heard = |pod: &Awaited| {
            let mut heard = before.remove(&pod.uid).unwrap_or_default();
            heard.counts |= pod.ready;
            heard.restarted = pod.restarted;
            (pod.uid.clone(), heard)
        };
        self.gateways = pods.into_iter().map(heard).collect();
    }

    /// Takes an answer of a gateway that came at `at`; tells whether a request began to be held for a service that had none.
    pub fn hear(&mut self, pod: &str, traffic: Traffic, at: Millis) -> bool {
        let Some(heard) = self.gateways.get_mut(pod) else { return false };
        heard.counts = true;
        let wakes = traffic.services.iter().any(|s| s.held > 0 && !heard.gateway.held.contains_key(&s.uid));
        for service in &traffic.services {
            let Some(told) = service.capacity else { continue };
            let capacity =
                Capacity { prompt: told.prompt, generation: told.generation, sequences: told.sequences };
            heard.capacities.insert(service.uid.clone(), capacity);
        }
        for Placed { traffic, newest, new } in heard.gateway.hear(traffic, at, heard.restarted) {
            for ServiceTraffic { uid, seconds, outcomes, .. } in traffic.services {
                for outcome in outcomes.into_iter().filter(|outcome| outcome.back < new) {
                    let at = newest.saturating_sub_unsigned(outcome.back);
                    let second = self.ended.entry(uid.clone()).or_default().entry(at).or_default();
                    // Gateways may hear of another candidate at different moments, and know no more at a time.
                    if second.len() < 2 * MAX_REVISIONS || second.contains_key(&outcome.revision) {
                        let sum = second.entry(outcome.revision).or_default();
                        *sum = sum.and(outcome.ended);
                    }
                }
                let flows = seconds.iter().rev().zip(0..new).filter(|(flow, _)| **flow != Flow::default());
                for (flow, back) in flows {
                    let at = newest.saturating_sub_unsigned(back);
                    add(self.services.entry(uid.clone()).or_default().entry(at).or_default(), flow);
                }
            }
        }
        wakes
    }

    /// A gateway could not be asked.
    pub fn fail(&mut self, pod: &str) {
        if let Some(heard) = self.gateways.get_mut(pod) {
            heard.gateway.fail();
        }
    }

    /// Forgets what is looked back at no more.
    pub fn sweep(&mut self, now: Seconds) {
        let oldest = now.saturating_sub(KEPT);
        self.services.retain(|_, seconds| {
            *seconds = seconds.split_off(&oldest);
            !seconds.is_empty()
        });
        self.ended.retain(|_, seconds| {
            *seconds = seconds.split_off(&oldest);
            !seconds.is_empty()
        });
    }

    /// Services for which a request is held.
    pub fn held(&self) -> HashSet<String> {
        self.gateways.values().flat_map(|heard| heard.gateway.held.keys().cloned()).collect()
    }

    /// What a replica of a service can do: the mean of what the gateways were told last.
    pub fn capacity(&self, uid: &str) -> Option<Capacity> {
        let all: Vec<Capacity> =
            self.gateways.values().filter_map(|heard| heard.capacities.get(uid).copied()).collect();
        mean(&all)
    }

    /// Whether each gateway that takes requests has told what flowed before this leader came.
    pub fn is_heard(&self) -> bool {
        let mut counting = self.gateways.values().filter(|heard| heard.counts).peekable();
        counting.peek().is_some() && counting.all(|heard| heard.gateway.has_told())
    }

    /// Nothing that was told of what a replica of a service can do holds any more.
    pub fn forget_capacity(&mut self, uid: &str) {
        self.gateways.values_mut().for_each(|heard| _ = heard.capacities.remove(uid));
    }

    /// Up to which second everything was told that flowed after `after`. Who stays silent is not waited for for ever.
    pub fn told_until(&self, after: Seconds, now: Seconds) -> Seconds {
        let told = |at: Seconds| {
            self.gateways.values().any(|heard| heard.gateway.told(at))
                && !self.gateways.values().any(|heard| heard.counts && heard.gateway.lacks(at))
        };
        let silent = now.saturating_sub(SILENCE);
        let first = after.max(silent).saturating_add(1);
        (first..=now).take_while(|at| told(*at)).last().unwrap_or(first - 1).max(after)
    }

    /// How requests to a revision of a service ended after one second and up to another.
    pub fn ended(&self, uid: &str, revision: &str, after: Seconds, until: Seconds) -> Ended {
        let Some(seconds) = self.ended.get(uid).filter(|_| after < until) else { return Ended::default() };
        let told = seconds.range(after + 1..=until).filter_map(|(_, revisions)| revisions.get(revision));
        told.fold(Ended::default(), |sum, ended| sum.and(*ended))
    }

    /// What flowed to a service in the last two minutes.
    pub fn window(&self, uid: &str, now: Seconds) -> Window {
        let lacks = |heard: &&Heard, at| heard.counts && heard.gateway.lacks(at);
        let lacking = |at| self.gateways.values().filter(|heard| lacks(heard, at)).count() as u32;
        let told = |at: &Seconds| self.gateways.values().any(|heard| heard.gateway.told(*at));
        let sums = self.services.get(uid);
        let reports = (now.saturating_sub(KEPT - 1)..=now).filter(told).map(|at| {
            let sum = sums.and_then(|sums| sums.get(&at)).copied().unwrap_or_default();
            Report { at, missing: lacking(at), ..sum }
        });
        let mut reports: Vec<Report> = reports.collect();
        // The others may tell of the newest seconds yet.
        while reports.last().is_some_and(|last| last.missing > 0 && last.at > now.saturating_sub(PATIENCE)) {
            reports.pop();
        }
        let held: u64 = self
            .gateways
            .values()
            .filter_map(|heard| heard.gateway.held.get(uid))
            .fold(0, |all, held| all.saturating_add(*held));
        if held > 0 {
            hold(&mut reports, held as f64, now, self.gateways.len() as u32);
        }
        reports.into_iter().collect()
    }
}

/// What is held at this moment counts before its second is over.
fn hold(reports: &mut Vec<Report>, held: f64, now: Seconds, gateways: u32) {
    match reports.last_mut().filter(|last| last.at >= now.saturating_sub(PATIENCE)) {
        Some(last) => last.held = last.held.max(held),
        None => reports.push(Report { at: now, held, missing: gateways, ..Report::default() }),
    }
}

fn add(sum: &mut Report, flow: &Flow) {
    sum.arrived += flow.arrived as f64;
    sum.finished += flow.finished as f64;
    sum.prompt += flow.prompt as f64;
    sum.generation += flow.generation as f64;
    sum.running += flow.running;
    sum.waiting += flow.waiting;
    sum.held += flow.held as f64;
}

/// What they can do on the average; those that say nothing usable do not count.
pub fn mean(all: &[Capacity]) -> Option<Capacity> {
    let usable = |capacity: &&Capacity| {
        [capacity.prompt, capacity.generation].iter().all(|rate| rate.is_finite() && *rate > 0.0)
    };
    let all: Vec<&Capacity> = all.iter().filter(usable).collect();
    let of = |rate: fn(&Capacity) -> f64| all.iter().map(|c| rate(c)).sum::<f64>() / all.len() as f64;
    (!all.is_empty()).then(|| Capacity {
        prompt: of(|capacity| capacity.prompt),
        generation: of(|capacity| capacity.generation),
        sequences: of(|capacity| capacity.sequences.into()).round() as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: Seconds = 1_700_000_000;

    fn pod(uid: &str) -> Awaited {
        Awaited { uid: uid.to_owned(), ip: String::new(), ready: true, restarted: false }
    }

    fn flow(arrived: u64) -> Flow {
        Flow { arrived, running: 0.5, ..Flow::default() }
    }

    /// A gateway that began at `ZERO` and `phase` milliseconds.
    struct Source {
        pod: Awaited,
        instance: &'static str,
        phase: Millis,
    }

    impl Source {
        fn new(uid: &'static str, phase: Millis) -> Self {
            Self { pod: pod(uid), instance: uid, phase }
        }

        /// Tells these seconds, the last of which is `second`, `late` milliseconds after it.
        fn tell(&self, ledger: &mut Ledger, second: u64, arrived: &[u64], late: Millis) -> bool {
            let seconds = arrived.iter().copied().map(flow).collect();
            self.say(ledger, second, ServiceTraffic { seconds, ..service() }, late)
        }

        /// Tells of one request in each second up to `last`, in time.
        fn tells(&self, ledger: &mut Ledger, last: u64) {
            (1..=last).for_each(|second| _ = self.tell(ledger, second, &[1], 0));
        }

        fn say(&self, ledger: &mut Ledger, second: u64, service: ServiceTraffic, late: Millis) -> bool {
            let at = ZERO * 1000 + self.phase + second as Millis * 1000 + late;
            let traffic = Traffic { instance: self.instance.to_owned(), second, services: vec![service] };
            ledger.hear(&self.pod.uid, traffic, at)
        }
    }

    fn service() -> ServiceTraffic {
        ServiceTraffic { uid: "s".to_owned(), ..ServiceTraffic::default() }
    }

    fn arrived(at: Seconds, arrived: f64, replicas: f64, missing: u32) -> Report {
        Report { at: ZERO + at, arrived, running: replicas, missing, ..Report::default() }
    }

    fn window(reports: &[Report]) -> Window {
        reports.iter().copied().collect()
    }

    fn outcome(back: u64, revision: &str, requests: u64) -> lathe_contract::RevisionOutcome {
        let ended = Ended { requests, ..Ended::default() };
        lathe_contract::RevisionOutcome { back, revision: revision.to_owned(), ended }
    }

    #[test]
    fn what_ended_counts_once_in_its_second_whichever_gateway_tells_it() {
        let mut ledger = Ledger::default();
        let (a, b) = (Source::new("a", 0), Source::new("b", 300));
        ledger.expect([&a.pod, &b.pod]);
        for second in 1..=5 {
            for source in [&a, &b] {
                // The last two seconds again each time, as an answer that was lost would be.
                let outcomes =
                    vec![outcome(0, "new", second), outcome(1, "new", second - 1), outcome(0, "old", 9)];
                let seconds = vec![flow(1); 2];
                source.say(&mut ledger, second, ServiceTraffic { seconds, outcomes, ..service() }, 0);
            }
        }
        let ended = |after, until| ledger.ended("s", "new", ZERO + after, ZERO + until).requests;
        assert_eq!(ended(0, 5), 2 * (1 + 2 + 3 + 4 + 5));
        assert_eq!((ended(0, 2) + ended(2, 4) + ended(4, 5), ended(3, 3), ended(5, 3)), (ended(0, 5), 0, 0));
        assert_eq!(ledger.ended("s", "old", ZERO, ZERO + 5).requests, 90);
        assert_eq!(ledger.ended("s", "other", ZERO, ZERO + 5), Ended::default());
    }

    #[test]
    fn counting_waits_for_a_gateway_but_not_for_ever() {
        let mut ledger = Ledger::default();
        let (a, b) = (Source::new("a", 0), Source::new("b", 300));
        assert_eq!(ledger.told_until(ZERO, ZERO + 20), ZERO, "nobody was heard yet");
        ledger.expect([&a.pod, &b.pod]);
        a.tells(&mut ledger, 60);
        b.tells(&mut ledger, 50);
        assert_eq!(ledger.told_until(ZERO + 40, ZERO + 60), ZERO + 50);
        assert_eq!(ledger.told_until(ZERO + 40, ZERO + 85), ZERO + 55, "it is silent");
        assert_eq!(ledger.told_until(ZERO + 90, ZERO + 85), ZERO + 90, "a clock that was set back");
        ledger.expect([&a.pod]);
        assert_eq!(ledger.told_until(ZERO + 40, ZERO + 61), ZERO + 60);
    }

    #[test]
    fn seconds_of_different_gateways_are_summed_where_they_end_in_the_same_second() {
        let (a, b) = (Source::new("a", 100), Source::new("b", 900));
        let mut ledger = Ledger::default();
        ledger.expect([&a.pod, &b.pod]);
        a.tell(&mut ledger, 1, &[1], 0);
        b.tell(&mut ledger, 1, &[10], 0);
        a.tell(&mut ledger, 2, &[2], 0);
        b.tell(&mut ledger, 2, &[20], 0);
        let both = [arrived(1, 11.0, 1.0, 0), arrived(2, 22.0, 1.0, 0)];
        assert_eq!(ledger.window("s", ZERO + 2), window(&both));
        // One is ahead: its second waits for the other, but not for ever.
        a.tell(&mut ledger, 3, &[3], 0);
        assert_eq!(ledger.window("s", ZERO + 4), window(&both));
        let alone = [both[0], both[1], arrived(3, 3.0, 0.5, 1)];
        assert_eq!(ledger.window("s", ZERO + 5), window(&alone));
        // It comes after all.
        b.tell(&mut ledger, 3, &[30], 1500);
        assert_eq!(ledger.window("s", ZERO + 5), window(&[both[0], both[1], arrived(3, 33.0, 1.0, 0)]));
        // Another service had nothing to do.
        let idle: Vec<Report> = (1..=3).map(|at| arrived(at, 0.0, 0.0, 0)).collect();
        assert_eq!(ledger.window("other", ZERO + 3), window(&idle));
    }

    #[test]
    fn a_gateway_that_is_gone_is_not_awaited_and_what_it_told_stays() {
        let (a, b) = (Source::new("a", 0), Source::new("b", 0));
        let mut ledger = Ledger::default();
        ledger.expect([&a.pod, &b.pod]);
        for second in 1..=2 {
            a.tell(&mut ledger, second, &[1], 0);
            b.tell(&mut ledger, second, &[1], 0);
        }
        a.tell(&mut ledger, 5, &[1, 1, 1], 0);
        ledger.fail("b");
        let missing = [(1, 2.0, 0), (2, 2.0, 0), (3, 1.0, 1), (4, 1.0, 1), (5, 1.0, 1)];
        let reports = |of: &[(Seconds, f64, u32)]| -> Vec<Report> {
            of.iter().map(|&(at, sum, missing)| arrived(at, sum, sum / 2.0, missing)).collect()
        };
        assert_eq!(ledger.window("s", ZERO + 7), window(&reports(&missing)));
        ledger.expect([&a.pod]);
        let whole = [(1, 2.0, 0), (2, 2.0, 0), (3, 1.0, 0), (4, 1.0, 0), (5, 1.0, 0)];
        assert_eq!(ledger.window("s", ZERO + 7), window(&reports(&whole)));
        // Nobody listens to what is not awaited.
        b.tell(&mut ledger, 6, &[1], 0);
        assert_eq!(ledger.window("s", ZERO + 7), window(&reports(&whole)));
    }

    #[test]
    fn a_new_gateway_makes_no_second_before_it_incomplete() {
        let (a, b) = (Source::new("a", 0), Source { phase: 10_000, ..Source::new("b", 0) });
        let mut ledger = Ledger::default();
        ledger.expect([&a.pod]);
        a.tells(&mut ledger, 12);
        ledger.expect([&a.pod, &b.pod]);
        b.tell(&mut ledger, 1, &[1], 0);
        b.tell(&mut ledger, 2, &[1], 0);
        let expected: Vec<Report> = (1..=12)
            .map(|at| if at > 10 { arrived(at, 2.0, 1.0, 0) } else { arrived(at, 1.0, 0.5, 0) })
            .collect();
        assert_eq!(ledger.window("s", ZERO + 12), window(&expected));
    }

    #[test]
    fn one_that_was_never_ready_is_missed_by_nobody_until_it_answers() {
        let (a, b) = (Source::new("a", 0), Source::new("b", 0));
        let mut ledger = Ledger::default();
        ledger.expect([&a.pod, &Awaited { ready: false, ..b.pod.clone() }]);
        a.tells(&mut ledger, 3);
        let alone: Vec<Report> = (1..=3).map(|at| arrived(at, 1.0, 0.5, 0)).collect();
        assert_eq!(ledger.window("s", ZERO + 6), window(&alone));
        b.tell(&mut ledger, 1, &[1], 0);
        b.tell(&mut ledger, 2, &[1], 0);
        let both = [arrived(1, 2.0, 1.0, 0), arrived(2, 2.0, 1.0, 0), arrived(3, 1.0, 0.5, 1)];
        assert_eq!(ledger.window("s", ZERO + 6), window(&both));
    }

    #[test]
    fn what_is_held_counts_at_once_and_wakes_once() {
        let a = Source::new("a", 0);
        let mut ledger = Ledger::default();
        ledger.expect([&a.pod]);
        let held = |held| ServiceTraffic { held, ..service() };
        // Before the first second is over.
        assert!(a.say(&mut ledger, 0, held(1), 300));
        let report = Report { at: ZERO + 1, held: 1.0, missing: 1, ..Report::default() };
        assert_eq!(ledger.window("s", ZERO + 1), window(&[report]));
        assert!(!a.say(&mut ledger, 1, held(2), 0));
        assert_eq!(ledger.held(), HashSet::from(["s".to_owned()]));
        assert_eq!(ledger.window("s", ZERO + 1), window(&[Report { held: 2.0, missing: 0, ..report }]));
        // Whoever cannot be asked holds nothing that is known.
        ledger.fail("a");
        assert_eq!(ledger.window("s", ZERO + 1), window(&[Report { held: 0.0, missing: 0, ..report }]));
    }

    #[test]
    fn what_nobody_looks_at_any_more_takes_no_room() {
        let a = Source::new("a", 0);
        let mut ledger = Ledger::default();
        ledger.expect([&a.pod]);
        a.tells(&mut ledger, 3);
        ledger.sweep(ZERO + 122);
        assert_eq!(ledger.services["s"].len(), 2);
        ledger.sweep(ZERO + 124);
        assert!(ledger.services.is_empty());
    }

    #[test]
    fn a_capacity_is_the_mean_of_what_can_be() {
        let of = |prompt: f64, sequences| Capacity { prompt, generation: 2.0, sequences };
        assert_eq!(mean(&[of(10.0, 4), of(20.0, 8), of(0.0, 1), of(f64::NAN, 1)]), Some(of(15.0, 6)));
        assert_eq!(mean(&[]), None);
    }
}
