//! Pure: what the scaler remembers of a service, and when it is written down.
//!
//! **Invariant.** Whoever reads the notes back from the status, and the last two minutes from the gateways, decides as the one who
//! wrote them: they are written with each change, and, while there is something to give back or to do, before what happened
//! since is older than what can be counted again ([`REPLAY`]). A service that sleeps or idles is not written.
use lathe_api::{
    CountedStatus, DecisionStatus, InferenceServiceStatus, MAX_DECISIONS, MAX_SCALING_MESSAGE, ScalingBlock,
    ScalingMemory, ScalingPeak, ScalingStatus, cut,
};
use lathe_scaling::{
    self as scaling, Decision, Memory, Peak, Policy, REPLAY, Reason, Replicas, Seconds, Window,
};
use serde::Serialize;

use super::facts::StartUp;

/// What was not written for so long is: early enough for some tries.
const WRITE_AFTER: Seconds = REPLAY - 15;
/// What stands in the way of decisions for so long is told.
const STAYS: Seconds = 10;
/// Largest whole number that every reader of JSON knows.
pub const MOST: i64 = 9_007_199_254_740_991;

/// The fields of a status that are the scaler's.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Scaled {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<DecisionStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingStatus>,
}

impl Scaled {
    /// As they stand.
    pub fn of(status: Option<&InferenceServiceStatus>) -> Self {
        let fields = status.map(|status| (status.decisions.clone(), status.scaling.clone()));
        let (decisions, scaling) = fields.unwrap_or_default();
        Self { decisions, scaling }
    }
}

/// What is remembered of a service.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    pub start_up: StartUp,
    memory: Memory,
    decisions: Vec<DecisionStatus>,
    /// What stands in the way, and since when.
    stands: Option<(ScalingBlock, Seconds)>,
    blocked: Option<ScalingBlock>,
    /// What the API server says to the number that was decided, which it refuses.
    refused: Option<String>,
    written: Scaled,
}

impl Notes {
    /// As they were written.
    pub fn read(written: Scaled, start_up: StartUp) -> Self {
        let scaling = written.scaling.clone().unwrap_or_default();
        Self {
            start_up,
            memory: memory(&scaling.memory),
            decisions: written.decisions.clone(),
            stands: None,
            blocked: scaling.blocked.filter(|block| *block != ScalingBlock::WriteRefused),
            refused: scaling.message,
            written,
        }
    }

    /// Decides, and remembers it.
    pub fn decide(
        &mut self,
        policy: &Policy,
        window: &Window,
        replicas: &Replicas,
        now: Seconds,
    ) -> Decision {
        let decision = scaling::decide(policy, window, &self.memory, replicas, now);
        self.memory = decision.memory.clone();
        self.stands = match (self.stands, block(decision.reason)) {
            (Some((stands, since)), Some(block)) if stands == block => Some((stands, since.min(now))),
            (_, block) => block.map(|block| (block, now)),
        };
        self.blocked = match self.stands {
            None => None,
            Some((block, since)) if now.saturating_sub(since) >= STAYS => Some(block),
            Some(_) => self.blocked,
        };
        decision
    }

    /// The API server refuses what was decided, or does no more; tells whether that is news.
    pub fn refused(&mut self, message: Option<&str>) -> bool {
        let message = message.map(|message| cut(message, MAX_SCALING_MESSAGE));
        let is_news = self.refused != message;
        self.refused = message;
        is_news
    }

    /// The decision was carried out, where `from` were asked for.
    pub fn carried_out(&mut self, from: u32, decision: &Decision, now: Seconds) {
        let counts = (count(from), count(decision.replicas));
        self.decisions.push(DecisionStatus::new(now, counts, decision.reason.as_str(), &decision.message));
        let surplus = self.decisions.len().saturating_sub(MAX_DECISIONS);
        self.decisions.drain(..surplus);
    }

