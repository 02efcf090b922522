//! The last seconds of one service: only those in which there was something.
use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;

use lathe_contract::{Ended, Flow, RevisionOutcome, TRAFFIC_SECONDS};

/// What happened since the last second was closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Requests.
    pub arrived: u64,
    /// Requests.
    pub finished: u64,
    /// Tokens; fewer than none where more was counted before than there were.
    pub prompt: i64,
    /// As `prompt`.
    pub generation: i64,
}

/// How many requests stand where, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Standing {
    /// Being answered.
    pub running: f64,
    /// At a replica that has no slot for them yet.
    pub waiting: f64,
    /// Held here.
    pub held: u64,
}

/// At most [`TRAFFIC_SECONDS`] of them.
#[derive(Debug, Default)]
pub struct Seconds {
    /// In their order.
    kept: VecDeque<(u64, Flow)>,
    /// How requests ended, in their order.
    outcomes: VecDeque<(u64, String, Ended)>,
    /// Tokens that were told too many, and are taken from those to come: no second has fewer than none.
    surplus: Surplus,
}

#[derive(Debug, Default)]
struct Surplus {
    prompt: i64,
    generation: i64,
}

impl Seconds {
    /// Closes `seconds`. What was counted is the first one's, what stands does so at the end of each.
    pub fn close(&mut self, seconds: RangeInclusive<u64>, counted: Counted, standing: Standing) {
        let Standing { running, waiting, held } = standing;
        let still = Flow { running, waiting, held, ..Flow::default() };
        let first = Flow {
            arrived: counted.arrived,
            finished: counted.finished,
            prompt: settle(&mut self.surplus.prompt, counted.prompt),
            generation: settle(&mut self.surplus.generation, counted.generation),
            ..still
        };
        let (begin, end) = seconds.into_inner();
        let oldest = end.saturating_sub(TRAFFIC_SECONDS) + 1;
        let closed = std::iter::once((begin, first));
        let closed = closed.chain(((begin + 1).max(oldest)..=end).map(|second| (second, still)));
        self.kept.extend(closed.filter(|(_, flow)| *flow != Flow::default()));
        let gone = self.kept.partition_point(|(second, _)| *second < oldest);
        self.kept.drain(..gone);
    }

    /// Takes how requests ended in a second that is closed.
    pub fn end(&mut self, second: u64, ended: BTreeMap<String, Ended>) {
        self.outcomes.extend(ended.into_iter().map(|(revision, ended)| (second, revision, ended)));
        let gone = self.outcomes.partition_point(|(at, ..)| *at + TRAFFIC_SECONDS <= second);
        self.outcomes.drain(..gone);
    }

    /// Whether there was nothing after that second.
    pub fn are_silent_after(&self, second: u64) -> bool {
        let (flow, ended) = (self.kept.back().map(|(at, _)| *at), self.outcomes.back().map(|(at, ..)| *at));
        flow.max(ended).is_none_or(|last| last <= second)
    }

    /// Whether two revisions were compared lately.
    pub fn have_outcomes(&self) -> bool {
        !self.outcomes.is_empty()
    }

    /// How requests ended in each second after `after` up to `last`.
    pub fn outcomes(&self, after: u64, last: u64) -> Vec<RevisionOutcome> {
        let told = self.outcomes.iter().filter(|(at, ..)| (after + 1..=last).contains(at));
        told.map(|(at, revision, ended)| RevisionOutcome {
            back: last - at,
            revision: revision.clone(),
            ended: *ended,
        })
        .collect()
    }

    /// Each second after `after` up to `last`.
    pub fn after(&self, after: u64, last: u64) -> Vec<Flow> {
        let mut told = vec![Flow::default(); last.saturating_sub(after) as usize];
        let first = self.kept.partition_point(|(second, _)| *second <= after);
        for (second, flow) in self.kept.range(first..) {
            if let Some(place) = told.get_mut((second - after - 1) as usize) {
                *place = *flow;
            }
        }
        told
    }
}

/// What can be told of `counted`, after what was told too much.
fn settle(surplus: &mut i64, counted: i64) -> u64 {
    let balance = counted.saturating_sub(*surplus);
    *surplus = balance.min(0).saturating_neg();
    balance.max(0).unsigned_abs()
}
