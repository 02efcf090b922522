use std::collections::HashMap;

use lathe_contract::{Flow, ReplicaCapacity, Usage};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;
use crate::account::By;
use crate::balance::Balances;
use crate::hold::HoldBounds;
use crate::metrics::{Metrics, Times};
use crate::testing::service;

fn flows() -> (Flows, Instant) {
    let start = Instant::now();
    (Flows::new("one".into(), start), start)
}

fn usage(prompt: u64, completion: u64) -> Usage {
    Usage { prompt, completion, cached: 0 }
}

fn nothing(_: &str) -> Standing {
    Standing::default()
}

fn told(flows: &Flows, after: u64) -> HashMap<String, Vec<Flow>> {
    flows.since(after, &HashMap::new()).services.into_iter().map(|s| (s.uid, s.seconds)).collect()
}

#[test]
fn a_second_has_what_was_counted_in_it_and_what_stands_at_its_end() {
    let (flows, start) = flows();
    let at = |millis| start + Duration::from_millis(millis);
    let mut share = Share::of(flows.of("s"));
    // What came from the replica's cache was not read.
    share.took(Usage { cached: 5, ..usage(15, 1) });
    assert!(told(&flows, 0).is_empty(), "the second is not over");
    flows.close(at(999), nothing);
    assert!(told(&flows, 0).is_empty());
    let stands = |_: &str| Standing { running: 0.5, waiting: 0.5, held: 2 };
    flows.close(at(1000), stands);
    drop(share);
    // The ticker was late: what was counted is of the first of three seconds, what stands of all.
    flows.close(at(4200), stands);
    let still = Flow { running: 0.5, waiting: 0.5, held: 2, ..Flow::default() };
    let first = Flow { arrived: 1, prompt: 10, generation: 1, ..still };
    let second = Flow { finished: 1, ..still };
    assert_eq!(told(&flows, 0), [("s".to_owned(), vec![first, second, still, still])].into());
    assert_eq!(told(&flows, 2), [("s".to_owned(), vec![still, still])].into());
    assert!(told(&flows, 4).is_empty());
    assert!(told(&flows, 9).is_empty(), "nobody can know what is to come");
    let traffic = flows.since(4, &[("s".to_owned(), 3)].into());
    assert_eq!((traffic.second, traffic.instance.as_str()), (4, "one"));
    assert_eq!((traffic.services[0].held, traffic.services[0].seconds.len()), (3, 0));
}

#[test]
fn an_estimate_that_was_too_high_is_taken_from_what_comes_and_no_second_is_below_nothing() {
    let (flows, start) = flows();
    let mut at = 0;
    let mut close = || {
        at += 1;
        flows.close(start + at * SECOND, nothing);
    };
    let mut share = Share::of(flows.of("s"));
    share.took(usage(100, 50));
    close();
    share.took(usage(40, 50));
    close();
    let mut next = Share::of(flows.of("s"));
    next.took(usage(70, 0));
    close();
    let prompts: Vec<_> = told(&flows, 0)["s"].iter().map(|flow| flow.prompt).collect();
    assert_eq!(prompts, [100, 0, 10]);
}

#[test]
fn what_a_replica_can_do_is_told_while_it_is_fresh() {
    let (flows, start) = flows();
    let open = Share::of(flows.of("s"));
    let told =
        |flows: &Flows| flows.since(0, &HashMap::new()).services[0].capacity.map(|told| told.sequences);
    open.hears(ReplicaCapacity { prompt: 1.0, generation: 1.0, sequences: 4 });
    let seconds: Vec<_> = (1..=7)
        .map(|second| {
            flows.close(start + second * SECOND, nothing);
            told(&flows)
        })
        .collect();
    // It may be of a replica that is gone.
    assert_eq!(seconds, [Some(4), Some(4), Some(4), Some(4), Some(4), None, None]);
    open.hears(ReplicaCapacity { prompt: 1.0, generation: 1.0, sequences: 8 });
    flows.close(start + 8 * SECOND, nothing);
    assert_eq!(told(&flows), Some(8));
}

#[test]
fn seconds_are_kept_for_two_minutes_and_a_service_without_traffic_is_not_kept_at_all() {
    let (flows, start) = flows();
    for uid in 0..10_000 {
        drop(Share::of(flows.of(&uid.to_string())));
    }
    flows.close(start + SECOND, nothing);
    let is_kept = || flows.lock().get("7").map(|service| !service.seconds.are_silent_after(0));
    assert_eq!(is_kept(), Some(true));
    flows.close(start + 120 * SECOND, nothing);
    assert_eq!(is_kept(), Some(true));
    flows.close(start + 121 * SECOND, nothing);
    assert_eq!(is_kept(), None);
    assert!(flows.lock().is_empty());
    // One with a request open stays, and goes with its service.
    let _open = Share::of(flows.of("open"));
    flows.close(start + 500 * SECOND, nothing);
    flows.close(start + 900 * SECOND, nothing);
    assert_eq!(flows.lock().len(), 1);
    flows.keep(|_| false);
    assert!(flows.lock().is_empty());
}

