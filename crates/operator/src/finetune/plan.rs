//! Which stage a job is in, and the writes that stage needs: decided from what is there now, nothing else.
mod outcome;

pub(super) use outcome::is_same;

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use lathe_api::{AcceleratorProfile, FineTuneJob, Model, conditions};
use lathe_contract::{CheckDataReport, Measured, Outcome, TrainProgress};
use lathe_resolve::{
    Rejection,
    finetune::{self, Checking, Dataset, TrainFacts, Trained, Training},
    inference::Images,
};

use super::{
    build, fallback,
    observe::{Attempt, Observed},
    rivals,
    usage::{self, Usage},
};
use crate::{
    job::{Run, State, advised, failing_since, stands, unexpected, wait},
    pods::{self, OUT_OF_MEMORY, Trouble},
};

/// Between two looks at a job that is ahead: its end wakes nobody else.
const RIVAL: Duration = Duration::from_secs(15);
/// Between two questions to a worker.
pub(super) const ASK: Duration = Duration::from_secs(5);

/// What is to be done, and what is known.
#[derive(Debug)]
pub struct Plan {
    /// Where the job stands.
    pub stage: Stage,
    /// The writes of this round, in their order.
    pub writes: Vec<Write>,
    /// When to look again where nothing changes before.
    pub next: Option<Duration>,
    /// What was resolved in this round; an attempt that runs keeps its plan.
    pub training: Option<Box<Training>>,
    /// The dataset, as its check has found it, where the check is still there.
    pub checked: Option<CheckDataReport>,
    /// Number of the current attempt.
    pub attempt: Option<i32>,
    /// What has been used so far.
    pub usage: Usage,
    /// The profile that is given up now, since nothing of it came free in time.
    pub passed_over: Option<String>,
    /// When that will be.
    pub falls_back: Option<Timestamp>,
}

/// A write.
#[derive(Debug)]
pub enum Write {
    /// Make the Job that checks the dataset.
    Check(Box<Checking>),
    /// Make the artefact volume.
    Claim,
    /// Make an attempt's Job.
    Start {
        /// Its number.
        attempt: i32,
        /// What it runs.
        training: Box<Training>,
    },
    /// Hold an attempt back, or let it go on.
    Suspend(Arc<Job>, bool),
    /// A Job must not go on.
    Delete(Arc<Job>),
    /// A Job has ended, and is of no use any more.
    CleanUp(Arc<Job>),
    /// Make the Job that repeats the last words of a pod that is gone.
    Summarise,
    /// Make the Model of the result, with its measurements.
    MakeModel(Box<Trained>, Vec<lathe_api::ScoreStatus>),
    /// Give a Model its measurements.
    Scores(Box<Model>, Vec<lathe_api::ScoreStatus>),
    /// A Model that failed an earlier job's gates passes this one's.
    Pass(Box<Model>),
}

/// Where a job stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    /// Something that it needs is not there yet.
    Waiting(Rejection),
    /// The spec cannot be carried out.
    Rejected(Rejection),
    /// The dataset is being checked.
    Checking(Option<Trouble>),
    /// The dataset cannot be used.
    BadData(Trouble),
    /// A Model of another origin has the output's name.
    Taken(String),
    /// Another job makes the Model of this name: which, and what to do.
    Behind(String),
    /// It is held back.
    Held(Hold),
    /// A queue holds its Job.
    Queued,
    /// Its pod is on its way.
    Pending(Option<Trouble>),
    /// The worker works.
    Running,
    /// The last words are being looked for.
    Lost(Option<Trouble>),
    /// It failed.
    Failed(Trouble),
    /// The result is there, with these scores; `adopted`: an equal job had made it.
    Finished {
        /// Measurements.
        scores: Vec<lathe_api::ScoreStatus>,
        /// What they are made from.
        measured: Option<Measured>,
        /// Where training ended.
        progress: Option<TrainProgress>,
        /// Nothing had to be trained.
        adopted: bool,
    },
    /// The status says how it ended.
    Over,
}

/// Who holds a job back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// `spec.suspend`.
    User,
    /// The budget is spent: how, and what to do.
    Budget(String),
}

