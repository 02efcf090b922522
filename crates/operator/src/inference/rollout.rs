//! Pure: where a roll-out with a candidate stands, from where it stood, what runs, and how requests ended.
//!
//! The notes of the last decision are in the service's status, and how requests ended is told by the gateways second by second for
//! two minutes: an operator that starts anew decides as the one before would have.
mod gates;
mod words;

use jiff::SignedDuration;
use lathe_api::{
    EndedStatus, Model, Rollout, RolloutPhase, RolloutStatus, RolloutStep, RolloutStrategy, names,
};
use lathe_contract::Ended;
use lathe_resolve::pod;

pub use words::doing;

/// Between two counts of a step's requests: each writes the status, which wakes everybody who watches.
const COUNT: i64 = 10;
/// The schema has checked a step's time; what came another way lasts as long as this.
const USUAL: SignedDuration = SignedDuration::from_mins(10);
/// The largest number that the status has room for.
const MOST: u64 = 9_007_199_254_740_991;

/// What is seen of a service's revisions.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// What the spec asks for.
    pub wanted: &'a str,
    /// What the service's Deployment is made for; `None`: there is none.
    pub stable: Option<&'a str>,
    /// Replicas of the stable revision work, and some are to: there is something to compare with.
    pub comparable: bool,
    /// As many replicas of the candidate are ready as the step's share needs.
    pub prepared: bool,
    /// A replica of the candidate is ready.
    pub answers: bool,
    /// All of the service's own replicas are what the spec asks for.
    pub replaced: bool,
    /// The Model that the candidate serves.
    pub model: Option<&'a Model>,
}

/// How requests ended, as gateways tell it.
pub trait Numbers {
    /// Up to which second everything is told that happened after `after`.
    fn told_until(&self, after: i64) -> i64;
    /// Of a revision, after one second and up to another.
    fn ended(&self, revision: &str, after: i64, until: i64) -> Ended;
}

/// Where the roll-out stands now; `None`: there is no candidate, and the service's replicas become what the spec asks for.
pub fn decide(
    rollout: Option<&Rollout>,
    old: Option<&RolloutStatus>,
    seen: &Seen<'_>,
    numbers: &impl Numbers,
    now: i64,
) -> Option<RolloutStatus> {
    let rules = rollout.filter(|r| r.strategy == RolloutStrategy::Canary && !r.steps.is_empty())?;
    let Some(old) = old.filter(|old| old.revision == seen.wanted) else { return begin(rules, seen, now) };
    let is_stable = seen.stable == Some(seen.wanted);
    match old.phase {
        RolloutPhase::Promoting if seen.replaced => {
            Some(RolloutStatus { phase: RolloutPhase::Promoted, percent: 0, ..old.clone() })
        }
        RolloutPhase::Promoting => Some(old.clone()),
        RolloutPhase::Promoted if is_stable => Some(old.clone()),
        RolloutPhase::Failed if old.rules == hash(rules) && !is_stable => Some(old.clone()),
        RolloutPhase::Starting | RolloutPhase::Testing if !is_stable => {
            let step = rules.step(old.step)?;
            Some(go_on(rules, step, old, seen, numbers, now))
        }
        _ => begin(rules, seen, now),
    }
}

/// Whether the stable revision is kept as it is.
pub fn holds_back(rollout: Option<&RolloutStatus>) -> bool {
    let holds = [RolloutPhase::Starting, RolloutPhase::Testing, RolloutPhase::Failed];
    rollout.is_some_and(|rollout| holds.contains(&rollout.phase))
}

/// Whether there is a candidate.
pub fn has_candidate(rollout: Option<&RolloutStatus>) -> bool {
    let has = [RolloutPhase::Starting, RolloutPhase::Testing, RolloutPhase::Promoting];
    rollout.is_some_and(|rollout| has.contains(&rollout.phase))
}

