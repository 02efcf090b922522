//! Leaders come and go; what they decide, and how much they write, does not show it.
use lathe_contract::{Flow, Load, ServiceTraffic, Totals, Traffic};
use lathe_scaling::{Capacity, MAX_PEAKS};

use super::*;
use crate::scaling::{
    direct::Workers,
    gateway::Millis,
    ledger::{Awaited, Ledger},
};

const ZERO: Seconds = 1_700_000_000;
const POLICY: Policy = Policy {
    min_replicas: 0,
    max_replicas: 50,
    target_throughput_percent: 70,
    scale_down_after: 120,
    scale_to_zero_after: Some(300),
};

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % bound
    }
}

/// A gateway and all that flowed through it, second by second from `ZERO` and its phase on.
struct Source {
    pod: Awaited,
    phase: Millis,
    flows: Vec<Flow>,
}

impl Source {
    fn answer(&self, after: usize) -> Traffic {
        let first = after.max(self.flows.len().saturating_sub(120));
        let seconds = self.flows[first..].to_vec();
        let service = ServiceTraffic { uid: "s".to_owned(), seconds, ..ServiceTraffic::default() };
        Traffic { instance: self.pod.uid.clone(), second: self.flows.len() as u64, services: vec![service] }
    }
}

/// A leader, and what outlives it.
struct Leader {
    ledger: Ledger,
    notes: Notes,
    asked: u32,
    written: Scaled,
    writes: u32,
}

impl Leader {
    fn new(sources: &[Source]) -> Self {
        let mut ledger = Ledger::default();
        ledger.expect(sources.iter().map(|source| &source.pod));
        let (notes, written) = (Notes::default(), Scaled::default());
        Self { ledger, notes, asked: 1, written, writes: 0 }
    }

    /// Another one takes over, `late` milliseconds after the newest second began; the gateways tell it what they remember.
    fn replaced(&mut self, sources: &[Source], late: Millis) {
        let stored = serde_json::to_value(&self.written).unwrap();
        let status: InferenceServiceStatus = serde_json::from_value(stored).unwrap();
        let notes = Notes::read(Scaled::of(Some(&status)), StartUp::default());
        self.ledger = Self::new(sources).ledger;
        self.notes = notes;
        sources.iter().for_each(|source| self.hear(source, 0, late));
    }

    fn hear(&mut self, source: &Source, after: usize, at: Millis) {
        let second = source.flows.len() as Millis * 1000;
        self.ledger.hear(&source.pod.uid, source.answer(after), ZERO * 1000 + second + at);
    }

    fn round(&mut self, now: Seconds) -> Decision {
        let capacity = Some(Capacity { prompt: 8000.0, generation: 1000.0, sequences: 32 });
        let asked = self.asked;
        let replicas = Replicas { asked, ready: asked, draining: 0, start_up: 5, capacity };
        let window = self.ledger.window("s", now);
        self.ledger.sweep(now);
        let decision = self.notes.decide(&POLICY, &window, &replicas, now);
        if decision.replicas != asked {
            self.notes.carried_out(asked, &decision, now);
            self.asked = decision.replicas;
        }
        if let Some(scaled) = self.notes.due(&POLICY, &[], self.asked, now) {
            self.written = scaled.clone();
            self.notes.were_written(scaled);
            self.writes += 1;
        }
        decision
    }
}

fn sources() -> Vec<Source> {
    [("a", 80), ("b", 700)]
        .map(|(uid, phase)| {
            let pod = Awaited { uid: uid.to_owned(), ip: String::new(), ready: true, restarted: false };
            Source { pod, phase, flows: Vec::new() }
        })
        .into()
}

/// A second of so many requests, of 0.3 s of a replica each, half of them through each gateway.
fn flow(sources: &mut [Source], requests: u64) {
    for (index, source) in sources.iter_mut().enumerate() {
        let rate = (requests + index as u64) / 2;
        let running = rate as f64 * 3.0;
        source.flows.push(Flow {
            arrived: rate,
            finished: rate,
            prompt: rate * 800,
            generation: rate * 200,
            running,
            ..Flow::default()
        });
    }
}