/// Decides.
pub fn plan(job: &FineTuneJob, observed: &Observed, images: &Images) -> Plan {
    if job.status.as_ref().is_some_and(|status| status.completion_time.is_some()) {
        return afterwards(job, observed);
    }
    match &observed.attempt {
        Some(attempt) => carry_on(job, observed, attempt, images),
        None => prepare(job, observed, images),
    }
}

impl Plan {
    fn at(stage: Stage) -> Self {
        Self {
            stage,
            writes: Vec::new(),
            next: None,
            training: None,
            checked: None,
            attempt: None,
            usage: Usage::default(),
            passed_over: None,
            falls_back: None,
        }
    }

    /// True where it makes a Job of the training.
    pub fn starts(&self) -> bool {
        self.writes.iter().any(|write| matches!(write, Write::Start { .. }))
    }

    fn write(mut self, write: Write) -> Self {
        self.writes.push(write);
        self
    }
}

/// Before the first Job of the training: the Model, the plan, the dataset, the output's name.
fn prepare(job: &FineTuneJob, observed: &Observed, images: &Images) -> Plan {
    let spec = &job.spec;
    let status = job.status.as_ref();
    let used = usage::account(status, std::iter::empty(), &observed.profiles, observed.now);
    let base = match base(job, observed) {
        Ok(base) => base,
        Err(rejection) => return Plan { usage: used, ..Plan::at(Stage::Waiting(rejection)) },
    };
    let checked = checked(&observed.check);
    let digest =
        status.and_then(|s| s.dataset_digest.clone()).or_else(|| checked.as_ref().map(|c| c.digest.clone()));
    let next_attempt = status.and_then(|s| s.attempt).unwrap_or(0).saturating_add(1);
    let passed = status.map(|s| s.passed_over.as_slice()).unwrap_or_default();
    let dataset =
        digest.as_deref().map(|digest| Dataset { tokens: checked.as_ref().map(|c| c.tokens), digest });
    let resolve = |profiles: &[AcceleratorProfile]| {
        let name = job.metadata.name.as_deref().unwrap_or_default();
        let facts = TrainFacts { name, attempt: next_attempt, base, profiles, images, dataset };
        finetune::training(spec, &facts)
    };
    // Where nothing else is left, one that was given up is as good as any.
    let resolved = match resolve(&fallback::without(&observed.profiles, passed)) {
        Err(_) if !passed.is_empty() => resolve(&observed.profiles),
        resolved => resolved,
    };
    let training = match resolved {
        Ok(training) => training,
        Err(rejection) => return Plan { usage: used, ..Plan::at(Stage::Rejected(rejection)) },
    };
    let known = |plan: Plan| Plan {
        training: Some(Box::new(training.clone())),
        checked: checked.clone(),
        attempt: status.and_then(|s| s.attempt),
        usage: used.clone(),
        ..plan
    };
    if let Some(plan) = outcome::output(job, observed, digest.is_some(), training.inputs_hash.as_deref()) {
        return known(plan);
    }
    if spec.suspend {
        return known(Plan::at(Stage::Held(Hold::User)));
    }
    if digest.is_none() {
        return known(check(job, observed, base));
    }
    if let Some(why) = over(job, &used, training.count) {
        return known(Plan::at(Stage::Held(Hold::Budget(why))));
    }
    if let Some(why) = rivals::ahead(job, &observed.rivals) {
        return known(Plan { next: Some(RIVAL), ..Plan::at(Stage::Behind(why)) });
    }
    let mut plan = Plan::at(if is_queued(job) { Stage::Queued } else { Stage::Pending(None) });
    if finetune::needs_artifacts(spec) {
        plan = plan.write(Write::Claim);
    }
    plan = plan.write(Write::Start { attempt: next_attempt, training: Box::new(training.clone()) });
    Plan { attempt: Some(next_attempt), ..known(plan) }
}

/// The Model to start from, ready.
fn base<'a>(job: &FineTuneJob, observed: &'a Observed) -> Result<&'a Model, Rejection> {
    let name = &job.spec.base_model_ref.name;
    let Some(base) = &observed.base else {
        let next = "Next: make it, or make a new FineTuneJob with another `baseModelRef`.";
        return Err(Rejection::new("ModelNotFound", format!("Model {name} is not there. {next}")));
    };
    let conditions = base.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    // An adapter is refused by the plan, ready or not.
    if conditions::is_true(conditions, conditions::READY) || base.spec.adapter_of.is_some() {
        return Ok(base);
    }
    let why = conditions::find(conditions, conditions::READY);
    let why = why
        .map_or_else(|| "nobody has looked at it yet".to_owned(), |c| format!("{}: {}", c.reason, c.message));
    Err(Rejection::new("ModelNotReady", format!("Model {name} is not ready: {why}")))
}