#[test]
fn the_longest_answer_fits_a_report() {
    let (flows, start) = flows();
    let uid = |n: u64| format!("{n:036}");
    for n in 0..3000 {
        flows.of(&uid(n)).can(ReplicaCapacity { prompt: 1.0 / 3.0, generation: 1.0 / 3.0, sequences: 1024 });
    }
    for second in 1..=120 {
        for n in 0..3000 {
            Share::of(flows.of(&uid(n))).took(usage(1_000_000, 1_000_000));
        }
        let stands = |_: &str| Standing { running: 100.0 / 3.0, waiting: 200.0 / 3.0, held: 128 };
        flows.close(start + second * SECOND, stands);
    }
    let traffic = flows.since(0, &HashMap::new());
    let bytes = serde_json::to_vec(&traffic).unwrap();
    assert!(bytes.len() <= MAX_TRAFFIC_BYTES, "{} bytes", bytes.len());
    assert_eq!(traffic.services.len(), 3000);
    assert!(traffic.services.iter().all(|s| (40..120).contains(&s.seconds.len())), "the oldest are left out");
}

/// Whatever the order in which requests come, are estimated, corrected and end, and whenever seconds are closed.
#[test]
fn nothing_is_lost_and_nothing_is_counted_twice() {
    for seed in 0..200 {
        let mut random = StdRng::seed_from_u64(seed);
        let (flows, start) = flows();
        let (mut open, mut now, mut known) = (Vec::new(), start, 0);
        let (mut arrived, mut finished, mut used) = (0, 0, Usage::default());
        let mut sum = Flow::default();
        let mut read = |flows: &Flows| {
            let traffic = flows.since(known, &HashMap::new());
            for flow in traffic.services.into_iter().flat_map(|service| service.seconds) {
                sum.arrived += flow.arrived;
                sum.finished += flow.finished;
                sum.prompt += flow.prompt;
                sum.generation += flow.generation;
            }
            known = traffic.second;
        };
        for _ in 0..300 {
            match random.random_range(0..6) {
                0 => {
                    arrived += 1;
                    open.push((Share::of(flows.of("s")), Usage::default()));
                }
                1 if !open.is_empty() => {
                    let (share, took) = open.swap_remove(random.random_range(0..open.len()));
                    finished += u64::from(took != Usage::default());
                    used = usage(used.prompt + took.prompt, used.completion + took.completion);
                    drop(share);
                }
                2..4 if !open.is_empty() => {
                    let at = random.random_range(0..open.len());
                    let now = usage(random.random_range(0..100), random.random_range(0..100));
                    open[at].0.took(now);
                    open[at].1 = now;
                }
                _ => {
                    now += Duration::from_millis(random.random_range(0..1700));
                    flows.close(now, nothing);
                    read(&flows);
                }
            }
        }
        for (share, took) in open.drain(..) {
            finished += u64::from(took != Usage::default());
            used = usage(used.prompt + took.prompt, used.completion + took.completion);
            drop(share);
        }
        // Enough comes for all that was told too early to be taken back.
        let mut last = Share::of(flows.of("s"));
        last.took(usage(100_000, 100_000));
        drop(last);
        flows.close(now + 2 * SECOND, nothing);
        read(&flows);
        assert_eq!((sum.arrived, sum.finished), (arrived + 1, finished + 1), "seed {seed}");
        assert_eq!(
            (sum.prompt, sum.generation),
            (used.prompt + 100_000, used.completion + 100_000),
            "seed {seed}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn numbers_of_a_request_that_ends_after_its_service_go_too() {
    let metrics = Arc::new(Metrics::default());
    let books = Arc::new(Books {
        balances: Balances::default(),
        quotas: Arc::default(),
        flows: Flows::default(),
        metrics: Arc::clone(&metrics),
        usage_log: false,
    });
    let services = [service("a", "gone", &[], &["gone"]), service("a", "there", &[], &["there"])];
    let before = Table::build(8080, &services, &[]);
    let (_sender, table) = watch::channel(Some(Arc::new(Table::build(8080, &services[1..], &[]))));
    let bounds = HoldBounds { requests: 1, bytes: 1, time: SECOND };
    let mut tasks = Tasks::new();
    follow(&mut tasks, books, Holds::new(bounds, table.clone(), Arc::clone(&metrics)), table);
    let times = Times { first_byte: None, total: SECOND };
    for name in ["gone", "there"] {
        metrics.answered("k", before.get("a", name).unwrap(), (200, By::Replica), None, times);
    }
    let is_told = |name: &str| metrics.text().unwrap().contains(&format!(r#"model="{name}""#));
    assert!(is_told("gone"));
    tokio::time::sleep(TIDY + 2 * SECOND).await;
    assert_eq!((is_told("gone"), is_told("there")), (false, true));
}
