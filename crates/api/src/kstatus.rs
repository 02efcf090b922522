//! How others read our status: the rules of kstatus, by which Flux and others wait for an object.
//!
//! For tests, which hold every recorded object against them, and for tools that wait as Flux does
//! (<https://github.com/kubernetes-sigs/cli-utils/blob/master/pkg/kstatus/status/generic.go>).
use serde_json::Value;

/// What kstatus makes of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kstatus {
    /// It is being deleted.
    Terminating,
    /// Work goes on.
    InProgress,
    /// A person must act.
    Failed,
    /// It is as its spec says.
    Current,
}

/// Computes it from an object as the API server gives it.
#[must_use]
pub fn kstatus(object: &Value) -> Kstatus {
    let (meta, status) = (&object["metadata"], &object["status"]);
    if !meta["deletionTimestamp"].is_null() {
        return Kstatus::Terminating;
    }
    let observed = &status["observedGeneration"];
    if !observed.is_null() && observed != &meta["generation"] {
        return Kstatus::InProgress;
    }
    let condition = |type_: &str| {
        let all = status["conditions"].as_array();
        let found = all.and_then(|all| all.iter().find(|condition| condition["type"] == type_));
        found.and_then(|condition| condition["status"].as_str())
    };
    if condition("Reconciling") == Some("True") {
        return Kstatus::InProgress;
    }
    if condition("Stalled") == Some("True") {
        return Kstatus::Failed;
    }
    match condition("Ready") {
        Some("True") | None => Kstatus::Current,
        Some(_) => Kstatus::InProgress,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn object(observed: i64, conditions: &[(&str, &str)]) -> Value {
        let conditions: Vec<Value> =
            conditions.iter().map(|(type_, status)| json!({"type": type_, "status": status})).collect();
        json!({
            "metadata": {"generation": 2},
            "status": {"observedGeneration": observed, "conditions": conditions},
        })
    }

    #[rstest]
    #[case::nobody_came_yet(-1, &[], Kstatus::InProgress)]
    #[case::of_the_spec_before(1, &[("Ready", "True")], Kstatus::InProgress)]
    #[case::at_work(2, &[("Reconciling", "True"), ("Stalled", "True")], Kstatus::InProgress)]
    #[case::stuck(2, &[("Reconciling", "False"), ("Stalled", "True"), ("Ready", "True")], Kstatus::Failed)]
    #[case::not_ready(2, &[("Ready", "Unknown")], Kstatus::InProgress)]
    #[case::ready(2, &[("Reconciling", "False"), ("Stalled", "False"), ("Ready", "True")], Kstatus::Current)]
    #[case::no_summary(2, &[], Kstatus::Current)]
    fn as_cli_utils_says(
        #[case] observed: i64,
        #[case] conditions: &[(&str, &str)],
        #[case] expected: Kstatus,
    ) {
        assert_eq!(kstatus(&object(observed, conditions)), expected);
    }

    #[test]
    fn what_is_deleted_is_going() {
        assert_eq!(kstatus(&json!({"metadata": {"deletionTimestamp": "now"}})), Kstatus::Terminating);
    }
}
