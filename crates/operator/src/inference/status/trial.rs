//! What the conditions say of a roll-out with a candidate.
use k8s_openapi::api::core::v1::Pod;
use lathe_api::{RevisionsStatus, RolloutPhase, RolloutStatus, names};

use super::{Facts, GATE_FAILED, Said, trouble_among};
use crate::{
    inference::{build::revision, rollout},
    pods::Trouble,
    scaling::is_candidate,
};

/// Revisions that run.
pub fn revisions(facts: &Facts<'_>) -> Option<RevisionsStatus> {
    // An answer of the API server without a template is no news.
    let told = || facts.service.status.as_ref()?.revisions.as_ref()?.stable.clone();
    let stable = facts.deployment.map(|made| revision(made).map(names::revision).or_else(told))??;
    let candidate = facts.rollout.filter(|status| rollout::has_candidate(Some(status)));
    Some(RevisionsStatus { stable: Some(stable), candidate: candidate.map(|status| status.revision.clone()) })
}

/// While the stable revision is kept: why.
pub fn tried(facts: &Facts<'_>) -> Option<Said> {
    let status = facts.rollout?;
    let stable = facts.deployment.and_then(revision).map(names::revision).unwrap_or_default();
    match status.phase {
        RolloutPhase::Starting => {
            let so_far = match status.percent {
                0 => "nobody is sent to it yet".to_owned(),
                percent => format!("it answers {percent} % of the users"),
            };
            let message = format!(
                "candidate {} starts beside {stable}, which goes on; {so_far}, step {} begins when its replicas are ready",
                status.revision, status.step
            );
            Some(match trouble(facts) {
                Some(trouble) => Said::new(false, &trouble.reason, format!("{message}: {}", trouble.message)),
                None => Said::new(false, "CanaryStarting", format!("{message}.")),
            })
        }
        RolloutPhase::Testing => {
            let rules = facts.service.spec.rollout.as_ref()?;
            let doing = rollout::doing(rules, status, &stable)?;
            Some(match trouble(facts) {
                Some(trouble) => {
                    Said::new(false, &trouble.reason, format!("{doing} Of its pods: {}", trouble.message))
                }
                None => Said::new(false, "Canary", doing),
            })
        }
        RolloutPhase::Failed => Some(Said::new(false, GATE_FAILED, message(status))),
        RolloutPhase::Promoting | RolloutPhase::Promoted => None,
    }
}

/// A candidate that needs a person.
pub fn stalled(facts: &Facts<'_>) -> Option<Said> {
    let status = facts.rollout.filter(|status| rollout::holds_back(Some(status)))?;
    match status.phase {
        RolloutPhase::Failed => Some(Said::new(true, GATE_FAILED, message(status))),
        _ => trouble(facts).filter(|trouble| trouble.stalled).map(|trouble| {
            Said::new(true, &trouble.reason, format!("candidate {}: {}", status.revision, trouble.message))
        }),
    }
}

/// Every replica is what it should be; with the numbers of the candidate that it was.
pub fn done(facts: &Facts<'_>) -> String {
    let promoted = facts.rollout.filter(|status| status.phase == RolloutPhase::Promoted);
    match promoted.map(message) {
        Some(why) => format!("every replica is as the spec says: {why}"),
        None => "every replica is as the spec says.".to_owned(),
    }
}

fn message(status: &RolloutStatus) -> &str {
    status.message.as_deref().unwrap_or_default()
}

/// What is wrong with the candidate's pods.
fn trouble(facts: &Facts<'_>) -> Option<Trouble> {
    trouble_among(facts, facts.pods.iter().filter(|pod: &&Pod| is_candidate(pod)))
}
