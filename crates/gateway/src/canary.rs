//! Who is answered by the candidate of a roll-out: a share of the users, each of whom stays on one side. A higher share takes users
//! from the stable revision alone, and another candidate gets others. Every gateway says the same.
use lathe_api::{InferenceService, RolloutPhase};
use lathe_contract::MAX_REVISION_BYTES;

use crate::balance;

/// Two revisions of a service that answer at the same time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canary {
    /// The stable one's name.
    pub stable: String,
    /// The candidate's.
    pub candidate: String,
    /// Of a hundred users, so many are the candidate's.
    pub percent: u64,
}

/// Whose request it is.
#[derive(Clone, Copy, Debug)]
pub struct User<'a> {
    /// The key's name; `None`: there are no keys.
    pub key: Option<&'a str>,
    /// What the request names as `user`: one of those who share the key.
    pub named: Option<&'a str>,
    /// The prompt's beginning, by which a conversation of somebody unknown is told from others.
    pub beginning: &'a [u8],
}

impl Canary {
    /// As the operator says it; `None`: nobody is sent to a candidate.
    pub fn of(object: &InferenceService) -> Option<Self> {
        let status = object.status.as_ref()?;
        let (rollout, revisions) = (status.rollout.as_ref()?, status.revisions.as_ref()?);
        let percent = u64::try_from(rollout.percent).ok().filter(|percent| (1..=100).contains(percent))?;
        let over = matches!(rollout.phase, RolloutPhase::Promoted | RolloutPhase::Failed);
        let (stable, candidate) = (revisions.stable.clone()?, rollout.revision.clone());
        let named = [&stable, &candidate].iter().all(|name| name.len() <= MAX_REVISION_BYTES);
        (named && !over).then_some(Self { stable, candidate, percent })
    }

    /// Whether the candidate of this service is to answer this user.
    pub fn takes(&self, service: &str, user: User<'_>) -> bool {
        // Anybody may name a user as he likes; the key before it keeps those of others apart.
        let who = match (user.key, user.named) {
            (None, None) => balance::key(service, &self.candidate, user.beginning),
            (key, named) => {
                let key = balance::key(service, &self.candidate, key.unwrap_or_default().as_bytes());
                named.map_or(key, |named| balance::with(key, named.as_bytes()))
            }
        };
        balance::mixed(who) % 100 < self.percent
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{object, service};

    fn canary(percent: u64) -> Canary {
        Canary { stable: "old".into(), candidate: "new".into(), percent }
    }

    fn named(name: &str) -> User<'_> {
        User { key: Some("k"), named: Some(name), beginning: b"" }
    }

    #[test]
    fn a_higher_share_takes_users_from_the_stable_revision_alone() {
        let users: Vec<String> = (0..2000).map(|n| format!("user-{n}")).collect();
        let mut before = vec![false; users.len()];
        for percent in [0, 1, 10, 25, 50, 99, 100] {
            let now: Vec<bool> = users.iter().map(|user| canary(percent).takes("uid", named(user))).collect();
            assert!(before.iter().zip(&now).all(|(before, now)| *now || !before), "{percent}");
            let share = now.iter().filter(|candidate| **candidate).count() as f64 / users.len() as f64;
            // Four standard deviations.
            let p = percent as f64 / 100.0;
            assert!(
                (share - p).abs() <= 4.0 * (p * (1.0 - p) / users.len() as f64).sqrt(),
                "{percent}: {share}"
            );
            before = now;
        }
    }

    #[test]
    fn a_key_stays_on_one_side_unless_its_requests_name_their_users() {
        let side = |user: User<'_>| canary(50).takes("uid", user);
        let of_key = |n: u8| side(User { key: Some("k"), named: None, beginning: &[n] });
        assert!((0..100).all(|n| of_key(n) == of_key(0)));
        let conversations = (0..100u8).filter(|n| side(User { key: None, named: None, beginning: &[*n] }));
        assert!((20..80).contains(&conversations.count()));
        // Another candidate or service is tried on others.
        let users: Vec<String> = (0..200).map(|n| n.to_string()).collect();
        let moved = |service: &str, candidate: &str| {
            let other = Canary { candidate: candidate.into(), ..canary(50) };
            users.iter().filter(|user| other.takes(service, named(user)) != side(named(user))).count()
        };
        assert!(moved("uid", "other") > 50 && moved("other", "new") > 50);
        assert_eq!(moved("uid", "new"), 0);
    }

    #[rstest]
    #[case::testing("/rollout/phase", json!("Testing"), true)]
    #[case::promoting("/rollout/phase", json!("Promoting"), true)]
    #[case::next_step("/rollout/phase", json!("Starting"), true)]
    #[case::promoted("/rollout/phase", json!("Promoted"), false)]
    #[case::failed("/rollout/phase", json!("Failed"), false)]
    #[case::nobody_yet("/rollout/percent", json!(0), false)]
    #[case::nonsense("/rollout/percent", json!(101), false)]
    #[case::a_long_name("/rollout/revision", json!("x".repeat(33)), false)]
    #[case::without_a_stable_one("/revisions", json!(null), false)]
    fn the_operators_word_counts(#[case] field: &str, #[case] value: Value, #[case] is: bool) {
        let mut status = json!({
            "modelIds": ["s"], "revisions": {"stable": "old", "candidate": "new"},
            "rollout": {"revision": "new", "rules": "r", "phase": "Testing", "step": 1, "percent": 10, "since": 1, "counted": 1},
        });
        *status.pointer_mut(field).unwrap() = value;
        let mut service = service("a", "s", &[], &["s"]);
        service.status = Some(object(status));
        assert_eq!(Canary::of(&service), is.then(|| canary(10)));
    }
}
