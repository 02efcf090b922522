#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]
//! Properties that hold for whatever is reported, and what is decided in plain cases.
use super::*;

const POLICY: Policy = Policy {
    min_replicas: 0,
    max_replicas: 50,
    target_throughput_percent: 70,
    scale_down_after: 300,
    scale_to_zero_after: Some(900),
};
const CAPACITY: Capacity = Capacity { prompt: 8000.0, generation: 1000.0, sequences: 32 };
/// Requests a second that keep one replica busy: 800 prompt tokens are 0.1 s of it, 200 generated ones 0.2 s.
const REQUESTS: f64 = 1.0 / 0.3;
const START: Seconds = 1_700_000_000;

/// splitmix64.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn choose<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// A second of a service that has `load` replicas' worth to do, and does it.
fn report(at: Seconds, load: f64) -> Report {
    let rate = load * REQUESTS;
    Report {
        at,
        arrived: rate,
        finished: rate,
        prompt: rate * 800.0,
        generation: rate * 200.0,
        running: load * 10.0,
        ..Report::default()
    }
}

fn settled(asked: u32) -> Replicas {
    Replicas { asked, ready: asked, draining: 0, start_up: 5, capacity: Some(CAPACITY) }
}

/// A service under the decision: what was asked for is ready at once, unless a test says otherwise.
struct Service {
    policy: Policy,
    window: Window,
    memory: Memory,
    replicas: Replicas,
    now: Seconds,
}

impl Service {
    fn new(asked: u32) -> Self {
        let (window, memory) = (Window::default(), Memory::default());
        Self { policy: POLICY, window, memory, replicas: settled(asked), now: START }
    }

    fn second(&mut self, report: impl FnOnce(Seconds) -> Report) -> Decision {
        self.now += 1;
        self.window.push(report(self.now));
        self.decide()
    }

    fn decide(&mut self) -> Decision {
        let Self { policy, window, memory, replicas, now } = self;
        let decision = decide(policy, window, memory, replicas, *now);
        *memory = decision.memory.clone();
        (replicas.asked, replicas.ready) = (decision.replicas, decision.replicas);
        decision
    }

    fn seconds(&mut self, seconds: u32, load: f64) -> Decision {
        (1..seconds).for_each(|_| drop(self.second(|at| report(at, load))));
        self.second(|at| report(at, load))
    }
}

#[test]
fn on_target_at_a_steady_load() {
    let mut service = Service::new(1);
    let decision = service.seconds(120, 3.4);
    assert_eq!((decision.replicas, decision.reason), (5, Reason::OnTarget));
    let words = "the load is 3.40 replicas' worth (11.3 requests/s come, 9067 prompt and 2267 generated tokens/s flow, 0 wait): \
                 5 replicas for 70 % or less";
    assert_eq!(decision.message, words);
}

#[test]
fn ten_times_the_load_is_answered_within_two_seconds_of_the_first_report() {
    let mut service = Service::new(1);
    service.seconds(300, 0.6);
    // Saturated: nothing more flows, and what comes waits.
    let step = |at: Seconds, seconds: f64| Report {
        arrived: 6.0 * REQUESTS,
        running: 32.0,
        waiting: 5.0 * REQUESTS * seconds,
        ..report(at, 1.0)
    };
    let first = service.second(|at| step(at, 1.0));
    let second = service.second(|at| step(at, 2.0));
    assert!(first.replicas >= 4, "{}", first.message);
    assert!(second.replicas >= 6, "{}", second.message);
}

#[test]
fn replicas_on_their_way_are_capacity_and_a_growing_queue_is_no_storm() {
    let mut service = Service::new(1);
    service.seconds(300, 0.6);
    let asked: Vec<u32> = (1..=300)
        .map(|second| {
            service.replicas.ready = 1;
            let decision = service.second(|at| Report {
                arrived: 6.0 * REQUESTS,
                running: 32.0,
                waiting: 5.0 * REQUESTS * f64::from(second),
                ..report(at, 1.0)
            });
            decision.replicas
        })
        .collect();
    assert!(asked.is_sorted() && asked[20] >= 9, "{asked:?}");
    // 6 replicas' worth, and at most four times as much to catch up: in 300 seconds 5 requests of 6 have waited, 450 s of work.
    assert!(asked[299] <= 30, "{asked:?}");
}

