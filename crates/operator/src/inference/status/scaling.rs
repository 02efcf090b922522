//! What the conditions say of the number of replicas.
use lathe_api::{InferenceService, ScalingBlock, conditions::State};

use super::{Facts, Said};
use crate::scaling::{asked, begin};

/// Replicas that there are to be.
pub fn wanted(facts: &Facts<'_>) -> i32 {
    match &facts.service.spec.autoscaling {
        None => facts.service.spec.replicas,
        Some(_) => facts.deployment.map_or_else(
            || begin(facts.service),
            |deployment| i32::try_from(asked(deployment)).unwrap_or(i32::MAX),
        ),
    }
}

/// A service that is to have no replica: the user has stopped it, or nobody asks it.
pub fn at_rest(service: &InferenceService, state: impl Into<State>) -> Said {
    let (reason, message) = match service.spec.autoscaling {
        None => ("Stopped", "stopped, as `spec.replicas: 0` asks. Next: raise it to start the service."),
        Some(_) => {
            ("ScaledToZero", "nobody asks, so no replica runs: the next request is held and wakes one.")
        }
    };
    Said::new(state, reason, message)
}

/// Who decides how many replicas there are, and what keeps it from deciding.
pub fn active(service: &InferenceService) -> Said {
    let Some(autoscaling) = &service.spec.autoscaling else {
        return Said::new(false, "Manual", "`spec.replicas` alone decides how many replicas there are.");
    };
    let (min, max) = (autoscaling.min_replicas, autoscaling.max_replicas);
    let bounds =
        format!("between {min} and {max} replicas by the tokens that flow; `spec.replicas` is left alone");
    let Some(scaling) = service.status.as_ref().and_then(|status| status.scaling.as_ref()) else {
        return Said::new(State::Unknown, "NotDecided", format!("{bounds}. Nothing was decided yet."));
    };
    let (reason, message) = match scaling.blocked {
        None => return Said::new(true, "FollowsThroughput", format!("{bounds}.")),
        Some(ScalingBlock::ReportsLate) => (
            "ReportsLate",
            "nothing is heard of what flows, so the replicas stay as they are. Next: look at the gateways' pods, or with \
             `access: Direct` at the service's own.",
        ),
        Some(ScalingBlock::ReportsMissing) => (
            "ReportsMissing",
            "not every pod says what flows, so no replica is given back. Next: look at the gateways' pods, or with \
             `access: Direct` at the service's own.",
        ),
        Some(ScalingBlock::CapacityUnknown) => (
            "CapacityUnknown",
            "no replica has measured its throughput yet, so the replicas stay as they are.",
        ),
        Some(ScalingBlock::WriteRefused) => (
            "WriteRefused",
            scaling.message.as_deref().unwrap_or("the API server refuses the number that was decided."),
        ),
    };
    Said::new(false, reason, format!("{bounds}. Now {message}"))
}
