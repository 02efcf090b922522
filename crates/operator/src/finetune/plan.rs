//! Which stage a job is in, and the writes that stage needs: decided from what is there now, nothing else.
use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use lathe_api::{FineTuneJob, Model, conditions};
use lathe_contract::{CheckDataReport, Outcome, Score, TrainProgress};
use lathe_resolve::{
    Rejection,
    finetune::{self, Checking, Dataset, TrainFacts, Training},
    inference::Images,
};

use super::{
    build,
    observe::{Attempt, Observed},
    usage::{self, Usage},
};
use crate::{
    job::{Run, State, advised, again_at},
    pods::Trouble,
};

/// Between two questions to a worker.
const ASK: Duration = Duration::from_secs(5);
/// Between two looks at a pod that waits for a device.
const LOOK: Duration = Duration::from_secs(30);

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
    /// A Job is of no use any more.
    Delete(Arc<Job>),
    /// Make the Job that repeats the last words of a pod that is gone.
    Summarise,
    /// Make the Model of the result, with its measurements.
    MakeModel(Box<Trained>, Vec<lathe_api::ScoreStatus>),
    /// Give a Model its measurements.
    Scores(Box<Model>, Vec<lathe_api::ScoreStatus>),
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

/// What a worker made, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// Where the artefact is, below the job's destination.
    pub uri: String,
    /// Its digest.
    pub digest: String,
    /// Of the dataset.
    pub dataset_digest: String,
    /// Of everything that decided the result.
    pub inputs_hash: Option<String>,
    /// True for an adapter.
    pub adapter: bool,
    /// What was accepted for the base holds for what was made of it.
    pub license: Option<lathe_api::LicenseSpec>,
}

/// Decides.
pub fn plan(job: &FineTuneJob, observed: &Observed, images: &Images) -> Plan {
    if job.status.as_ref().is_some_and(|status| status.completion_time.is_some()) {
        return afterwards(job, observed);
    }
    match &observed.attempt {
        Some(attempt) => carry_on(job, observed, attempt),
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
        }
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
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let next_attempt = status.and_then(|s| s.attempt).unwrap_or(0).saturating_add(1);
    let resolved = finetune::training(
        spec,
        &TrainFacts {
            name,
            attempt: next_attempt,
            base,
            profiles: &observed.profiles,
            images,
            dataset: digest
                .as_deref()
                .map(|digest| Dataset { tokens: checked.as_ref().map(|c| c.tokens), digest }),
        },
    );
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
    if let Some(plan) = output(job, observed, digest.is_some(), training.inputs_hash.as_deref()) {
        return known(plan);
    }
    if spec.suspend {
        return known(Plan::at(Stage::Held(Hold::User)));
    }
    if digest.is_none() {
        return known(check(job, observed, base));
    }
    if let Some(why) = usage::over(spec.budget.as_ref(), &used, training.count.into()) {
        return known(Plan::at(Stage::Held(Hold::Budget(why))));
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
        State::Complete(Some(outcome)) => match *outcome {
            Outcome::DataChecked(report) => Some(report),
            _ => None,
        },
        _ => None,
    }
}

/// The dataset has not been found good yet.
fn check(job: &FineTuneJob, observed: &Observed, base: &Model) -> Plan {
    let delete = |plan: Plan| match &observed.check.job {
        Some(check) => plan.write(Write::Delete(check.clone())),
        None => plan,
    };
    match observed.check.state() {
        State::Absent => match finetune::checking(&job.spec, base) {
            Ok(checking) => Plan::at(Stage::Checking(None)).write(Write::Check(Box::new(checking))),
            Err(rejection) => Plan::at(Stage::Rejected(rejection)),
        },
        State::Running | State::Suspended => Plan::at(Stage::Checking(None)),
        State::Waiting(trouble) => {
            let trouble = trouble.or_else(|| observed.check.slow_start(observed.now));
            Plan { next: Some(LOOK), ..Plan::at(Stage::Checking(advised(trouble))) }
        }
        // Its words were lost with its pod, or are not those of a check: once more.
        State::Complete(_) => delete(Plan::at(Stage::Checking(None))),
        State::Failed(trouble) => {
            let created = job.metadata.creation_timestamp.as_ref().map(|time| time.0);
            let failed = observed.check.ended().unwrap_or(observed.now);
            let plan = Plan::at(Stage::BadData(trouble));
            match wait(again_at(created, failed), observed.now) {
                Some(wait) => Plan { next: Some(wait), ..plan },
                // The rows may have been put right.
                None => delete(plan),
            }
        }
    }
}