#[test]
fn no_more_than_ten_times_as_many_at_once() {
    let mut service = Service::new(2);
    service.policy.max_replicas = 10_000;
    service.seconds(120, 1.0);
    let decision = service.seconds(5, 3000.0);
    assert_eq!((decision.replicas, decision.reason), (20, Reason::ThroughputAboveTarget));
    assert_eq!(service.seconds(10, 3000.0).replicas, 200);
}

#[test]
fn down_after_a_whole_quiet_window_and_not_before() {
    let mut service = Service::new(1);
    service.seconds(400, 5.0);
    assert_eq!(service.replicas.asked, 8);
    let quiet = |service: &mut Service| {
        (0..1000).take_while(|_| service.second(|at| report(at, 1.0)).replicas == 8).count()
    };
    let seconds = quiet(&mut service);
    // The mean of a minute still remembers, and the window is remembered in parts.
    assert!((300..=400).contains(&seconds), "{seconds}");
    // Slow to start: kept for longer.
    let mut slow = Service::new(1);
    slow.replicas.start_up = 600;
    slow.seconds(400, 5.0);
    assert!(quiet(&mut slow) >= 600);
}

#[test]
fn nothing_more_is_given_back_while_some_drain() {
    let mut service = Service::new(1);
    service.seconds(400, 5.0);
    service.replicas.draining = 2;
    let decision = service.seconds(800, 1.0);
    assert_eq!((decision.replicas, decision.reason), (8, Reason::ReplicasDraining));
    service.replicas.draining = 0;
    let decision = service.seconds(1, 1.0);
    assert_eq!((decision.replicas, decision.reason), (2, Reason::ThroughputBelowTarget));
}

#[test]
fn those_that_stay_have_room_for_what_is_in_flight() {
    let mut service = Service::new(6);
    // Long answers: few tokens flow, and many sequences are open.
    let slow = |at| Report { running: 32.0 * 3.5, ..report(at, 0.5) };
    (0..900).for_each(|_| drop(service.second(slow)));
    assert_eq!(service.replicas.asked, 4);
}

#[test]
fn to_zero_when_idle_and_back_by_one_held_request() {
    let mut service = Service::new(1);
    service.seconds(120, 0.2);
    let awake = (0..2000).take_while(|_| service.second(|at| report(at, 0.0)).replicas > 0).count();
    assert!((899..=901).contains(&awake), "{awake}");
    let decision = service.seconds(60, 0.0);
    assert_eq!((decision.replicas, decision.reason), (0, Reason::ScaledToZero));
    let decision = service.second(|at| Report { held: 1.0, arrived: 1.0, ..report(at, 0.0) });
    assert_eq!((decision.replicas, decision.reason), (1, Reason::RequestHeld));
}

#[test]
fn many_held_requests_wake_no_more_than_any_raise_may_ask_for() {
    let mut service = Service::new(1);
    service.seconds(120, 0.2);
    service.seconds(1000, 0.0);
    assert_eq!(service.replicas.asked, 0);
    // Hundreds at once: work for dozens of replicas.
    let held = |at| Report { held: 800.0, arrived: 100.0, ..report(at, 0.0) };
    let asked: Vec<u32> = (0..12).map(|_| service.second(held).replicas).collect();
    assert!(asked[1..10].iter().all(|replicas| *replicas == 10) && asked[10] > 10, "{asked:?}");
    // One is enough for one.
    let mut service = Service::new(0);
    let asked: Vec<u32> =
        (0..12).map(|_| service.second(|at| Report { held: 1.0, ..report(at, 0.0) }).replicas).collect();
    assert_eq!(asked, [1; 12]);
}

