//! The summary and the full report beside an artefact.
//!
//! Below `<destination>/<modelName>/` an artefact lies in a folder named by its digest's hex digits. Its record
//! (`summary.json`, `report.json`) lies in `jobs/<uid>/`, where a lost summary is read again, and in `inputs/<hash>/`, where
//! a job with equal inputs finds that its work is done.
use lathe_contract::{
    Identity, MAX_SUMMARY_BYTES, Measured, Outcome, Score, SourceRef, Summary, TrainProgress, TrainTask,
};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Done, Halt, io};

const SUMMARY: &str = "summary.json";
const REPORT: &str = "report.json";

/// Everything that is known of a finished run.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FullReport<'a> {
    /// The object that was worked for, `kind namespace/name`.
    pub object: String,
    /// What was asked.
    pub task: &'a TrainTask,
    /// Digest of the base.
    pub base_digest: &'a str,
    /// Digest of the rows.
    pub dataset_digest: String,
    /// Hash of all inputs.
    pub inputs: &'a str,
    /// Digest of the artefact.
    pub digest: String,
    /// Rows that were learned from; a long text is several.
    pub training_rows: usize,
    /// Conversations of those whose end was cut at the sequence length.
    pub cut_rows: usize,
    /// What the scores are made from.
    pub measured: Measured,
    /// Measurements.
    pub scores: &'a [Score],
    /// Where training ended, with the curve of losses.
    pub progress: &'a TrainProgress,
    /// Questions with the answers of both models.
    pub answers: Vec<Sample<'a>>,
    /// What it ran on.
    pub environment: Environment,
    /// Bytes that the plan allotted, by what they are for.
    pub planned_bytes: lathe_plan::Totals,
}

/// A question and what the models made of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample<'a> {
    /// The prompt as the model reads it.
    pub prompt: String,
    /// The answer that was hoped for.
    pub reference: &'a str,
    /// The base's answer.
    pub before: &'a str,
    /// The tuned model's answer.
    pub after: &'a str,
}

/// What a run ran on.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Environment {
    /// Version of Lathe.
    pub lathe: &'static str,
    /// Kernel level of the engine; results are bit-equal within one.
    pub kernels: String,
    /// Threads.
    pub threads: usize,
}

impl Environment {
    /// That of a model in memory.
    pub fn of(model: &lathe_engine::Model) -> Self {
        let kernels = format!("{:?}", model.level());
        Environment { lathe: env!("CARGO_PKG_VERSION"), kernels, threads: model.threads() }
    }
}

/// Writes the record of a run under its inputs and its job.
///
/// # Errors
/// A failed write. A record of this job that is there already stays.
pub fn write(
    context: &Context,
    task: &TrainTask,
    identity: &Identity,
    outcome: &Outcome,
    report: &FullReport<'_>,
) -> Done<()> {
    let dir = context.scratch()?;
    let summary = Summary { outcome: outcome.clone() }.to_bytes();
    let report = serde_json::to_vec_pretty(report).map_err(std::io::Error::from);
    report
        .and_then(|report| std::fs::write(dir.path().join(REPORT), report))
        .and_then(|()| std::fs::write(dir.path().join(SUMMARY), &summary))
        .map_err(|error| io(&error, &format!("cannot write into {}", dir.path().display())))?;
    for place in [format!("inputs/{}", identity.inputs), job_place(&context.object.uid)?] {
        keep(context, task, dir.path(), &place)?;
    }
    Ok(())
}

fn keep(context: &Context, task: &TrainTask, dir: &std::path::Path, place: &str) -> Done<()> {
    let path = format!("{}/{place}", task.output.model_name);
    match context.publish(dir, &task.output.destination, &path) {
        Err(Halt::Failed(trouble)) if trouble.reason == "AlreadyExists" => {
            tracing::info!(path, "a record is there already and stays");
            Ok(())
        }
        kept => kept,
    }
}

/// The outcome of an earlier run with equal inputs whose artefact is still there. Its record becomes this job's too.
///
/// # Errors
/// The destination cannot be read.
pub fn of_inputs(context: &Context, task: &TrainTask, identity: &Identity) -> Done<Option<Outcome>> {
    let folder = below(&task.output.destination, &task.output.model_name);
    let found = read(context, &below(&folder, &format!("inputs/{}", identity.inputs)))?;
    let Some((Outcome::Trained { uri, digest, .. }, summary)) = found.as_ref().map(|(o, s)| (o, s)) else {
        return Ok(None);
    };
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    let artefact = below(&folder, hex);
    let there = match context.headers("artefact", &artefact) {
        Ok(headers) => headers.digest.is_some_and(|found| found.to_string() == *digest),
        Err(Halt::Stopped) => return Err(Halt::Stopped),
        Err(Halt::Failed(_)) => false,
    };
    if !there || *uri != artefact.uri {
        tracing::info!("an earlier run had equal inputs, but its artefact is gone");
        return Ok(None);
    }
    let dir = context.scratch()?;
    std::fs::write(dir.path().join(SUMMARY), summary)
        .map_err(|error| io(&error, &format!("cannot write into {}", dir.path().display())))?;
    keep(context, task, dir.path(), &job_place(&context.object.uid)?)?;
    Ok(found.map(|(outcome, _)| outcome))
}

/// The last words of the job `uid`, again; `folder` is `<destination>/<modelName>`.
///
/// # Errors
/// `NotFound`, or the folder cannot be read.
pub fn of_job(context: &Context, folder: &SourceRef, uid: &str) -> Done<Outcome> {
    let place = below(folder, &job_place(uid)?);
    match read(context, &place)? {
        Some((outcome, _)) => Ok(outcome),
        None => {
            let cause = format!("{} holds no summary of this job", place.uri);
            Err(Halt::user("NotFound", cause, "run the job again"))
        }
    }
}

/// The summary in a folder, parsed and as it is; none where there is none.
fn read(context: &Context, place: &SourceRef) -> Done<Option<(Outcome, Vec<u8>)>> {
    let mut headers = match context.headers("record", place) {
        Ok(headers) => headers,
        Err(Halt::Failed(trouble)) if trouble.reason == "NotFound" => return Ok(None),
        Err(halt) => return Err(halt),
    };
    let summary = headers.small.remove(SUMMARY).filter(|bytes| bytes.len() <= MAX_SUMMARY_BYTES);
    let outcome = summary.as_deref().and_then(|bytes| Summary::parse(bytes).ok());
    Ok(outcome.map(|summary| summary.outcome).zip(summary))
}

fn below(folder: &SourceRef, path: &str) -> SourceRef {
    let uri = format!("{}/{path}", folder.uri.trim_end_matches('/'));
    SourceRef { uri, revision: None, digest: None, secret_dir: folder.secret_dir.clone() }
}

/// A UID becomes a folder's name only where it looks like one.
fn job_place(uid: &str) -> Done<String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    if uid.is_empty() || uid.len() > 64 || !uid.bytes().all(plain) {
        let cause = "`object.uid` must be 1 to 64 letters, digits and dashes";
        return Err(Halt::user("InvalidContract", cause, "let the operator write the contract again"));
    }
    Ok(format!("jobs/{uid}"))
}
