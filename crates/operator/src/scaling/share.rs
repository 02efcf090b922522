//! Pure: how the replicas of a service are shared out while a candidate runs beside its stable revision.
use std::borrow::Borrow;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use lathe_api::{InferenceService, RolloutPhase, RolloutStatus, names};

use crate::pods;

/// Replicas of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// That are asked for, whatever their revision.
    pub all: i32,
    /// Of the service's Deployment.
    pub stable: i32,
    /// Of the candidate's.
    pub candidate: i32,
}

impl Shares {
    /// Of `all`, the candidate gets the share of its users, rounded up. The stable revision gives up as many as of those are `ready`,
    /// and never its last one, so that nobody is answered by fewer than before. Once the candidate is promoted it is whole again.
    pub fn of(all: i32, rollout: Option<(&RolloutStatus, i32)>, ready: i32) -> Self {
        let whole = Self { all, stable: all, candidate: 0 };
        let Some((status, percent)) = rollout.filter(|_| all > 0) else { return whole };
        let candidate = candidates(all, percent);
        match status.phase {
            RolloutPhase::Promoted | RolloutPhase::Failed => whole,
            RolloutPhase::Promoting => Self { candidate, ..whole },
            RolloutPhase::Starting | RolloutPhase::Testing => {
                Self { all, stable: (all - ready.clamp(0, candidate)).max(1), candidate }
            }
        }
    }

    /// As [`Shares::of`], by what the service says of its roll-out.
    pub fn now(service: &InferenceService, rollout: Option<&RolloutStatus>, all: i32, ready: i32) -> Self {
        let percent = |status: &RolloutStatus| step_percent(service, status);
        Self::of(all, rollout.and_then(|status| Some((status, percent(status)?))), ready)
    }
}

/// Of so many replicas, those of a candidate that answers so many percent of the users.
pub fn candidates(all: i32, percent: i32) -> i32 {
    let share = (i64::from(all) * i64::from(percent) + 99) / 100;
    i32::try_from(share).unwrap_or(all).clamp(1, all.max(1))
}

/// Percent of the step that the roll-out is in, or prepares for.
fn step_percent(service: &InferenceService, status: &RolloutStatus) -> Option<i32> {
    service.spec.rollout.as_ref()?.step(status.step).map(|(_, step)| step.percent)
}

/// Whether a pod's revision is tried beside the stable one.
pub fn is_candidate(pod: &Pod) -> bool {
    pod.labels().get(names::LABEL_TRACK).is_some_and(|track| track == names::CANDIDATE)
}

/// The candidate's pods that take requests.
pub fn ready_candidates<P: Borrow<Pod>>(pods: &[P]) -> i32 {
    let ready = pods.iter().map(Borrow::borrow).filter(|pod| is_candidate(pod) && pods::is_ready(pod));
    i32::try_from(ready.count()).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::testing::object;

    fn status(phase: RolloutPhase) -> RolloutStatus {
        object(
            json!({"revision": "b", "rules": "r", "phase": phase, "step": 1, "percent": 0, "since": 0, "counted": 0}),
        )
    }

    #[rstest]
    #[case::one_beside_the_only_one(1, 10, 0, (1, 1))]
    #[case::the_only_one_stays(1, 100, 1, (1, 1))]
    #[case::none_is_given_up_before_another_is_ready(4, 50, 0, (4, 2))]
    #[case::one_for_one(4, 50, 1, (3, 2))]
    #[case::shared(4, 50, 2, (2, 2))]
    #[case::more_than_its_share_counts_for_nothing(4, 25, 3, (3, 1))]
    #[case::rounded_up(10, 11, 2, (8, 2))]
    #[case::asleep(0, 50, 0, (0, 0))]
    #[case::many(10_000, 100, 10_000, (1, 10_000))]
    fn replicas_are_shared_as_users_are(
        #[case] all: i32,
        #[case] percent: i32,
        #[case] ready: i32,
        #[case] (stable, candidate): (i32, i32),
    ) {
        for phase in [RolloutPhase::Starting, RolloutPhase::Testing] {
            let shares = Shares::of(all, Some((&status(phase), percent)), ready);
            assert_eq!(shares, Shares { all, stable, candidate });
        }
        let promoting = Shares::of(all, Some((&status(RolloutPhase::Promoting), percent)), ready);
        assert_eq!(promoting, Shares { all, stable: all, candidate });
        for over in [RolloutPhase::Promoted, RolloutPhase::Failed] {
            assert_eq!(Shares::of(all, Some((&status(over), percent)), ready), Shares::of(all, None, 0));
        }
    }

    /// Whatever is ready, no fewer answer than were asked for, as soon as those that are asked for are ready.
    #[test]
    fn nobody_is_answered_by_fewer_than_before() {
        for all in 1..=12 {
            for (percent, ready) in (1..=100).flat_map(|percent| (0..=12).map(move |ready| (percent, ready)))
            {
                let shares = Shares::of(all, Some((&status(RolloutPhase::Testing), percent)), ready);
                assert!(shares.stable >= 1 && shares.candidate >= 1);
                assert!(shares.stable + ready.min(shares.candidate) >= all, "{all} {percent} {ready}");
                assert!(shares.stable + shares.candidate <= all + shares.candidate);
            }
        }
    }
}