#[test]
fn a_requests_work_is_that_of_the_replicas_that_there_are() {
    let load = |capacity: Capacity| {
        let mut service = Service::new(1);
        service.seconds(300, 0.6);
        // Nothing flows any more; then requests come that nobody has answered yet.
        service.seconds(70, 0.0);
        service.replicas.capacity = Some(capacity);
        let come = |at| Report { arrived: 9.0, running: 9.0, ..Report { at, ..Report::default() } };
        (0..9).for_each(|_| drop(service.second(come)));
        service.second(come).load
    };
    let (before, slower) = (load(CAPACITY), load(Capacity { prompt: 2000.0, generation: 250.0, ..CAPACITY }));
    // Another revision takes four times as long.
    assert!(before > 0.3 && (slower / before - 4.0).abs() < 1e-6, "{before} {slower}");
}

#[test]
fn a_new_service_is_not_idle_since_for_ever() {
    let mut service = Service::new(1);
    // The gateways know of no request to it, long before it was there.
    (-120..0).for_each(|at| service.window.push(report(START + at, 0.0)));
    for second in 0..900 {
        assert_eq!(service.seconds(1, 0.0).replicas, 1, "{second}");
    }
    assert_eq!(service.seconds(2, 0.0).reason, Reason::ScaledToZero);
}

#[test]
fn replicas_that_can_do_no_more_are_too_few_whatever_was_measured() {
    let mut service = Service::new(1);
    service.seconds(120, 0.2);
    // Clients that wait for their answers, and half of what was measured is all that comes of it.
    let full = |at: Seconds| Report { running: 32.0, waiting: 2.0, ..report(at, 0.3) };
    let asked: Vec<u32> = (0..5).map(|_| service.second(full).replicas).collect();
    assert_eq!((asked[1], asked[4]), (1, 2), "{asked:?}");
    // A replica's word is of the moment in which answers had ended and the next requests were not taken up yet.
    let mut service = Service::new(1);
    service.seconds(120, 0.2);
    let gap = |at: Seconds| Report { running: 28.0, waiting: 4.0, ..report(at, 0.3) };
    let asked: Vec<u32> = (0..5).map(|_| service.second(gap).replicas).collect();
    assert_eq!((asked[1], asked[4]), (1, 2), "{asked:?}");
    // With what is ready now nobody waits; and a moment of waiting is no want.
    let mut service = Service::new(1);
    service.seconds(120, 0.2);
    for second in 0..60 {
        let waiting = if second % 4 == 0 { 0.0 } else { 2.0 };
        let decision = service.second(|at| Report { running: 32.0, waiting, ..report(at, 0.3) });
        assert_eq!(decision.replicas, 1, "{}", decision.message);
    }
}

#[test]
fn who_must_not_sleep_does_not() {
    for policy in [Policy { min_replicas: 1, ..POLICY }, Policy { scale_to_zero_after: None, ..POLICY }] {
        let mut service = Service { policy, ..Service::new(1) };
        assert_eq!(service.seconds(2000, 0.0).replicas, 1);
    }
}

#[test]
fn without_a_capacity_replicas_stay_and_still_wake() {
    let mut service = Service::new(2);
    service.replicas.capacity = None;
    let decision = service.seconds(600, 5.0);
    assert_eq!((decision.replicas, decision.reason), (2, Reason::CapacityUnknown));
    service.replicas.asked = 0;
    let decision = service.second(|at| Report { held: 3.0, ..report(at, 0.0) });
    assert_eq!((decision.replicas, decision.reason), (1, Reason::RequestHeld));
}

