//! `accelerator.fallbackAfter`: a pod that finds no room for so long makes way for one on the next profile, also where an
//! earlier pod ran: the next attempt goes on from its checkpoint.
use jiff::{SignedDuration, Timestamp};
use lathe_api::{AcceleratorProfile, FineTuneJob};
use lathe_resolve::{
    finetune::{self, TrainFacts},
    inference::Images,
};

use super::{
    build,
    observe::{Attempt, Observed},
    plan::{Plan, Stage},
};
use crate::{
    job::wait,
    pods::{Trouble, UNSCHEDULABLE, condition},
};

/// Gives the attempt's profile up where its time has come and another one holds the job; the status is written first, and
/// the attempt goes in the next round, so that nothing is forgotten by a crash between the two.
pub fn consider(
    plan: Plan,
    job: &FineTuneJob,
    observed: &Observed,
    attempt: &Attempt,
    images: &Images,
) -> Plan {
    let Some(due) = due(&plan.stage, job, attempt) else { return plan };
    let Some(current) = attempt.run.annotation(build::PROFILE) else { return plan };
    if !has_another(job, observed, current, images) {
        return plan;
    }
    match wait(due, observed.now) {
        None => Plan { passed_over: Some(current.to_owned()), next: Some(super::plan::ASK), ..plan },
        Some(wait) => {
            let next = plan.next.map_or(wait, |next| next.min(wait));
            Plan { falls_back: Some(due), next: Some(next), ..plan }
        }
    }
}

/// When the attempt has waited long enough; `None` where it may wait for ever.
fn due(stage: &Stage, job: &FineTuneJob, attempt: &Attempt) -> Option<Timestamp> {
    let Stage::Pending(Some(Trouble { reason, .. })) = stage else { return None };
    if reason != UNSCHEDULABLE {
        return None;
    }
    let patience = job.spec.accelerator.fallback_after.as_ref()?.seconds()?;
    let pod = attempt.run.pods.first()?;
    let since = condition(pod, "PodScheduled").and_then(|c| c.last_transition_time.as_ref());
    let since = since.or(pod.metadata.creation_timestamp.as_ref())?.0;
    since.checked_add(SignedDuration::from_secs(patience)).ok()
}

/// True where a profile that was not tried yet holds the job.
fn has_another(job: &FineTuneJob, observed: &Observed, current: &str, images: &Images) -> bool {
    let Some(base) = &observed.base else { return false };
    let status = job.status.as_ref();
    let mut passed = status.map(|s| s.passed_over.clone()).unwrap_or_default();
    passed.push(current.to_owned());
    let facts = TrainFacts {
        name: job.metadata.name.as_deref().unwrap_or_default(),
        attempt: attempt_after(job),
        base,
        profiles: &without(&observed.profiles, &passed),
        images,
        dataset: None,
    };
    finetune::training(&job.spec, &facts).is_ok()
}

fn attempt_after(job: &FineTuneJob) -> i32 {
    job.status.as_ref().and_then(|s| s.attempt).unwrap_or(0).saturating_add(1)
}

/// The profiles that were not given up.
pub fn without(profiles: &[AcceleratorProfile], passed: &[String]) -> Vec<AcceleratorProfile> {
    let given_up = |p: &&AcceleratorProfile| p.metadata.name.as_ref().is_some_and(|n| passed.contains(n));
    profiles.iter().filter(|p| !given_up(p)).cloned().collect()
}
