//! What is missing, decided from what is there.
use std::time::Duration;

use lathe_api::{Model, conditions};
use lathe_contract::{InspectReport, Outcome, SourceRef};
use lathe_resolve::{
    model::is_ready,
    pod::{Mounts, Use},
};

use super::observe::Observed;
use crate::{
    job::{State, advised, again_at, stands},
    pods::Trouble,
};

/// How long after a change elsewhere (a base that becomes ready) an adapter looks again, at most.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// What is to be done, and what is to be said.
pub struct Plan {
    /// The one write of this round.
    pub write: Write,
    /// For the status.
    pub view: View,
    /// When to look again where nothing changes before.
    pub next: Option<Duration>,
}

/// A write.
#[derive(Debug, PartialEq, Eq)]
pub enum Write {
    /// All is as it should be.
    Nothing,
    /// The source is to be read, as a pod with these mounts sees it.
    Inspect(Box<(Mounts, SourceRef)>),
    /// What the Job found is in the status, or it is to be tried again.
    DeleteJob,
}

/// What is known.
#[derive(Debug, PartialEq)]
pub enum View {
    /// The Job is on its way; the trouble is what keeps it.
    Inspecting(Option<Trouble>),
    /// The Job has just found this.
    Found(Box<InspectReport>),
    /// The status has it already.
    Known,
    /// It cannot be read.
    Failed(Trouble),
}

impl View {
    /// For the log.
    pub fn reason(&self) -> &str {
        match self {
            View::Inspecting(_) => "Inspecting",
            View::Found(_) | View::Known => "Inspected",
            View::Failed(trouble) => &trouble.reason,
        }
    }
}

/// Decides.
pub fn plan(model: &Model, observed: &Observed) -> Plan {
    let known = model.status.as_ref().is_some_and(|status| status.architecture.is_some());
    let state = observed.inspection.state();
    if known {
        // Only now, since what the status did not have yet would be lost with the Job.
        let write = if state == State::Absent { Write::Nothing } else { Write::DeleteJob };
        let settled = model.spec.adapter_of.is_none() || is_ready(model);
        return Plan { write, view: View::Known, next: (!settled).then_some(LOOK_AGAIN) };
    }
    let plan = |write, view| Plan { write, view, next: None };
    let conditions = model.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let said = stands(conditions, conditions::READY);
    let inspecting = |trouble| said.clone().map_or(View::Inspecting(trouble), View::Failed);
    match state {
        State::Absent => {
            let mut mounts = Mounts::default();
            match mounts.source(&model.spec.source, Use::Read) {
                Ok(source) => plan(Write::Inspect(Box::new((mounts, source))), inspecting(None)),
                Err(error) => {
                    let message = format!("`spec.source`: {error}. Next: make a new Model.");
                    let trouble = Trouble { reason: "InvalidLocation".to_owned(), message, stalled: true };
                    plan(Write::Nothing, View::Failed(trouble))
                }
            }
        }
        State::Suspended | State::Running => plan(Write::Nothing, inspecting(None)),
        State::Waiting(trouble) => {
            Plan { next: Some(LOOK_AGAIN), ..plan(Write::Nothing, inspecting(advised(trouble))) }
        }
        State::Complete(Some(outcome)) => match *outcome {
            Outcome::Inspected(report) => plan(Write::Nothing, View::Found(Box::new(report))),
            _ => again(model, observed, unexpected()),
        },
        // The pod went before its words were read: the next one repeats them.
        State::Complete(None) => plan(Write::DeleteJob, inspecting(None)),
        State::Failed(trouble) => again(model, observed, trouble),
    }
}

/// Says why it failed, and tries again after a while: the files or the Secret may have been put right.
fn again(model: &Model, observed: &Observed, trouble: Trouble) -> Plan {
    let created = model.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let failed = observed.inspection.ended().unwrap_or(observed.now);
    let wait = again_at(created, failed).duration_since(observed.now);
    let view = View::Failed(trouble);
    match Duration::try_from(wait) {
        Ok(wait) if !wait.is_zero() => Plan { write: Write::Nothing, view, next: Some(wait) },
        _ => Plan { write: Write::DeleteJob, view, next: None },
    }
}

fn unexpected() -> Trouble {
    let message = "the worker's last words are not those of an inspection. Next: check that operator and worker image are of the same version.";
    Trouble { reason: "WorkerFailed".to_owned(), message: message.to_owned(), stalled: true }
}