    /// What is to be written now, where `asked` replicas are asked for and the service's own workers had `counted` so much.
    pub fn due(
        &self,
        policy: &Policy,
        counted: &[CountedStatus],
        asked: u32,
        now: Seconds,
    ) -> Option<Scaled> {
        let fresh = ScalingStatus {
            replicas: count(asked),
            blocked: self.refused.as_ref().map(|_| ScalingBlock::WriteRefused).or(self.blocked),
            message: self.refused.clone(),
            start_up_seconds: self.start_up.seconds,
            memory: written(&self.memory),
            counted: counted.to_vec(),
        };
        let due = match &self.written.scaling {
            None => true,
            Some(old) => {
                let (memory, counted) = (old.memory.clone(), old.counted.clone());
                let but_for_memory = ScalingStatus { memory, counted, ..fresh.clone() };
                *old != but_for_memory
                    || self.written.decisions != self.decisions
                    || (self.matters(policy, asked, now) && age(&old.memory, &fresh.memory) >= WRITE_AFTER)
            }
        };
        due.then(|| Scaled { decisions: self.decisions.clone(), scaling: Some(fresh) })
    }

    /// What was written last.
    pub fn as_written(&self) -> &Scaled {
        &self.written
    }

    /// This was written.
    pub fn were_written(&mut self, scaled: Scaled) {
        self.written = scaled;
    }

    /// Whether somebody who knows only what was written would decide otherwise: while nothing is heard, or there is nothing to
    /// do and nothing to give back, there is nothing to remember.
    fn matters(&self, policy: &Policy, asked: u32, now: Seconds) -> bool {
        let unheard =
            matches!(self.stands, Some((ScalingBlock::ReportsLate | ScalingBlock::ReportsMissing, _)));
        let busy = now.saturating_sub(self.memory.busy) <= policy.scale_down_after;
        !unheard && asked > 0 && (busy || asked > policy.min_replicas)
    }
}

fn block(reason: Reason) -> Option<ScalingBlock> {
    match reason {
        Reason::ReportsLate => Some(ScalingBlock::ReportsLate),
        Reason::ReportsMissing => Some(ScalingBlock::ReportsMissing),
        Reason::CapacityUnknown => Some(ScalingBlock::CapacityUnknown),
        _ => None,
    }
}

fn count(replicas: u32) -> i32 {
    i32::try_from(replicas).unwrap_or(i32::MAX)
}

/// Seconds between two memories.
fn age(old: &ScalingMemory, fresh: &ScalingMemory) -> Seconds {
    match (old.seen, fresh.seen) {
        (Some(old), Some(fresh)) => fresh.saturating_sub(old).abs(),
        (_, None) => 0,
        (None, Some(_)) => Seconds::MAX,
    }
}

fn written(memory: &Memory) -> ScalingMemory {
    let time = |at: Seconds| at.clamp(0, MOST);
    let peak = |peak: &Peak| ScalingPeak { at: time(peak.at), replicas: peak.replicas.into() };
    let sum = |sum: u64| i64::try_from(sum).unwrap_or(MOST).min(MOST);
    ScalingMemory {
        seen: memory.seen.map(time),
        since: time(memory.since),
        busy: time(memory.busy),
        peaks: memory.peaks.iter().map(peak).collect(),
        raised: memory.raised.as_ref().map(peak),
        prompt_done: sum(memory.prompt_done),
        generation_done: sum(memory.generation_done),
        requests_done: sum(memory.requests_done),
    }
}

fn memory(written: &ScalingMemory) -> Memory {
    let peak = |peak: &ScalingPeak| Peak {
        at: peak.at,
        replicas: u32::try_from(peak.replicas.max(0)).unwrap_or(u32::MAX),
    };
    Memory {
        seen: written.seen,
        since: written.since,
        busy: written.busy,
        peaks: written.peaks.iter().map(peak).collect(),
        raised: written.raised.as_ref().map(peak),
        prompt_done: u64::try_from(written.prompt_done).unwrap_or(0),
        generation_done: u64::try_from(written.generation_done).unwrap_or(0),
        requests_done: u64::try_from(written.requests_done).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests;