#[test]
fn without_a_capacity_nothing_is_given_back_while_reports_are_missing_or_replicas_drain() {
    let idle = |missing: u32, draining: u32| {
        let mut service = Service::new(2);
        (service.replicas.capacity, service.replicas.draining) = (None, draining);
        service.seconds(890, 0.0);
        (0..3000).for_each(|_| drop(service.second(|at| Report { missing, ..report(at, 0.0) })));
        let decision = service.second(|at| Report { missing, ..report(at, 0.0) });
        (decision.replicas, decision.reason)
    };
    assert_eq!(idle(1, 0), (2, Reason::ReportsMissing));
    assert_eq!(idle(0, 1), (2, Reason::ReplicasDraining));
    assert_eq!(idle(0, 0), (0, Reason::ScaledToZero));
    // It was idle for long enough, and in the last second a gateway tells nothing.
    let mut service = Service::new(2);
    service.replicas.capacity = None;
    service.seconds(898, 0.0);
    let lacking: Vec<Reason> =
        (0..9).map(|_| service.second(|at| Report { missing: 1, ..report(at, 0.0) }).reason).collect();
    assert_eq!(lacking, [Reason::ReportsMissing; 9]);
}

#[test]
fn the_users_bounds_hold_at_once() {
    let mut service = Service::new(8);
    service.seconds(10, 5.0);
    service.policy.max_replicas = 3;
    let decision = service.seconds(1, 5.0);
    assert_eq!((decision.replicas, decision.reason), (3, Reason::MaxReplicas));
    service.policy = Policy { min_replicas: 6, ..POLICY };
    let decision = service.seconds(1, 0.1);
    assert_eq!((decision.replicas, decision.reason), (6, Reason::MinReplicas));
}

#[test]
fn more_load_never_asks_for_less() {
    let mut random = Random(1);
    for case in 0..2000 {
        let (mut less, mut more) = (Window::default(), Window::default());
        let times = 1.0 + random.uniform() * 3.0;
        let seconds = 1 + random.below(118) as Seconds;
        for at in START..START + seconds {
            let load = random.uniform() * 8.0;
            let waiting = random.choose(&[0.0, 0.0, 3.0, 50.0]);
            let of = |times: f64| Report { waiting: waiting * times, ..report(at, load * times) };
            less.push(of(1.0));
            more.push(of(times));
        }
        let replicas = settled(random.below(20) as u32);
        let now = START + seconds - 1;
        let [less, more] =
            [less, more].map(|window| decide(&POLICY, &window, &Memory::default(), &replicas, now));
        assert!(less.replicas <= more.replicas, "{case}: {} | {}", less.message, more.message);
    }
}

#[test]
fn a_constant_load_with_noise_keeps_its_replicas() {
    let mut random = Random(2);
    for case in 0..40 {
        let load = 0.2 + random.uniform() * 12.0;
        let mut service = Service::new(1);
        let mut asked = Vec::new();
        for _ in 0..5400 {
            let noise = 0.9 + 0.2 * random.uniform();
            asked.push(service.second(|at| report(at, load * noise)).replicas);
        }
        // Once more, where the load is all but on the next replica's threshold, and never back.
        let (first, last) = (asked[900], asked[5399]);
        assert!(asked[900..].is_sorted() && last - first <= 1, "{case}: {load} from {first} to {last}");
        let share = load / f64::from(first);
        assert!((0.5..=0.71).contains(&share) || first <= 3, "{case}: {load} on {first}");
    }
}