/// What the check of the dataset has found, while its pod is there.
fn checked(check: &Run) -> Option<CheckDataReport> {
    match check.state() {
        State::Complete(Ok(outcome)) => match *outcome {
            Outcome::DataChecked(report) => Some(report),
            _ => None,
        },
        _ => None,
    }
}

/// The dataset has not been found good yet.
fn check(job: &FineTuneJob, observed: &Observed, base: &Model) -> Plan {
    let delete = |plan: Plan| match &observed.check.job {
        Some(check) => plan.write(Write::CleanUp(check.clone())),
        None => plan,
    };
    let conditions = job.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let said = stands(conditions, super::DATASET_VALID);
    let checking = |trouble| said.clone().map_or(Stage::Checking(trouble), Stage::BadData);
    let again = |trouble| {
        // It may have waited for its base for days before the first look.
        let since = failing_since(&job.metadata, conditions, &["Planned", super::DATASET_VALID]);
        let plan = Plan::at(Stage::BadData(trouble));
        match observed.check.again(since, observed.now) {
            Some(wait) => Plan { next: Some(wait), ..plan },
            // The rows may have been put right.
            None => delete(plan),
        }
    };
    match observed.check.state() {
        State::Absent => match finetune::checking(&job.spec, base) {
            Ok(task) => Plan::at(checking(None)).write(Write::Check(Box::new(task))),
            Err(rejection) => Plan::at(Stage::Rejected(rejection)),
        },
        State::Running | State::Suspended => Plan::at(checking(None)),
        State::Waiting(trouble) => Plan {
            next: Some(observed.check.look_again(observed.now)),
            ..Plan::at(checking(advised(trouble)))
        },
        // Words of a check were recorded before.
        State::Complete(Ok(_)) => again(unexpected("they are not those of a check")),
        State::Complete(Err(trouble)) | State::Failed(trouble) => again(trouble),
    }
}

/// There is a Job of the training.
fn carry_on(job: &FineTuneJob, observed: &Observed, attempt: &Attempt, images: &Images) -> Plan {
    let status = job.status.as_ref();
    let pods = attempt.run.pods.iter().map(|pod| &**pod);
    let used = usage::account(status, pods, &observed.profiles, observed.now);
    let plan = stage_of_attempt(job, observed, attempt, images, &used);
    let stage = match plan.stage {
        Stage::Pending(Some(trouble)) => Stage::Pending(Some(with_numbers(job, trouble))),
        Stage::Failed(trouble) => Stage::Failed(with_numbers(job, trouble)),
        stage => stage,
    };
    let plan = Plan { stage, ..plan };
    // What it found is in the status.
    let mut writes = match &observed.check.job {
        Some(check) if status.is_some_and(|s| s.dataset_digest.is_some()) => {
            vec![Write::CleanUp(check.clone())]
        }
        _ => Vec::new(),
    };
    writes.extend(plan.writes);
    Plan { writes, checked: checked(&observed.check), attempt: Some(attempt.number), usage: used, ..plan }
}

/// A pod knows its limit; how far the work was and what was planned stands in the status.
fn with_numbers(job: &FineTuneJob, trouble: Trouble) -> Trouble {
    if trouble.reason != OUT_OF_MEMORY {
        return trouble;
    }
    let status = job.status.as_ref();
    let step = status.and_then(|s| s.progress.as_ref()).map(|p| format!(" after step {}", p.step));
    let memory = status.and_then(|s| s.plan.as_ref()).map(|p| p.memory.as_slice()).unwrap_or_default();
    let total = memory.iter().find(|row| row.name == "total").map(|row| format!("; planned {}", row.value));
    let known = [step, total].into_iter().flatten().collect::<String>();
    Trouble { message: trouble.message.replacen(". Next:", &format!("{known}. Next:"), 1), ..trouble }
}

