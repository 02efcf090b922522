//! What a decision knows beside the reports: small, and written to the status.
use serde::{Deserialize, Serialize};

use super::{
    Capacity, LATE_AFTER, Policy, RAISE_FACTOR, RAISE_SECONDS, Replicas, Report, Seconds, Window, load,
};

/// Seconds that can be folded in again from reports: a memory that is written so often loses nothing in a restart.
pub const REPLAY: Seconds = 60;
/// The quiet window is remembered in at most so many parts.
const PARTS: Seconds = 10;
/// Peaks that are kept: of those parts, of one that began before the window and of one that goes on.
pub const MAX_PEAKS: usize = PARTS as usize + 2;
/// Seconds after which a request counts for a third in the mean work of requests.
const FORGET: u64 = 300;
/// Sums are kept in whole parts, so that they are the same after being written and read.
const MILLION: f64 = 1e6;
const THOUSAND: f64 = 1e3;
/// Requests that must have ended before their mean is one.
const ENOUGH: u64 = 8_000_000;

/// What is remembered from one decision to the next. The default remembers nothing: nothing is given back before a whole window.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// Last second that was folded in; `None`: none was.
    pub seen: Option<Seconds>,
    /// From then on every second was reported.
    pub since: Seconds,
    /// Last second in which the service had anything to do.
    pub busy: Seconds,
    /// The most replicas that were wanted in each part of the quiet window, oldest first; at most [`MAX_PEAKS`].
    pub peaks: Vec<Peak>,
    /// When replicas were last raised, and from how many.
    pub raised: Option<Peak>,
    /// Prompt tokens that were read lately, in thousandths. Tokens and not what they took: another revision takes another time.
    pub prompt_done: u64,
    /// Tokens that were generated lately, in thousandths.
    pub generation_done: u64,
    /// Requests that ended lately, in millionths.
    pub requests_done: u64,
}

/// A number of replicas at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peak {
    /// The time, or the beginning of a part of the window.
    pub at: Seconds,
    /// The number.
    pub replicas: u32,
}

impl Memory {
    /// Folds in every second up to `now` that is reported. One that a gateway lacks is waited for as long as it may only be
    /// late; after that the quiet window begins anew behind it.
    pub(super) fn advance(&mut self, policy: &Policy, window: &Window, replicas: &Replicas, now: Seconds) {
        self.follow(now);
        let first = now.saturating_sub(REPLAY);
        let next = match self.seen {
            Some(seen) => seen.saturating_add(1),
            None => {
                // A service that is new was never idle, though nothing has flowed to it.
                self.interrupt(now);
                first
            }
        };
        if next < first {
            self.interrupt(first);
        }
        for at in next.max(first)..=now {
            match window.of(at).filter(|report| report.missing == 0) {
                Some(_) => self.fold(policy, window, replicas, at),
                None if at > now.saturating_sub(LATE_AFTER) => break,
                None => self.interrupt(at.saturating_add(1)),
            }
            self.seen = Some(at);
        }
    }

    /// Mean work of a request, in seconds of one replica that can do so much.
    pub(super) fn work(&self, capacity: &Capacity) -> Option<f64> {
        let tokens = |sum: u64| sum as f64 / THOUSAND;
        let done = Report {
            prompt: tokens(self.prompt_done),
            generation: tokens(self.generation_done),
            ..Report::default()
        };
        let requests = self.requests_done as f64 / MILLION;
        // Requests without a token are of notes that did not count tokens yet: nothing is known.
        (self.requests_done >= ENOUGH).then(|| capacity.busy(&done) / requests).filter(|work| *work > 0.0)
    }

    /// The most replicas that were wanted in the quiet window.
    pub(super) fn most_wanted(&self) -> u32 {
        self.peaks.iter().map(|peak| peak.replicas).max().unwrap_or_default()
    }

    /// Whether the service may sleep: it can, and had nothing to do for as long as the policy says.
    pub(super) fn is_idle(&self, policy: &Policy, now: Seconds) -> bool {
        policy.min_replicas == 0
            && policy
                .scale_to_zero_after
                .is_some_and(|after| self.reported_for(after, now) && now.saturating_sub(self.busy) >= after)
    }

    /// How many may be asked for at once where `asked` are; none counts as one.
    pub(super) fn raise(&mut self, asked: u32, now: Seconds) -> u32 {
        let recent = |peak: &Peak| now.saturating_sub(peak.at) < RAISE_SECONDS;
        let raised = self.raised.filter(recent).unwrap_or(Peak { at: now, replicas: asked });
        self.raised = Some(raised);
        raised.replicas.max(1).saturating_mul(RAISE_FACTOR)
    }

    /// Whether every second of the last `seconds` was reported.
    pub(super) fn reported_for(&self, seconds: Seconds, now: Seconds) -> bool {
        self.seen.is_some_and(|seen| now.saturating_sub(seen) <= LATE_AFTER)
            && now.saturating_sub(self.since) >= seconds
    }

    fn fold(&mut self, policy: &Policy, window: &Window, replicas: &Replicas, at: Seconds) {
        let Some(report) = window.of(at) else { return };
        if report.arrived + report.running + report.waiting + report.held > 0.0 {
            self.busy = self.busy.max(at);
        }
        // An idle second forgets nothing: a service that wakes should know its requests.
        if report.finished > 0.0 || report.running > 0.0 {
            let add = |sum: &mut u64, number: f64| {
                *sum = (*sum - sum.div_ceil(FORGET).min(*sum)).saturating_add(number.round() as u64);
            };
            add(&mut self.prompt_done, report.prompt * THOUSAND);
            add(&mut self.generation_done, report.generation * THOUSAND);
            add(&mut self.requests_done, report.finished * MILLION);
        }
        let kept = load::at(window, self, replicas, at).kept(policy).unwrap_or(replicas.asked);
        let quiet = policy.quiet_window(replicas);
        let part = quiet.saturating_add(PARTS - 1) / PARTS;
        let start = at.saturating_sub(at.rem_euclid(part));
        match self.peaks.last_mut() {
            Some(peak) if peak.at == start => peak.replicas = peak.replicas.max(kept),
            _ => self.peaks.push(Peak { at: start, replicas: kept }),
        }
        let kept = quiet.saturating_add(part);
        self.peaks.retain(|peak| peak.at > at.saturating_sub(kept));
        // Parts of a shorter window, which has become a longer one, are too many: the oldest become one, which is kept as long as its
        // end.
        while self.peaks.len() > MAX_PEAKS {
            let oldest = self.peaks.remove(0).replicas;
            self.peaks[0].replicas = self.peaks[0].replicas.max(oldest);
        }
    }

    /// What happened before `at` is not known.
    fn interrupt(&mut self, at: Seconds) {
        (self.since, self.busy) = (self.since.max(at), self.busy.max(at));
    }

    /// A clock that was set back takes what is remembered with it: ages stay as they were.
    fn follow(&mut self, now: Seconds) {
        let Some(seen) = self.seen.filter(|seen| *seen > now.saturating_add(LATE_AFTER)) else { return };
        let moved = |at: &mut Seconds| *at = at.saturating_sub(seen).saturating_add(now);
        self.seen = Some(now);
        moved(&mut self.since);
        moved(&mut self.busy);
        self.peaks.iter_mut().chain(&mut self.raised).for_each(|peak| moved(&mut peak.at));
    }
}
