//! What is said: the facts of the inspection, and one true cause with the next step.
use lathe_api::{
    Model, ModelStatus,
    conditions::{self, READY, RECONCILING, STALLED, State},
};
use lathe_resolve::{
    Rejection,
    model::{Unready, judge, record},
};

use super::{
    observe::Observed,
    plan::{Plan, View},
};
use crate::pods::Trouble;

/// The sentence of `Ready`.
struct Verdict {
    ready: State,
    reason: String,
    message: String,
    /// Only a person can help.
    stalled: bool,
}

/// The whole status. `refused`: why a write of this round was not taken at all.
pub fn status(model: &Model, observed: &Observed, plan: &Plan, refused: Option<&Trouble>) -> ModelStatus {
    let mut fresh = model.status.clone().unwrap_or_default();
    if let View::Found(report) = &plan.view {
        record(&mut fresh, report);
    }
    let verdict = match refused {
        Some(Trouble { reason, message, stalled }) => Verdict {
            ready: State::False,
            reason: reason.clone(),
            message: message.clone(),
            stalled: *stalled,
        },
        None => verdict(model, &fresh, observed, plan),
    };
    let generation = model.metadata.generation.unwrap_or(0);
    fresh.observed_generation = generation;
    let ready = verdict.ready == State::True;
    let mut set = |type_, state, reason: &str, message: &str| {
        conditions::set(&mut fresh.conditions, type_, state, reason, message, generation, observed.now);
    };
    set(READY, verdict.ready, &verdict.reason, &verdict.message);
    set(RECONCILING, State::from(!ready && !verdict.stalled), &verdict.reason, &verdict.message);
    set(STALLED, State::from(verdict.stalled), &verdict.reason, &verdict.message);
    fresh
}

fn verdict(model: &Model, fresh: &ModelStatus, observed: &Observed, plan: &Plan) -> Verdict {
    let unread = |reason: &str, message: String, stalled| Verdict {
        ready: if stalled { State::False } else { State::Unknown },
        reason: reason.to_owned(),
        message,
        stalled,
    };
    match &plan.view {
        View::Inspecting(None) => {
            unread("Inspecting", "a pod reads the headers of the source".to_owned(), false)
        }
        View::Inspecting(Some(Trouble { reason, message, stalled })) => {
            unread(reason, message.clone(), *stalled)
        }
        // Tried again after a while, whatever it is; it waits for a person only where that cannot help by itself.
        View::Failed(Trouble { reason, message, stalled }) => unread(reason, message.clone(), *stalled),
        View::Found(_) | View::Known => match judge(model, fresh, observed.base.as_ref()) {
            Ok(message) => {
                Verdict { ready: State::True, reason: "Inspected".to_owned(), message, stalled: false }
            }
            Err(Unready { why: Rejection { reason, message }, stalled }) => {
                Verdict { ready: State::False, reason: reason.to_owned(), message, stalled }
            }
        },
    }
}