#[test]
fn a_leader_that_is_replaced_at_any_second_changes_no_decision() {
    let mut random = Random(6);
    for run in 0..6 {
        let mut sources = sources();
        let (mut steady, mut replaced) = (Leader::new(&sources), Leader::new(&sources));
        let (mut requests, mut seen) = (7, Vec::new());
        for second in 1..=2500 {
            if random.below(150) == 0 {
                requests = [0, 0, 2, 7, 20][random.below(5) as usize];
            }
            flow(&mut sources, requests);
            for source in &sources {
                let latency = random.below(100) as Millis;
                steady.hear(source, second - 1, source.phase + latency);
                replaced.hear(source, second - 1, source.phase + latency);
            }
            let now = ZERO + second as Seconds;
            let expected = steady.round(now);
            let found = replaced.round(now);
            assert_eq!(
                replaced.asked, steady.asked,
                "{run}, {second}: {} | {}",
                found.message, expected.message
            );
            seen.push(steady.asked);
            if random.below(30) == 0 {
                replaced.replaced(&sources, 810 + random.below(150) as Millis);
            }
        }
        seen.dedup();
        assert!(seen.len() > 5, "{run}: nothing happened: {seen:?}");
    }
}

/// When a service with `access: Direct` has one replica again: its workers are asked each two seconds, and its load goes down to a
/// seventh. A leader is lost at `lost`, and the next one begins six seconds later.
fn given_back(lost: Option<Seconds>) -> Seconds {
    const QUIET: Seconds = 400;
    let policy = Policy { min_replicas: 1, scale_to_zero_after: None, ..POLICY };
    let totals = |at: Seconds| {
        let arrived = 7 * at.min(QUIET) + (at - QUIET).max(0);
        Totals { arrived, finished: arrived, prompt: arrived * 800, generation: arrived * 200 }
    };
    let (mut notes, mut workers, mut asked) = (Notes::default(), Workers::default(), 3);
    let mut stored = Scaled::default();
    for at in 1..QUIET + 360 {
        if lost.is_some_and(|lost| (lost..lost + 6).contains(&at)) {
            let status = serde_json::to_value(&stored).unwrap();
            let status: InferenceServiceStatus = serde_json::from_value(status).unwrap();
            workers = Workers::remembered(status.scaling.as_ref().unwrap().counted.clone());
            notes = Notes::read(Scaled::of(Some(&status)), StartUp::default());
            continue;
        }
        if workers.are_due(2, ZERO + at) {
            let load = Load { running: 3, totals: totals(at), ..Load::default() };
            workers.hear(&[("p".to_owned(), Some(load))].into(), "p", ZERO + at);
        }
        let capacity = Some(Capacity { prompt: 8000.0, generation: 1000.0, sequences: 32 });
        let replicas = Replicas { asked, ready: asked, draining: 0, start_up: 5, capacity };
        let decision = notes.decide(&policy, workers.window(), &replicas, ZERO + at);
        if decision.replicas != asked {
            notes.carried_out(asked, &decision, ZERO + at);
            asked = decision.replicas;
        }
        if asked == 1 {
            return at;
        }
        if let Some(scaled) = notes.due(&policy, workers.sums(), asked, ZERO + at) {
            stored = scaled.clone();
            notes.were_written(scaled);
        }
    }
    panic!("nothing was given back");
}

#[test]
fn a_new_leader_goes_on_with_what_the_workers_of_a_direct_service_have_done() {
    let steady = given_back(None);
    for lost in (100..540).step_by(7) {
        let at = given_back(Some(lost));
        // The moment in which the load fell is known by parts: that is far nearer than a window that begins anew.
        assert!((steady - 30..=steady + 30).contains(&at), "{lost}: {at} and not {steady}");
    }
}

