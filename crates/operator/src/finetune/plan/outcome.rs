//! What became of a training: the worker's words, believed as far as they can be, and the Model that has the output's name.
use lathe_api::{FineTuneJob, Model};
use lathe_contract::Outcome;
use lathe_resolve::{
    finetune::{self, Trained, failed_gates},
    to_score,
};

use super::{
    super::{
        build,
        observe::{Attempt, Observed},
    },
    Plan, Stage, Write,
};
use crate::{
    job::{State, advised, unexpected},
    pods::Trouble,
};

/// What a pod that looks for the report says where there is none and never will be; all else is looked at again.
const FINAL: [&str; 3] = ["NotFound", "InvalidLocation", "InvalidContract"];

/// A Model that has the output's name already: ours, an equal job's, or another one.
pub fn output(job: &FineTuneJob, observed: &Observed, checked: bool, hash: Option<&str>) -> Option<Plan> {
    let model = observed.output.as_ref()?;
    let theirs = model.spec.derived_from.as_ref().and_then(|d| d.inputs_hash.as_deref());
    if theirs.is_some() && !checked {
        return None;
    }
    if theirs.is_some() && theirs == hash {
        let scores = model.status.as_ref().map(|s| s.scores.clone()).unwrap_or_default();
        let passes = failed_gates(&job.spec.evaluation.gates, &scores).is_empty();
        let plan = Plan::at(Stage::Finished { scores, measured: None, progress: None, adopted: true });
        return Some(if passes { pass(plan, model) } else { plan });
    }
    Some(Plan::at(Stage::Taken(taken(job))))
}

fn taken(job: &FineTuneJob) -> String {
    let name = &job.spec.output.model_name;
    format!(
        "Model {name} exists and was not made from the same inputs. Next: delete it, or make a new FineTuneJob with another `output.modelName`."
    )
}

/// The pod is gone, and its words with it: they stand beside the artefact too.
pub fn recover(job: &FineTuneJob, observed: &Observed, attempt: &Attempt) -> Plan {
    match observed.summary.state() {
        State::Absent => Plan::at(Stage::Lost(None)).write(Write::Summarise),
        State::Running | State::Suspended => Plan::at(Stage::Lost(None)),
        State::Waiting(trouble) => Plan {
            next: Some(observed.summary.look_again(observed.now)),
            ..Plan::at(Stage::Lost(advised(trouble)))
        },
        State::Complete(Ok(outcome)) => conclude(job, observed, attempt, *outcome),
        State::Failed(trouble) if trouble.stalled && FINAL.contains(&trouble.reason.as_str()) => {
            Plan::at(Stage::Failed(trouble))
        }
        // The result is there: a hub or volume that does not answer, a node that went, must not lose it.
        State::Complete(Err(trouble)) | State::Failed(trouble) => look_again(observed, attempt, trouble),
    }
}

/// Says why the report is not read yet; after a while the next pod tries.
fn look_again(observed: &Observed, attempt: &Attempt, trouble: Trouble) -> Plan {
    let plan = Plan::at(Stage::Lost(Some(trouble)));
    match (observed.summary.again(attempt.run.ended(), observed.now), observed.summary.job.clone()) {
        (None, Some(summary)) => plan.write(Write::CleanUp(summary)),
        (next, _) => Plan { next, ..plan },
    }
}

/// The worker has said how it ended.
pub fn conclude(job: &FineTuneJob, observed: &Observed, attempt: &Attempt, outcome: Outcome) -> Plan {
    let Outcome::Trained { uri, digest, dataset_digest, scores, measured, progress, model } = outcome else {
        return Plan::at(Stage::Failed(unexpected("they are not those of a training")));
    };
    let folder = finetune::output_folder(&job.spec).uri;
    if !is_below(&uri, &folder) || !is_digest(&digest) {
        let why = format!("they name {uri} ({digest}), which is no artefact below {folder}");
        return Plan::at(Stage::Failed(unexpected(&why)));
    }
    let scores: Vec<_> = scores.iter().filter_map(to_score).collect();
    let trained = Trained {
        uri,
        digest,
        dataset_digest,
        inputs_hash: attempt.run.annotation(build::INPUTS).map(str::to_owned),
        adapter: model.shape.hidden == 0,
        license: observed.base.as_ref().and_then(|base| base.spec.license.clone()),
        failed_gates: failed_gates(&job.spec.evaluation.gates, &scores),
    };
    let finished = Stage::Finished {
        scores: scores.clone(),
        measured: Some(measured),
        progress: Some(progress),
        adopted: false,
    };
    match &observed.output {
        None => Plan::at(finished).write(Write::MakeModel(Box::new(trained), scores)),
        Some(there) if is_same(there, &trained) => {
            let lacks = there.status.as_ref().is_none_or(|s| s.scores.is_empty()) && !scores.is_empty();
            let mut plan = Plan::at(finished);
            if lacks {
                plan = plan.write(Write::Scores(Box::new(there.clone()), scores));
            }
            if trained.failed_gates.is_empty() { pass(plan, there) } else { plan }
        }
        Some(_) => Plan::at(Stage::Taken(taken(job))),
    }
}

/// The model passes this job's gates: what an equal job with other gates wrote of it goes.
fn pass(plan: Plan, model: &Model) -> Plan {
    let failed = model.spec.derived_from.as_ref().is_some_and(|d| !d.failed_gates.is_empty());
    if failed { plan.write(Write::Pass(Box::new(model.clone()))) } else { plan }
}

/// A Model that was made from the same inputs.
pub fn is_same(there: &Model, trained: &Trained) -> bool {
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