/// A Model that has the output's name already: ours, an equal job's, or another one.
fn output(job: &FineTuneJob, observed: &Observed, checked: bool, hash: Option<&str>) -> Option<Plan> {
    let model = observed.output.as_ref()?;
    let theirs = model.spec.derived_from.as_ref().and_then(|d| d.inputs_hash.as_deref());
    if theirs.is_some() && !checked {
        return None;
    }
    if theirs.is_some() && theirs == hash {
        let scores = model.status.as_ref().map(|s| s.scores.clone()).unwrap_or_default();
        return Some(Plan::at(Stage::Finished { scores, progress: None, adopted: true }));
    }
    Some(Plan::at(Stage::Taken(taken(job))))
}

fn taken(job: &FineTuneJob) -> String {
    let name = &job.spec.output.model_name;
    format!(
        "Model {name} exists and was not made from the same inputs. Next: delete it, or make a new FineTuneJob with another `output.modelName`."
    )
}

/// There is a Job of the training.
fn carry_on(job: &FineTuneJob, observed: &Observed, attempt: &Attempt) -> Plan {
    let status = job.status.as_ref();
    let pods = attempt.run.pods.iter().map(|pod| &**pod);
    let used = usage::account(status, pods, &observed.profiles, observed.now);
    let plan = stage_of_attempt(job, observed, attempt, &used);
    // What it found is in the status.
    let mut writes = match &observed.check.job {
        Some(check) if status.is_some_and(|s| s.dataset_digest.is_some()) => {
            vec![Write::Delete(check.clone())]
        }
        _ => Vec::new(),
    };
    writes.extend(plan.writes);
    Plan { writes, checked: checked(&observed.check), attempt: Some(attempt.number), usage: used, ..plan }
}

fn stage_of_attempt(job: &FineTuneJob, observed: &Observed, attempt: &Attempt, used: &Usage) -> Plan {
    let Some(own) = attempt.run.job.clone() else { return Plan::at(Stage::Pending(None)) };
    let state = attempt.run.state();
    match state {
        State::Complete(Some(outcome)) => return conclude(job, observed, attempt, *outcome),
        State::Complete(None) => return recover(job, observed, attempt),
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
            let trouble = trouble.or_else(|| attempt.run.slow_start(observed.now));
            Plan { next: Some(LOOK), ..Plan::at(Stage::Pending(trouble)) }
        }
        _ => Plan::at(Stage::Pending(None)),
    }
}

/// The user took the profile off the list before a pod ran.
fn is_replanned(job: &FineTuneJob, attempt: &Attempt) -> bool {
    let allowed = &job.spec.accelerator.profiles;
    let profile = attempt.run.annotation(build::PROFILE);
    let scheduled = job.status.as_ref().is_some_and(|s| s.start_time.is_some());
    !scheduled
        && !allowed.is_empty()
        && profile.is_some_and(|profile| !allowed.iter().any(|name| name == profile))
}

fn hold(job: &FineTuneJob, used: &Usage) -> Option<Hold> {
    if job.spec.suspend {
        return Some(Hold::User);
    }
    let count = job.status.as_ref().and_then(|s| s.plan.as_ref()).and_then(|p| p.count).unwrap_or(1);
    usage::over(job.spec.budget.as_ref(), used, count.into()).map(Hold::Budget)
}

/// True where Kueue lets the Jobs of this object start.
pub(super) fn is_queued(job: &FineTuneJob) -> bool {
    job.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(build::QUEUE))
}

/// The pod is gone, and its words with it: they stand beside the artefact too.
fn recover(job: &FineTuneJob, observed: &Observed, attempt: &Attempt) -> Plan {
    match observed.summary.state() {
        State::Absent => Plan::at(Stage::Lost(None)).write(Write::Summarise),
        State::Running | State::Suspended => Plan::at(Stage::Lost(None)),
        State::Waiting(trouble) => Plan::at(Stage::Lost(advised(trouble))),
        State::Complete(Some(outcome)) => conclude(job, observed, attempt, *outcome),
        State::Complete(None) => match observed.summary.job.clone() {
            Some(summary) => Plan::at(Stage::Lost(None)).write(Write::Delete(summary)),
            None => Plan::at(Stage::Lost(None)),
        },
        State::Failed(trouble) => Plan::at(Stage::Failed(trouble)),
    }
}

