//! What is said: where the job stands, one true cause and the next step.
mod lines;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use lathe_api::{
    CheckpointStatus, Duration, FineTuneJob, FineTuneJobStatus, NameRef, ProgressStatus, RestartStatus,
    conditions,
};
use lathe_contract::TrainProgress;
use lathe_resolve::finetune;

use super::{
    observe::Observed,
    plan::{Plan, Stage},
    usage::Usage,
};
use crate::pods::Trouble;
use lines::Line;

/// The whole status. `refused`: why a write of this round was not taken at all.
pub fn status(
    job: &FineTuneJob,
    observed: &Observed,
    plan: &Plan,
    refused: Option<&Trouble>,
) -> FineTuneJobStatus {
    let mut fresh = job.status.clone().unwrap_or_default();
    let generation = job.metadata.generation.unwrap_or(0);
    fresh.observed_generation = generation;
    fresh.method = Some(finetune::method_name(&job.spec));
    facts(&mut fresh, &job.spec.output.model_name, observed, plan, refused);
    let lines = lines::lines(job, &fresh, observed, plan, refused);
    for (type_, line) in lines {
        let known = conditions::find(&fresh.conditions, type_).cloned();
        // Nothing new: what was said stands, for this generation too.
        let old =
            || known.map(|c| Line { state: lines::state(&c.status), reason: c.reason, message: c.message });
        let Line { state, reason, message } = line.or_else(old).unwrap_or_else(lines::unknown);
        conditions::set(&mut fresh.conditions, type_, state, &reason, &message, generation, observed.now);
    }
    fresh
}

/// True where nothing differs but how far the work is.
pub fn only_progress(old: &FineTuneJobStatus, fresh: &FineTuneJobStatus) -> bool {
    let still = |status: &FineTuneJobStatus| {
        let mut status = status.clone();
        status.progress = None;
        status.restarts = None;
        status.device_seconds = None;
        status.accounted_until = None;
        status.cost = None;
        for condition in &mut status.conditions {
            // The phase's words count up with the work; its reason does not.
            condition.message.clear();
        }
        status
    };
    still(old) == still(fresh)
}

/// Everything but the conditions.
fn facts(
    fresh: &mut FineTuneJobStatus,
    output: &str,
    observed: &Observed,
    plan: &Plan,
    refused: Option<&Trouble>,
) {
    if let Some(training) = &plan.training {
        fresh.plan = Some(training.plan.clone());
        // Taken up again where nothing else was left.
        fresh.passed_over.retain(|profile| Some(profile) != training.plan.profile.as_ref());
    }
    if let Some(profile) = plan.passed_over.as_ref().filter(|p| !fresh.passed_over.contains(p)) {
        fresh.passed_over.push(profile.clone());
    }
    if let Some(checked) = &plan.checked {
        fresh.dataset_digest = Some(checked.digest.chars().take(71).collect());
    }
    // An attempt that was not made does not count.
    if refused.is_none() {
        fresh.attempt = plan.attempt.or(fresh.attempt);
    }
    used(fresh, &plan.usage);
    if fresh.start_time.is_none() {
        let pods = observed.attempt.iter().flat_map(|attempt| &attempt.run.pods);
        let starts = pods.filter_map(|pod| pod.status.as_ref()?.start_time.clone());
        fresh.start_time = starts.min();
    }
    if let Some(progress) = observed.report.as_ref().and_then(|report| report.progress.as_ref()) {
        moved(fresh, progress);
    }
    match &plan.stage {
        Stage::Finished { scores, progress, .. } if refused.is_none() => {
            fresh.scores = scores.clone();
            fresh.model_ref = Some(NameRef { name: output.to_owned() });
            if let Some(progress) = progress {
                moved(fresh, progress);
            }
            fresh.completion_time = Some(Time(observed.now));
        }
        Stage::Failed(_) => fresh.completion_time = Some(Time(observed.now)),
        _ => {}
    }
}

fn used(fresh: &mut FineTuneJobStatus, usage: &Usage) {
    if usage.device_seconds > 0 {
        fresh.device_seconds = Some(usage.device_seconds);
    }
    fresh.accounted_until = usage.until.and_then(|s| Timestamp::from_second(s).ok()).map(Time);
    if let Some((cost, currency)) = &usage.cost {
        fresh.cost = Some(format!("{cost:.2} {currency}"));
    }
}

/// A worker's numbers, bounded as the schema bounds them.
fn moved(fresh: &mut FineTuneJobStatus, progress: &TrainProgress) {
    const MOST: i64 = (1 << 53) - 1;
    let count = |value: i64| value.clamp(0, MOST);
    let (step, steps) = (count(progress.step), count(progress.steps));
    let percent = step.saturating_mul(100).checked_div(steps).unwrap_or(0);
    let number = |value: f64, digits: usize| {
        (value.is_finite() && value.abs() < 1e12).then(|| format!("{value:.digits$}"))
    };
    let checkpoint = CheckpointStatus {
        step: count(progress.checkpoint_step),
        digest: progress.checkpoint_digest.clone(),
    };
    fresh.progress = Some(ProgressStatus {
        summary: format!("{step}/{steps} {percent}%"),
        step,
        steps,
        tokens: count(progress.tokens),
        tokens_per_second: number(progress.tokens_per_second, 0).filter(|_| progress.tokens_per_second > 0.0),
        loss: number(progress.loss, 4).filter(|_| step > 0),
        remaining: remaining(progress.remaining_seconds),
        last_checkpoint: (checkpoint.step > 0).then_some(checkpoint),
    });
    let restarts = RestartStatus {
        count: progress.restarts.clamp(0, 1_000_000),
        lost_steps: count(progress.lost_steps),
    };
    fresh.restarts = (restarts.count > 0).then_some(restarts);
}

fn remaining(seconds: f64) -> Option<Duration> {
    if !(1.0..1e9).contains(&seconds) {
        return None;
    }
    let seconds = seconds as i64;
    Some(Duration(match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, m, _) => format!("{h}h{m}m"),
    }))
}