#[test]
fn whatever_is_told_the_bounds_hold() {
    let mut random = Random(3);
    let numbers =
        [0.0, -0.0, 1.0, 1e3, -5.0, 1e300, -1e300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e-300];
    let times = [i64::MIN, i64::MIN + 1, -1, 0, 1, START, i64::MAX - 1, i64::MAX];
    for _ in 0..5000 {
        let mut window = Window::default();
        let base = random.choose(&times);
        for _ in 0..random.below(40) {
            let at = match random.below(4) {
                0 => random.choose(&times),
                _ => base.saturating_add(random.below(80) as i64),
            };
            let mut number = || random.choose(&numbers);
            window.push(Report {
                at,
                arrived: number(),
                finished: number(),
                prompt: number(),
                generation: number(),
                running: number(),
                waiting: number(),
                held: number(),
                missing: random.below(2) as u32,
            });
        }
        let policy = Policy {
            min_replicas: random.choose(&[0, 1, 3, u32::MAX]),
            max_replicas: random.choose(&[0, 1, 10, u32::MAX]),
            target_throughput_percent: random.choose(&[0, 1, 70, 100, u32::MAX]),
            scale_down_after: random.choose(&times),
            scale_to_zero_after: random.choose(&[None, Some(0), Some(i64::MIN), Some(i64::MAX), Some(60)]),
        };
        let replicas = Replicas {
            asked: random.choose(&[0, 1, 5, u32::MAX]),
            ready: random.choose(&[0, 1, 5, u32::MAX]),
            draining: random.choose(&[0, 1]),
            start_up: random.choose(&times),
            capacity: random.choose(&[None, Some(CAPACITY)]).map(|_| Capacity {
                prompt: random.choose(&numbers),
                generation: random.choose(&[1.0, 1000.0, f64::NAN, 0.0, 1e300]),
                sequences: random.choose(&[0, 1, u32::MAX]),
            }),
        };
        let peak = Peak { at: random.choose(&times), replicas: random.choose(&[0, 5, u32::MAX]) };
        let memory = Memory {
            seen: random.choose(&[None, Some(base), Some(i64::MAX), Some(i64::MIN)]),
            since: random.choose(&times),
            busy: random.choose(&times),
            peaks: vec![peak; random.below(3) as usize],
            raised: random.choose(&[None, Some(peak)]),
            prompt_done: random.bits(),
            generation_done: random.bits(),
            requests_done: random.bits(),
        };
        let now = random.choose(&[base, base.saturating_add(60), i64::MIN, i64::MAX]);
        let decision = decide(&policy, &window, &memory, &replicas, now);
        let (least, most) = (policy.min_replicas, policy.max_replicas.max(policy.min_replicas).max(1));
        assert!((least..=most).contains(&decision.replicas), "{policy:?} {decision:?}");
        assert!(!decision.message.is_empty() && decision.memory.peaks.len() <= 12, "{decision:?}");
    }
}

#[test]
fn a_clock_that_jumps_gives_nothing_back() {
    let mut random = Random(4);
    for _ in 0..60 {
        let mut service = Service::new(1);
        service.seconds(700, 3.0);
        let before = service.replicas.asked;
        for _ in 0..5 {
            let far = random.choose(&[1, 3, 10, 59, 61, 119, 121, 300, 3600, 864_000]);
            service.now += if random.below(2) == 0 { far } else { -far };
            for second in 0..random.below(400) {
                let decision = service.second(|at| report(at, 3.0));
                assert_eq!(decision.replicas, before, "{second} s after {far}: {}", decision.message);
            }
        }
    }
}

#[test]
fn a_clock_that_jumps_ends_no_quiet_window() {
    for far in [-864_000, -3600, -61, 61, 3600, 864_000] {
        let mut service = Service::new(1);
        service.seconds(400, 5.0);
        service.seconds(200, 1.0);
        service.now += far;
        let kept = (0..1000).take_while(|_| service.second(|at| report(at, 1.0)).replicas == 8).count();
        // Set back, ages stay; set forward, what was between is not known.
        assert!((95..=310).contains(&kept), "{far}: {kept}");
    }
}

#[test]
fn late_or_missing_reports_give_nothing_back() {
    let mut random = Random(5);
    for _ in 0..200 {
        let mut service = Service::new(1);
        service.seconds(400, 5.0);
        service.seconds(random.below(300) as u32 + 1, 0.5);
        let before = service.replicas.asked;
        let late = random.below(2) == 0;
        for _ in 0..2000 {
            let decision = match late {
                true => {
                    service.now += 1;
                    service.decide()
                }
                false => service.second(|at| Report { missing: 1, ..report(at, 0.0) }),
            };
            assert_eq!(decision.replicas, before, "{}", decision.message);
        }
        let reason = service.decide().reason;
        assert_eq!(reason, if late { Reason::ReportsLate } else { Reason::ReportsMissing });
        // The window begins anew, and the service does not sleep before it was seen idle for long enough.
        let kept = (0..1000).take_while(|_| service.second(|at| report(at, 0.0)).replicas == before).count();
        assert!(kept >= 290, "{kept}");
    }
}