/// The worker has said how it ended.
fn conclude(job: &FineTuneJob, observed: &Observed, attempt: &Attempt, outcome: Outcome) -> Plan {
    let Outcome::Trained { uri, digest, dataset_digest, scores, progress, model } = outcome else {
        return Plan::at(Stage::Failed(unexpected("they are not those of a training")));
    };
    let folder = finetune::output_folder(&job.spec).uri;
    if !is_below(&uri, &folder) || !is_digest(&digest) {
        let why = format!("they name {uri} ({digest}), which is no artefact below {folder}");
        return Plan::at(Stage::Failed(unexpected(&why)));
    }
    let trained = Trained {
        uri,
        digest,
        dataset_digest,
        inputs_hash: attempt.run.annotation(build::INPUTS).map(str::to_owned),
        adapter: model.shape.hidden == 0,
        license: observed.base.as_ref().and_then(|base| base.spec.license.clone()),
    };
    let scores: Vec<_> = scores.iter().filter_map(score).collect();
    let finished = Stage::Finished { scores: scores.clone(), progress: Some(progress), adopted: false };
    match &observed.output {
        None => Plan::at(finished).write(Write::MakeModel(Box::new(trained), scores)),
        Some(there) if is_same(there, &trained) => {
            let lacks = there.status.as_ref().is_none_or(|s| s.scores.is_empty()) && !scores.is_empty();
            let plan = Plan::at(finished);
            if lacks { plan.write(Write::Scores(Box::new(there.clone()), scores)) } else { plan }
        }
        Some(_) => Plan::at(Stage::Taken(taken(job))),
    }
}

fn is_same(there: &Model, trained: &Trained) -> bool {
    let theirs = there.spec.derived_from.as_ref().and_then(|d| d.inputs_hash.as_ref());
    theirs.is_some() && theirs == trained.inputs_hash.as_ref()
}

/// A worker's words become a Model's source: one plain folder below the destination, nothing else.
fn is_below(uri: &str, folder: &str) -> bool {
    let rest = uri.strip_prefix(folder.trim_end_matches('/')).and_then(|rest| rest.strip_prefix('/'));
    rest.is_some_and(|folder| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
        !folder.is_empty() && folder.len() <= 128 && !folder.starts_with('.') && folder.bytes().all(plain)
    })
}

fn is_digest(text: &str) -> bool {
    let hex = text.strip_prefix("sha256:");
    hex.is_some_and(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f')))
}

fn unexpected(why: &str) -> Trouble {
    let next = "Next: check that operator and worker image are of the same version.";
    let message = format!("the worker's last words cannot be used: {why}. {next}");
    Trouble { reason: "WorkerFailed".to_owned(), message, stalled: true }
}

/// A measurement as the API writes it; what is no finite number above zero is left out.
fn score(score: &Score) -> Option<lathe_api::ScoreStatus> {
    use lathe_contract::Metric as Told;
    let metric = match score.metric {
        Told::Perplexity => lathe_api::Metric::Perplexity,
        Told::BLEU => lathe_api::Metric::BLEU,
        Told::ROUGE1 => lathe_api::Metric::ROUGE1,
        Told::ROUGE2 => lathe_api::Metric::ROUGE2,
        Told::ROUGEL => lathe_api::Metric::ROUGEL,
    };
    let number = |value: Option<f64>| {
        value.filter(|v| (0.0..1e11).contains(v)).map(|v| lathe_api::Decimal(format!("{v:.4}")))
    };
    let (before, after) = (number(score.before), number(score.after));
    (before.is_some() || after.is_some()).then_some(lathe_api::ScoreStatus { metric, before, after })
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
    plan.writes.extend(helpers.into_iter().flatten().cloned().map(Write::Delete));
    let trained = observed.attempt.as_ref().and_then(|attempt| attempt.run.job.clone());
    let (Some(trained), Some(ttl)) = (trained, job.spec.ttl_seconds_after_finished) else { return plan };
    let ended = status.and_then(|s| s.completion_time.as_ref()).map_or(observed.now, |time| time.0);
    let due = ended.checked_add(SignedDuration::from_secs(ttl.into())).unwrap_or(ended);
    match wait(due, observed.now) {
        Some(wait) => Plan { next: Some(wait), ..plan },
        None => plan.write(Write::Delete(trained)),
    }
}

/// Time until `due`; `None` where it has come.
fn wait(due: Timestamp, now: Timestamp) -> Option<Duration> {
    Duration::try_from(due.duration_since(now)).ok().filter(|wait| !wait.is_zero())
}
