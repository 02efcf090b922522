//! What a service has to do, in replicas.
use super::{Capacity, LATE_AFTER, Memory, Policy, Reason, Replicas, Report, Seconds, Window};

/// Seconds that a steady load is averaged over.
const STEADY: Seconds = 60;
/// Shorter looks at what arrives, for a load that jumps.
const LOOKS: [Seconds; 5] = [1, 2, 4, 8, 16];
/// Standard deviations by which a short look must be above chance to be believed.
const CERTAIN: f64 = 2.0;
/// Fewer reports than this are no average.
const FEW: usize = 16;
/// Seconds in which what waits should be caught up with.
const CATCH_UP: f64 = 15.0;
/// Replicas that are asked for to catch up, for each that is asked for to keep up.
const MOST_BEHIND: f64 = 4.0;
/// Seconds in which there is something for every sequence and requests wait, before replicas are thought to do what they can.
const SATURATED: Seconds = 4;
/// Share by which the load must be below what fewer replicas take before they are few enough.
const MARGIN: f64 = 0.1;
/// Tokens a second that a replica can have measured.
const SPEEDS: std::ops::RangeInclusive<f64> = 1e-3..=1e12;

/// A load, and what it was computed from.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    /// Newest report; `None`: there is none.
    pub newest: Option<Report>,
    /// Requests a second that come, as far as chance lets it be believed.
    pub arriving: f64,
    /// Replicas that what flows keeps busy.
    pub flowing: f64,
    /// Replicas that what comes keeps busy; `None`: the work of a request is not known yet.
    pub offered: Option<f64>,
    /// Replicas that what waits would keep busy until it is caught up with.
    pub behind: f64,
    /// Replicas that would decode what is in flight at once, if nothing more is known.
    pub slots: f64,
    /// Whether a capacity was measured.
    pub measured: bool,
    /// Whether the newest report lacks a gateway.
    pub missing: bool,
}

/// The load at the newest report up to `now`.
pub(super) fn at(window: &Window, memory: &Memory, replicas: &Replicas, now: Seconds) -> Load {
    let Some(newest) = window.newest(now) else { return Load::default() };
    let reports = window.last(STEADY, newest.at);
    let arriving = arriving(window, reports, newest.at);
    let Some(capacity) = replicas.capacity.filter(Capacity::is_usable) else {
        return Load { newest: Some(*newest), arriving, missing: newest.missing > 0, ..Load::default() };
    };
    let work = memory.work(&capacity);
    let waits = newest.waiting + newest.held;
    Load {
        newest: Some(*newest),
        arriving,
        flowing: mean(reports, |report| capacity.busy(report))
            .max(saturated(window, &capacity, replicas, newest.at)),
        offered: work.map(|work| arriving * work),
        behind: waits * work.unwrap_or_default() / CATCH_UP,
        slots: (newest.running + waits) / f64::from(capacity.sequences.max(1)),
        measured: true,
        missing: newest.missing > 0,
    }
}

/// The replicas that are ready, where they can do no more: what flows is their capacity then, even where more was measured. A figure
/// that was measured in quiet may be twice what clients find, and would be corrected in a minute.
fn saturated(window: &Window, capacity: &Capacity, replicas: &Replicas, at: Seconds) -> f64 {
    let sequences = f64::from(replicas.ready) * f64::from(capacity.sequences);
    // Which of them run is a replica's word of a moment between two steps; how many there are is counted. Where fewer run than there
    // are sequences and others wait behind them, the room for tokens is full.
    let full = |report: &Report| report.waiting >= 1.0 && report.running + report.waiting >= sequences;
    let last = window.last(SATURATED, at);
    let is = sequences > 0.0 && last.len() as Seconds == SATURATED && last.iter().all(full);
    if is { f64::from(replicas.ready) } else { 0.0 }
}

/// The mean of a minute; or, where it is more, what a shorter look shows for certain: its count less [`CERTAIN`] standard
/// deviations. So a jump is seen in its first second, and chance is not taken for one.
fn arriving(window: &Window, minute: &[Report], at: Seconds) -> f64 {
    let spread = dispersion(minute);
    let least = |reports: &[Report]| {
        let count: f64 = reports.iter().map(|report| report.arrived).sum();
        (count - CERTAIN * (spread * count).sqrt()).max(0.0) / reports.len().max(1) as f64
    };
    let steady = if minute.len() < FEW { least(minute) } else { mean(minute, |report| report.arrived) };
    LOOKS.iter().map(|&seconds| least(window.last(seconds, at))).fold(steady, f64::max)
}

