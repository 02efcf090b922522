//! Reports of the last two minutes, one for each second.
use serde::{Deserialize, Serialize};

use super::Seconds;

/// Seconds that are kept: what a load is averaged over, twice.
const KEPT: Seconds = 120;
/// More than any service has; what is told beyond it is a mistake or a lie.
const MOST: f64 = 1e9;

/// What the gateways saw of a service in one second, summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The end of that second, by the clock of the leader that read it.
    pub at: Seconds,
    /// Requests that came, those that were refused for want of room with them.
    pub arrived: f64,
    /// Requests that ended and were worked for; those that were refused are none.
    pub finished: f64,
    /// Prompt tokens that replicas read.
    pub prompt: f64,
    /// Tokens that replicas generated.
    pub generation: f64,
    /// Requests that are being answered at its end.
    pub running: f64,
    /// Requests that wait at a replica.
    pub waiting: f64,
    /// Requests that a gateway holds since no replica is ready.
    pub held: f64,
    /// Gateway replicas of which nothing is known for this second.
    pub missing: u32,
}

/// Reports in the order of their seconds, at most [`KEPT`] seconds from the newest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Window(Vec<Report>);

impl FromIterator<Report> for Window {
    fn from_iter<I: IntoIterator<Item = Report>>(reports: I) -> Self {
        let mut window = Self::default();
        reports.into_iter().for_each(|report| window.push(report));
        window
    }
}

impl Window {
    /// Takes a report; it replaces the one of the same second. Numbers that cannot be count as 0 and the report as incomplete.
    pub fn push(&mut self, report: Report) {
        let report = cleaned(report);
        let at = report.at;
        // A clock that was set back leaves reports of the future, which go too.
        self.0.retain(|kept| kept.at.abs_diff(at) < KEPT as u64 && kept.at != at);
        let place = self.0.partition_point(|kept| kept.at < at);
        self.0.insert(place, report);
    }

    /// The newest of the reports up to `now`.
    pub(super) fn newest(&self, now: Seconds) -> Option<&Report> {
        self.until(now).last()
    }

    /// The reports of the `seconds` that end with `at`.
    pub(super) fn last(&self, seconds: Seconds, at: Seconds) -> &[Report] {
        let reports = self.until(at);
        &reports[reports.partition_point(|report| report.at <= at.saturating_sub(seconds))..]
    }

    /// The report of one second.
    pub(super) fn of(&self, at: Seconds) -> Option<&Report> {
        self.newest(at).filter(|report| report.at == at)
    }

    fn until(&self, at: Seconds) -> &[Report] {
        &self.0[..self.0.partition_point(|report| report.at <= at)]
    }
}

fn cleaned(mut report: Report) -> Report {
    let Report { at: _, arrived, finished, prompt, generation, running, waiting, held, missing } =
        &mut report;
    for number in [arrived, finished, prompt, generation, running, waiting, held] {
        if !(0.0..=MOST).contains(number) {
            *number = if *number > MOST { MOST } else { 0.0 };
            *missing = (*missing).max(1);
        }
    }
    report
}
