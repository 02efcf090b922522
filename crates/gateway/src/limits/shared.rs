//! Several replicas and their clients, simulated: what all of them admit together keeps the bounds that are promised.
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rstest::rstest;

use super::*;
use crate::counts::Data;

/// Seconds until what one admitted is known to all: two of the longest pauses.
const DELAY: f64 = 30.0;
const LIMITS: Limits = Limits { requests: Some(60), tokens: Some(6000), month: None };
/// Tokens of the largest request.
const LARGEST: u64 = 400;

/// Replicas, and the ConfigMap between them.
struct Gateway {
    start: Instant,
    millis: u64,
    replicas: Vec<Quotas>,
    /// When each exchanges next.
    next: Vec<u64>,
    data: Data,
    random: StdRng,
    key: Arc<str>,
}

/// What was admitted: when in seconds, by which replica, how many tokens.
type Admitted = Vec<(f64, usize, u64)>;

impl Gateway {
    fn new(replicas: usize, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let next = (0..replicas).map(|_| random.random_range(0..15_000)).collect();
        let replicas = (0..replicas).map(|_| Quotas::default()).collect();
        let (start, data) = (Instant::now(), Data::new());
        let mut gateway = Self { start, millis: 0, replicas, next, data, random, key: "k".into() };
        // None is ready before it has heard of the others.
        for at in 0..gateway.replicas.len() {
            gateway.exchange(at);
        }
        gateway
    }

    fn now(&self) -> Now {
        let passed = Duration::from_millis(self.millis);
        let noon: Timestamp = "2026-11-27T12:00:00Z".parse().unwrap();
        Now { instant: self.start + passed, time: noon + passed }
    }

    fn exchange(&mut self, at: usize) {
        let (quotas, now, page) = (&self.replicas[at], self.now(), Page::read(&self.data));
        quotas.are_shared_by(self.replicas.len() as u32);
        quotas.hear(&page, now.instant);
        if let Some(told) = quotas.tell() {
            self.data = page.with(&self.data, &told, Month::of(now.time)).0;
            quotas.was_told();
        }
        quotas.in_touch(now.instant);
    }

    /// A moment later; exchanges happen when they are due.
    fn passes(&mut self, millis: u64) {
        self.millis += millis;
        for at in 0..self.replicas.len() {
            if self.millis >= self.next[at] {
                self.exchange(at);
                self.next[at] = self.millis + self.random.random_range(12_000..=14_500);
            }
        }
    }

    /// One request to a replica: whether it and its tokens are admitted.
    fn ask(&self, at: usize, limits: Limits, tokens: u64) -> (bool, bool) {
        let (quotas, now) = (&self.replicas[at], self.now());
        match quotas.enter(&self.key, limits, now) {
            Ok(month) => (true, quotas.take(&self.key, limits, month, tokens, now).is_ok()),
            Err(_) => (false, false),
        }
    }

    fn seconds(&self) -> f64 {
        self.millis as f64 / 1000.0
    }
}

/// The most that was admitted in any time beyond what fills in that time, of `limit` a minute.
fn burst(admitted: &Admitted, limit: f64, counted: impl Fn(u64) -> f64) -> f64 {
    let (mut total, mut lowest, mut most) = (0.0_f64, f64::MAX, 0.0_f64);
    for (at, _, tokens) in admitted {
        lowest = lowest.min(total - limit * at / 60.0);
        total += counted(*tokens);
        most = most.max(total - limit * at / 60.0 - lowest);
    }
    most
}

fn bound(limit: f64, replicas: usize, largest: f64) -> f64 {
    let replicas = replicas as f64;
    let delayed = if replicas > 1.0 { replicas * DELAY / 60.0 } else { 0.0 };
    limit * (1.0 + delayed) + replicas * largest
}