/// Variance over mean of the requests of a second: 1 where each comes by itself (Poisson), more where they come in clumps. From
/// the differences of neighbours (von Neumann), so that a load that changes is not taken for a clump.
fn dispersion(reports: &[Report]) -> f64 {
    let pairs = reports.windows(2).map(|pair| (pair[1].arrived - pair[0].arrived).powi(2));
    let variance = pairs.sum::<f64>() / 2.0 / reports.len().saturating_sub(1).max(1) as f64;
    (variance / mean(reports, |report| report.arrived).max(1e-9)).max(1.0)
}

fn mean(reports: &[Report], of: impl Fn(&Report) -> f64) -> f64 {
    reports.iter().map(of).sum::<f64>() / reports.len().max(1) as f64
}

impl Load {
    /// Whether nothing was heard lately.
    pub fn is_late(&self, now: Seconds) -> bool {
        self.newest.is_none_or(|newest| now.saturating_sub(newest.at) > LATE_AFTER)
    }

    /// Whether somebody asks, or waits for an answer.
    pub fn is_awake(&self) -> bool {
        self.in_flight() > 0.0 || self.newest.is_some_and(|newest| newest.arrived > 0.0)
    }

    /// Requests that somebody waits for.
    pub fn in_flight(&self) -> f64 {
        self.newest.map_or(0.0, |newest| newest.running + newest.waiting + newest.held)
    }

    /// Replicas that would be on target; `None`: no capacity was measured. Not bounded by the policy.
    pub fn wanted(&self, policy: &Policy) -> Option<u32> {
        self.measured.then(|| self.with_margin(policy, 0.0))
    }

    /// Replicas that fewer than now must not go below, with room for what is no change but noise.
    pub fn kept(&self, policy: &Policy) -> Option<u32> {
        self.measured.then(|| self.with_margin(policy, MARGIN))
    }

    /// Replicas that what is in flight needs at once: those that go must not leave their queue to the others.
    pub fn least(&self, replicas: &Replicas) -> u32 {
        if replicas.ready == 0 { replicas.asked } else { whole(self.slots) }
    }

    /// Why more are wanted.
    pub fn why(&self, policy: &Policy) -> Reason {
        if self.total() > self.rate() / policy.target() {
            Reason::RequestsWaiting
        } else {
            Reason::ThroughputAboveTarget
        }
    }

    /// Replicas' worth of work, all in all.
    pub fn total(&self) -> f64 {
        self.rate() + self.catching_up(self.rate())
    }

    fn rate(&self) -> f64 {
        // Before the first answers nothing is known of a request's work: then one slot a request.
        self.flowing.max(self.offered.unwrap_or(self.slots))
    }

    /// Enough to be on target, and enough to catch up.
    fn with_margin(&self, policy: &Policy, margin: f64) -> u32 {
        let rate = self.rate() * (1.0 + margin);
        whole(rate / policy.target()).max(whole(rate + self.catching_up(rate)))
    }

    /// While replicas start, a queue grows that they will work off. Asking each second for more of them would be a storm, so what
    /// waits counts for no more than [`MOST_BEHIND`] times what comes.
    fn catching_up(&self, rate: f64) -> f64 {
        self.behind.min(MOST_BEHIND * rate)
    }
}

impl Capacity {
    /// Replicas that the tokens of a report keep busy for its second.
    pub(super) fn busy(&self, report: &Report) -> f64 {
        report.prompt / self.prompt + report.generation / self.generation
    }

    pub(super) fn is_usable(&self) -> bool {
        [self.prompt, self.generation].iter().all(|rate| SPEEDS.contains(rate))
    }
}

/// The next whole number; what floating point adds to a whole one is none.
fn whole(number: f64) -> u32 {
    // `as` takes what is too large for the largest, and what is no number for 0.
    (number - 1e-9).ceil() as u32
}