fn stage_of_attempt(
    job: &FineTuneJob,
    observed: &Observed,
    attempt: &Attempt,
    images: &Images,
    used: &Usage,
) -> Plan {
    let Some(own) = attempt.run.job.clone() else { return Plan::at(Stage::Pending(None)) };
    let state = attempt.run.state();
    match state {
        State::Complete(Ok(outcome)) => return outcome::conclude(job, observed, attempt, *outcome),
        State::Complete(Err(_)) => return outcome::recover(job, observed, attempt),
        State::Failed(trouble) => return Plan::at(Stage::Failed(trouble)),
        _ => {}
    }
    if is_replanned(job, attempt) {
        return Plan::at(Stage::Pending(None)).write(Write::Delete(own));
    }
    let suspended = own.spec.as_ref().and_then(|spec| spec.suspend) == Some(true);
    if let Some(hold) = hold(job, used) {
        let plan = Plan::at(Stage::Held(hold));
        return match (is_queued(job), suspended) {
            // The queue would let it go on: its Job goes, and the next attempt is queued anew.
            (true, _) => plan.write(Write::Delete(own)),
            (false, false) => plan.write(Write::Suspend(own, true)),
            (false, true) => plan,
        };
    }
    match state {
        State::Running => Plan { next: Some(ASK), ..Plan::at(Stage::Running) },
        State::Suspended if is_queued(job) => Plan::at(Stage::Queued),
        State::Suspended => Plan::at(Stage::Pending(None)).write(Write::Suspend(own, false)),
        State::Waiting(trouble) => {
            let next = attempt.run.look_again(observed.now);
            let plan = Plan { next: Some(next), ..Plan::at(Stage::Pending(trouble)) };
            fallback::consider(plan, job, observed, attempt, images)
        }
        _ => Plan::at(Stage::Pending(None)),
    }
}

/// The user took the profile off the list, or it was given up, while no node is found for the attempt.
fn is_replanned(job: &FineTuneJob, attempt: &Attempt) -> bool {
    let given_up = job.status.as_ref().map(|s| s.passed_over.as_slice()).unwrap_or_default();
    let allowed = &job.spec.accelerator.profiles;
    let profile = attempt.run.annotation(build::PROFILE);
    let placed = attempt.run.pods.first().is_some_and(|pod| pods::is_placed(pod));
    let named = |list: &[String], profile: &str| list.iter().any(|name| name == profile);
    !placed
        && profile.is_some_and(|profile| {
            named(given_up, profile) || (!allowed.is_empty() && !named(allowed, profile))
        })
}

fn hold(job: &FineTuneJob, used: &Usage) -> Option<Hold> {
    if job.spec.suspend {
        return Some(Hold::User);
    }
    let count = job.status.as_ref().and_then(|s| s.plan.as_ref()).and_then(|p| p.count).unwrap_or(1);
    over(job, used, count).map(Hold::Budget)
}

fn over(job: &FineTuneJob, used: &Usage, devices: i32) -> Option<String> {
    finetune::over(job.spec.budget.as_ref(), used.device_seconds, used.cost.as_ref(), devices.into())
}

/// True where Kueue lets the Jobs of this object start.
pub(super) fn is_queued(job: &FineTuneJob) -> bool {
    job.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(build::QUEUE))
}

/// The status has how it ended: Jobs go when their time has come.
fn afterwards(job: &FineTuneJob, observed: &Observed) -> Plan {
    let status = job.status.as_ref();
    let mut plan = Plan::at(Stage::Over);
    plan.attempt = status.and_then(|s| s.attempt);
    plan.usage = Usage {
        device_seconds: status.and_then(|s| s.device_seconds).unwrap_or(0),
        until: status.and_then(|s| s.accounted_until.as_ref()).map(|t| t.0.as_second()),
        cost: None,
    };
    let helpers = [&observed.check.job, &observed.summary.job];
    plan.writes.extend(helpers.into_iter().flatten().cloned().map(Write::CleanUp));
    let trained = observed.attempt.as_ref().and_then(|attempt| attempt.run.job.clone());
    let (Some(trained), Some(ttl)) = (trained, job.spec.ttl_seconds_after_finished) else { return plan };
    let ended = status.and_then(|s| s.completion_time.as_ref()).map_or(observed.now, |time| time.0);
    let due = ended.checked_add(SignedDuration::from_secs(ttl.into())).unwrap_or(ended);
    match wait(due, observed.now) {
        Some(wait) => Plan { next: Some(wait), ..plan },
        None => plan.write(Write::CleanUp(trained)),
    }
}