#[test]
fn a_service_that_sleeps_or_idles_is_not_written() {
    let mut sources = sources();
    let mut leader = Leader::new(&sources);
    let seconds = |leader: &mut Leader, sources: &mut Vec<Source>, seconds: usize, requests: u64| {
        for _ in 0..seconds {
            flow(sources, requests);
            let second = sources[0].flows.len();
            sources.iter().for_each(|source| leader.hear(source, second - 1, source.phase));
            leader.round(ZERO + second as Seconds);
        }
        std::mem::take(&mut leader.writes)
    };
    let busy = seconds(&mut leader, &mut sources, 600, 7);
    assert!((10..=30).contains(&busy), "{busy} writes in ten busy minutes");
    assert!(seconds(&mut leader, &mut sources, 400, 0) <= 20);
    assert_eq!(leader.asked, 0);
    assert_eq!(seconds(&mut leader, &mut sources, 3600, 0), 0);
}

#[test]
fn what_stands_in_the_way_is_told_once_it_stays() {
    let mut leader = Leader::new(&sources());
    let blocked = |leader: &Leader| leader.written.scaling.as_ref().and_then(|scaling| scaling.blocked);
    for at in 0..10 {
        leader.round(ZERO + at);
        assert_eq!(blocked(&leader), None, "{at}");
    }
    leader.round(ZERO + 10);
    assert_eq!(blocked(&leader), Some(ScalingBlock::ReportsLate));
    (11..4000).for_each(|at| drop(leader.round(ZERO + at)));
    assert_eq!(leader.writes, 2, "nothing changed since");
}

#[test]
fn decisions_and_memory_have_bounded_room() {
    let peak = Peak { at: ZERO, replicas: u32::MAX };
    let (replicas, at) = ("0123456789".to_owned(), MOST);
    let most = CountedStatus { replicas, at, arrived: MOST, finished: MOST, prompt: MOST, generation: MOST };
    let mut notes = Notes {
        memory: Memory {
            seen: Some(i64::MAX),
            since: i64::MIN,
            busy: i64::MAX,
            peaks: vec![peak; MAX_PEAKS],
            raised: Some(peak),
            prompt_done: u64::MAX,
            generation_done: u64::MAX,
            requests_done: u64::MAX,
        },
        blocked: Some(ScalingBlock::ReportsMissing),
        start_up: StartUp::default(),
        ..Notes::default()
    };
    let reason = Reason::ThroughputAboveTarget;
    let decision =
        Decision {
            replicas: 10_000, reason, message: "é".repeat(500), load: 0.0, memory: Memory::default()
        };
    (0..25).for_each(|at| notes.carried_out(10_000, &decision, ZERO + at));
    let scaled = notes.due(&POLICY, &vec![most; lathe_api::MAX_COUNTED], 1, ZERO).unwrap();
    assert_eq!(scaled.decisions.len(), MAX_DECISIONS);
    assert_eq!(scaled.decisions[9].time.0.as_second(), ZERO + 24);
    let bytes = serde_json::to_vec(&scaled).unwrap().len();
    assert!(bytes < 6144, "{bytes} bytes");
    let memory = serde_json::to_vec(&scaled.scaling.unwrap().memory).unwrap().len();
    assert!(memory < 1024, "{memory} bytes");
}

#[test]
fn the_schema_has_room_for_all_that_is_remembered() {
    use kube::CustomResourceExt as _;
    let crd = serde_json::to_value(lathe_api::InferenceService::crd()).unwrap();
    let status = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties";
    let most = crd.pointer(&format!("{status}/scaling/properties/memory/properties/peaks/maxItems"));
    assert_eq!(most.and_then(serde_json::Value::as_u64), Some(MAX_PEAKS as u64));
    let most = crd.pointer(&format!("{status}/decisions/maxItems"));
    assert_eq!(most.and_then(serde_json::Value::as_u64), Some(MAX_DECISIONS as u64));
}