fn begin(rules: &Rollout, seen: &Seen<'_>, now: i64) -> Option<RolloutStatus> {
    // Where nothing works there is nothing to lose, and nothing to compare with.
    let stable = seen.stable.filter(|stable| *stable != seen.wanted && seen.comparable)?;
    let begun = RolloutStatus {
        revision: seen.wanted.to_owned(),
        rules: hash(rules),
        phase: RolloutPhase::Starting,
        step: 1,
        percent: 0,
        since: now,
        counted: now,
        candidate: EndedStatus::default(),
        stable: EndedStatus::default(),
        message: None,
    };
    // A score is known before a pod is made.
    let failed = rules.gates.iter().find_map(|gate| gates::score(gate, seen.model));
    Some(match failed {
        Some(why) => fail(begun, words::failed_score(seen.wanted, stable, &why)),
        None => begun,
    })
}

fn go_on(
    rules: &Rollout,
    (number, step): (i32, &RolloutStep),
    old: &RolloutStatus,
    seen: &Seen<'_>,
    numbers: &impl Numbers,
    now: i64,
) -> RolloutStatus {
    let mut next = RolloutStatus { step: number, ..old.clone() };
    // A clock that was set back: the step begins anew.
    if now < old.since {
        return of_step(next, number, now);
    }
    // Before its first step nobody is sent to it.
    if old.percent > 0 && (now < old.counted || now - old.counted >= COUNT) {
        let until = numbers.told_until(old.counted).min(now);
        if until > old.counted {
            let more = |revision: &str| numbers.ended(revision, old.counted, until);
            next.candidate = added(next.candidate, more(&old.revision));
            next.stable = added(next.stable, seen.stable.map(more).unwrap_or_default());
            next.counted = until;
        }
    }
    let stable = seen.stable.unwrap_or_default();
    let verdicts: Vec<_> = rules.gates.iter().map(|gate| gates::judge(gate, &next.candidate)).collect();
    if verdicts.contains(&gates::Verdict::Fails) {
        let message = words::failed(rules, step, &next, stable);
        return fail(next, message);
    }
    if old.phase == RolloutPhase::Starting {
        let starts = seen.prepared && seen.answers;
        let begun = |next| RolloutStatus { phase: RolloutPhase::Testing, percent: step.percent, ..next };
        return if starts { begun(of_step(next, number, now)) } else { next };
    }
    next.percent = step.percent;
    let after = step.after.seconds().unwrap_or(USUAL.as_secs());
    let holds = verdicts.iter().all(|verdict| *verdict == gates::Verdict::Holds);
    if !holds || !seen.answers || next.counted - next.since < after {
        return next;
    }
    if usize::try_from(number).is_ok_and(|number| number < rules.steps.len()) {
        let mut next = of_step(next, number + 1, now);
        next.phase = RolloutPhase::Starting;
        return next;
    }
    let message = words::promoted(rules, &next);
    RolloutStatus { phase: RolloutPhase::Promoting, message: Some(message), ..next }
}

/// A step of which nothing is counted yet.
fn of_step(status: RolloutStatus, step: i32, now: i64) -> RolloutStatus {
    let (candidate, stable) = (EndedStatus::default(), EndedStatus::default());
    RolloutStatus { step, since: now, counted: now, candidate, stable, ..status }
}

fn fail(status: RolloutStatus, message: String) -> RolloutStatus {
    RolloutStatus { phase: RolloutPhase::Failed, percent: 0, message: Some(message), ..status }
}

fn added(sum: EndedStatus, more: Ended) -> EndedStatus {
    let add = |sum: i64, more: u64| {
        let sum = u64::try_from(sum).unwrap_or(0).saturating_add(more).min(MOST);
        i64::try_from(sum).unwrap_or(i64::MAX)
    };
    EndedStatus {
        requests: add(sum.requests, more.requests),
        errors: add(sum.errors, more.errors),
        streams: add(sum.streams, more.streams),
        first_token_millis: add(sum.first_token_millis, more.first_token_ms),
        tokens: add(sum.tokens, more.tokens),
        decode_millis: add(sum.decode_millis, more.decode_ms),
    }
}

/// A short name of the rules; what cannot be written as JSON is like nothing else.
fn hash(rules: &Rollout) -> String {
    pod::checksum(rules).map(|checksum| names::revision(&checksum)).unwrap_or_default()
}

#[cfg(test)]
mod tests;