#[test]
fn a_report_that_is_late_by_seconds_counts_as_if_it_was_not() {
    let (mut prompt, mut tardy) = (Service::new(1), Service::new(1));
    for second in 0..1200 {
        let load = if second < 400 { 5.0 } else { 1.0 };
        prompt.second(|at| report(at, load));
        // Every third report is three seconds late.
        tardy.now += 1;
        for back in [3, 0] {
            let at = tardy.now - back;
            if (at % 3 == 0) == (back == 3) && at > START {
                let load = if second - back < 400 { 5.0 } else { 1.0 };
                tardy.window.push(report(at, load));
            }
        }
        tardy.decide();
    }
    assert_eq!(tardy.replicas.asked, prompt.replicas.asked);
    assert_eq!(tardy.memory.since, prompt.memory.since);
}

#[test]
fn a_restart_changes_no_decision() {
    let mut random = Random(6);
    for _ in 0..20 {
        let (mut steady, mut restarted) = (Service::new(1), Service::new(1));
        let (mut written, mut at_write) = (String::new(), 0);
        let mut load = 2.0;
        for second in 0..3000 {
            if random.below(200) == 0 {
                load = random.choose(&[0.0, 0.5, 2.0, 6.0]);
            }
            let seen = |at| report(at, load * 0.9);
            let expected = steady.second(seen);
            // All that outlives a restart: reports in the gateways, and what was last written.
            if second > 0 && random.below(30) == 0 {
                restarted.memory = serde_json::from_str(&written).unwrap();
            }
            let before = restarted.replicas.asked;
            let decision = restarted.second(seen);
            assert_eq!(decision.replicas, expected.replicas, "{second}: {}", decision.message);
            if decision.replicas != before || second - at_write >= REPLAY || second == 0 {
                written = serde_json::to_string(&decision.memory).unwrap();
                at_write = second;
            }
        }
        assert!(written.len() < 1000, "{} bytes", written.len());
    }
}

#[test]
fn what_is_remembered_has_bounded_room_whatever_the_window_becomes() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut service = Service::new(3);
        for second in 0..400 {
            if second % 20 == 0 {
                service.policy.scale_down_after = random.choose(&[1, 9, 10, 11, 15, 19, 60, 300, 100_000]);
                service.replicas.start_up = random.choose(&[0, 5, 23, 400]);
            }
            let load = random.uniform() * 5.0;
            service.second(|at| report(at, load));
            assert!(service.memory.peaks.len() <= MAX_PEAKS, "{seed} {second}: {:?}", service.memory.peaks);
        }
    }
}

#[test]
fn peaks_that_are_joined_are_remembered_as_long_as_the_newest_of_them() {
    let mut service = Service::new(9);
    service.policy.scale_down_after = 20;
    // Nine replicas' load in the first part alone, of a window whose parts are short.
    service.seconds(2, 6.0);
    service.seconds(18, 0.5);
    service.policy.scale_down_after = 300;
    for second in 0..270 {
        let decision = service.seconds(1, 0.5);
        assert_eq!(decision.replicas, 9, "{second}: {:?}", service.memory.peaks);
    }
}

#[test]
fn requests_that_are_refused_do_not_hide_the_load() {
    let mut service = Service::new(1);
    // One replica does what it can, and nine tenths of what comes are sent away at once.
    for _ in 0..20 {
        service.second(|at| Report { arrived: 10.0 * REQUESTS, ..report(at, 1.0) });
    }
    assert!(service.replicas.asked >= 10, "{:?}", service.replicas);
}
