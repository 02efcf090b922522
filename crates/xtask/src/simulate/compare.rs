//! Every scaler on a trace at equal replica-hours.
use lathe_scaling::Policy;

use super::replica::Server;
use super::scalers::{DEFAULTS, Hpa, Informed, Keda, Knative, Lathe, Scaler};
use super::service::{self, Outcome};
use super::trace::Trace;

/// Seconds from asking for a replica to its first request.
pub const START_UPS: [i64; 3] = [5, 60, 300];
/// Targets that are tried, as shares of a replica's capacity.
const TARGETS: (f64, f64) = (0.1, 1.2);
/// Halvings of that span, at most.
const HALVINGS: usize = 8;
/// Replica-hours that differ by less are equal.
const EQUAL: f64 = 0.005;
/// The same where the targets that are tried come no nearer.
const NEARLY_EQUAL: f64 = 0.025;
/// Seconds of less load before a scaler goes down, each tried: its default and others.
const WINDOWS: [i64; 3] = [60, 300, 600];
/// A share of late requests below which nobody's is worth a comparison.
const FEW: f64 = 0.001;

/// A scaler's run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its name.
    pub name: &'static str,
    /// Its target and window, in words.
    pub settings: String,
    /// What came of it.
    pub outcome: Outcome,
}

/// All runs of a trace with one start-up time.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Seconds from asking for a replica to its first request.
    pub start_up: i64,
    /// Lathe with its defaults: its replica-hours are everybody's.
    pub defaults: Run,
    /// Lathe with the settings that have the fewest late requests at these replica-hours.
    pub lathe: Run,
    /// The others, likewise.
    pub peers: Vec<Run>,
    /// What knows the load of each second, likewise.
    pub informed: Run,
}

/// What the comparison says of the goal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Hardly anything is late, here and with the best other.
    NothingLate,
    /// At most half as much is late.
    Reached,
    /// More is.
    Missed,
}

impl Comparison {
    /// Every run, ours first.
    pub fn runs(&self) -> impl Iterator<Item = &Run> {
        [&self.defaults, &self.lathe].into_iter().chain(&self.peers).chain([&self.informed])
    }

    /// The peer with the fewest late requests.
    pub fn best(&self) -> &Run {
        self.peers.iter().min_by_key(|run| run.outcome.late).unwrap_or(&self.defaults)
    }

    /// Whether at most half as many requests are late as with the best other.
    pub fn goal(&self) -> Goal {
        let (ours, best) = (&self.lathe.outcome, &self.best().outcome);
        match ours.late_share().max(best.late_share()) {
            share if share < FEW => Goal::NothingLate,
            _ if ours.late * 2 <= best.late => Goal::Reached,
            _ => Goal::Missed,
        }
    }
}

/// Runs Lathe with its defaults, and then each scaler, Lathe too, with every window and the target at which it uses as many
/// replica-hours, on every draw of a trace; of these the run with the fewest late requests is taken.
pub fn compare(draws: &[Trace], server: &Server, start_up: i64) -> Comparison {
    let run = |scaler: &dyn Fn() -> Box<dyn Scaler>| {
        let outcomes = draws.iter().map(|trace| service::run(trace, server, start_up, &mut *scaler()));
        outcomes.reduce(Outcome::and).unwrap_or_default()
    };
    let defaults = Run {
        name: "Lathe, defaults",
        settings: settings(0.01 * f64::from(DEFAULTS.target_throughput_percent), DEFAULTS.scale_down_after),
        outcome: run(&|| Box::new(Lathe::new(DEFAULTS))),
    };
    let hours = defaults.outcome.replica_hours;
    let tuned = |name: &'static str, windows: &[i64], scaler: &dyn Fn(f64, i64) -> Box<dyn Scaler>| {
        let tried = windows.iter().map(|&window| {
            let (target, outcome) = equal(hours, |target| run(&|| scaler(target, window)));
            Run { name, settings: settings(target, window), outcome }
        });
        fewest_late(tried.collect(), hours)
    };
    let lathe = tuned("Lathe", &WINDOWS, &|target, window| Box::new(Lathe::new(policy(target, window))));
    let peers = [
        tuned("HPA", &WINDOWS, &|target, window| Box::new(Hpa::new(target, window))),
        tuned("KEDA", &WINDOWS, &|target, window| Box::new(Keda::new(target, window))),
        tuned("Knative", &WINDOWS, &|target, window| Box::new(Knative::new(target, window as usize))),
    ];
    let informed =
        tuned("(informed)", &WINDOWS, &|target, window| Box::new(Informed::new(target, window as usize)));
    let or_defaults = |run: Option<Run>| run.unwrap_or_else(|| defaults.clone());
    Comparison {
        start_up,
        lathe: or_defaults(lathe),
        peers: peers.into_iter().flatten().collect(),
        informed: or_defaults(informed),
        defaults,
    }
}

/// Of those whose replica-hours are as good as equal the run with the fewest late requests, or else the nearest in replica-hours.
fn fewest_late(runs: Vec<Run>, hours: f64) -> Option<Run> {
    let off = |run: &Run| (run.outcome.replica_hours / hours - 1.0).abs();
    let equal = runs.iter().filter(|run| off(run) < NEARLY_EQUAL).min_by_key(|run| run.outcome.late);
    equal.or_else(|| runs.iter().min_by(|a, b| off(a).total_cmp(&off(b)))).cloned()
}

fn policy(target: f64, window: i64) -> Policy {
    let percent = (target * 100.0).round().clamp(1.0, 100.0) as u32;
    Policy { target_throughput_percent: percent, scale_down_after: window, ..DEFAULTS }
}

fn settings(target: f64, window: i64) -> String {
    format!("{:.0} %, {window} s", target * 100.0)
}

/// The target whose run is nearest in replica-hours, among those that halving the span tries: a lower target costs more.
fn equal(hours: f64, run: impl Fn(f64) -> Outcome) -> (f64, Outcome) {
    let off = |outcome: &Outcome| (outcome.replica_hours / hours - 1.0).abs();
    let (mut low, mut high) = TARGETS;
    let mut target = (low * high).sqrt();
    let mut best = (target, run(target));
    let mut costly = best.1.replica_hours > hours;
    for _ in 1..HALVINGS {
        if off(&best.1) < EQUAL {
            break;
        }
        if costly {
            low = target
        } else {
            high = target
        }
        target = (low * high).sqrt();
        let outcome = run(target);
        costly = outcome.replica_hours > hours;
        if off(&outcome) < off(&best.1) {
            best = (target, outcome);
        }
    }
    best
}