/// Clients come and go at each replica, or move from one to the next together, or come everywhere at once after silence.
#[rstest]
fn all_replicas_together_keep_the_bound_of_a_minute(#[values(1, 2, 3, 5, 10)] replicas: usize) {
    for seed in 0..12 {
        let mut gateway = Gateway::new(replicas, seed);
        let mut busy = vec![false; replicas];
        let (mut requests, mut tokens) = (Admitted::new(), Admitted::new());
        while gateway.seconds() < 900.0 {
            let step = gateway.random.random_range(20..800);
            gateway.passes(step);
            if gateway.random.random_bool(0.03) {
                match seed % 3 {
                    0 => {
                        let at = gateway.random.random_range(0..replicas);
                        busy[at] = !busy[at];
                    }
                    1 => {
                        busy.fill(false);
                        busy[gateway.random.random_range(0..replicas)] = true;
                    }
                    _ => busy.fill(gateway.random.random_bool(0.4)),
                }
            }
            for at in (0..replicas).filter(|at| busy[*at]) {
                for _ in 0..gateway.random.random_range(1..6) {
                    let asked = gateway.random.random_range(1..=LARGEST);
                    let (entered, taken) = gateway.ask(at, LIMITS, asked);
                    requests.extend(entered.then_some((gateway.seconds(), at, 1)));
                    tokens.extend(taken.then_some((gateway.seconds(), at, asked)));
                }
            }
        }
        let most = burst(&requests, 60.0, |_| 1.0);
        assert!(most <= bound(60.0, replicas, 1.0), "seed {seed}: {most} requests");
        let most = burst(&tokens, 6000.0, |tokens| tokens as f64);
        assert!(most <= bound(6000.0, replicas, LARGEST as f64), "seed {seed}: {most} tokens");
    }
}

/// Ten minutes of requests to these replicas, as many as they take; how many each admitted after the first two.
fn admitted(replicas: usize, asked: &[usize]) -> Vec<f64> {
    let mut gateway = Gateway::new(replicas, 7);
    let mut counts = vec![0.0; replicas];
    while gateway.seconds() < 720.0 {
        gateway.passes(200);
        for at in asked {
            if gateway.ask(*at, Limits { tokens: None, ..LIMITS }, 1).0 && gateway.seconds() > 120.0 {
                counts[*at] += 1.0;
            }
        }
    }
    counts
}

#[rstest]
#[case::alone(1)]
#[case::of_two(2)]
#[case::of_five(5)]
fn a_client_at_one_replica_has_all_of_its_limit(#[case] replicas: usize) {
    let counts = admitted(replicas, &[0]);
    assert!((595.0..=605.0).contains(&counts[0]), "{counts:?}");
}

#[rstest]
#[case::two(2)]
#[case::five(5)]
fn where_all_replicas_are_asked_each_admits_a_part(#[case] replicas: usize) {
    let asked: Vec<usize> = (0..replicas).collect();
    let counts = admitted(replicas, &asked);
    let total: f64 = counts.iter().sum();
    assert!((480.0..=660.0).contains(&total), "{counts:?}");
    let share = total / replicas as f64;
    assert!(counts.iter().all(|count| (0.5 * share..=1.5 * share).contains(count)), "{counts:?}");
}

#[rstest]
fn a_months_budget_is_exceeded_by_what_is_not_known_yet_alone(#[values(1, 2, 5)] replicas: usize) {
    const BUDGET: u64 = 100_000;
    for seed in 0..10 {
        let mut gateway = Gateway::new(replicas, seed);
        let limits = Limits { month: Some(BUDGET), requests: None, ..LIMITS };
        let mut taken = Admitted::new();
        while gateway.seconds() < 1500.0 {
            gateway.passes(300);
            let (at, asked) =
                (gateway.random.random_range(0..replicas), gateway.random.random_range(1..=LARGEST));
            taken.extend(gateway.ask(at, limits, asked).1.then_some((gateway.seconds(), at, asked)));
        }
        let total: u64 = taken.iter().map(|(_, _, tokens)| tokens).sum();
        let last = taken.last().map_or(0.0, |(at, ..)| *at);
        let unknown: u64 =
            taken.iter().filter(|(at, ..)| *at > last - DELAY).map(|(.., tokens)| tokens).sum();
        let over = if replicas > 1 { unknown } else { 0 };
        assert!(total > BUDGET - LARGEST && total <= BUDGET + over, "seed {seed}: {total}, {unknown}");
        // Nobody admits anything once all know.
        gateway.passes(60_000);
        gateway.passes(60_000);
        assert!((0..replicas).all(|at| !gateway.ask(at, limits, LARGEST).1), "seed {seed}");
    }
}
