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
    job::{State, advised, failing_since, stands, unexpected},
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
            let next = Some(observed.inspection.look_again(observed.now));
            Plan { next, ..plan(Write::Nothing, inspecting(advised(trouble))) }
        }
        State::Complete(Ok(outcome)) => match *outcome {
            Outcome::Inspected(report) => plan(Write::Nothing, View::Found(Box::new(report))),
            _ => again(model, observed, unexpected("they are not those of an inspection")),
        },
        State::Complete(Err(trouble)) | State::Failed(trouble) => again(model, observed, trouble),
    }
}

/// Says why it failed, and tries again after a while: the files or the Secret may have been put right.
fn again(model: &Model, observed: &Observed, trouble: Trouble) -> Plan {
    let conditions = model.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let since = failing_since(&model.metadata, conditions, &[conditions::READY]);
    let view = View::Failed(trouble);
    match observed.inspection.again(since, observed.now) {
        Some(wait) => Plan { write: Write::Nothing, view, next: Some(wait) },
        None => Plan { write: Write::DeleteJob, view, next: None },
    }
}
