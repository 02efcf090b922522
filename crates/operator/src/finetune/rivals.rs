//! Two jobs that would make the same Model: the one that is ahead trains, the other one waits before its Job is made, for its
//! work would end at a name that is taken.
use jiff::Timestamp;
use lathe_api::{FineTuneJob, conditions};

/// The other jobs of the namespace that name the same output.
pub fn of<'a>(job: &FineTuneJob, all: impl Iterator<Item = &'a FineTuneJob>) -> Vec<FineTuneJob> {
    let (meta, output) = (&job.metadata, &job.spec.output.model_name);
    let rival = |other: &&FineTuneJob| {
        other.metadata.namespace == meta.namespace
            && other.metadata.name != meta.name
            && other.spec.output.model_name == *output
    };
    all.filter(rival).cloned().collect()
}

/// The one that makes the Model before `job`, and what is said of that.
pub fn ahead(job: &FineTuneJob, rivals: &[FineTuneJob]) -> Option<String> {
    let first =
        rivals.iter().filter(|other| contends(other) && rank(other) < rank(job)).min_by_key(|o| rank(o))?;
    let name = first.metadata.name.as_deref().unwrap_or_default();
    let why = if has_begun(first) { "has begun" } else { "is older" };
    let model = &job.spec.output.model_name;
    let next = "Next: nothing where that one is to have the name (its result is adopted where the inputs are the same); else delete one of the two, or make a new FineTuneJob with another `output.modelName`.";
    Some(format!("FineTuneJob {name}, which {why}, makes Model {model} too. {next}"))
}

/// The lowest trains: what has begun is never overtaken.
fn rank(job: &FineTuneJob) -> (bool, Option<Timestamp>, Option<&str>) {
    let meta = &job.metadata;
    (!has_begun(job), meta.creation_timestamp.as_ref().map(|time| time.0), meta.name.as_deref())
}

fn has_begun(job: &FineTuneJob) -> bool {
    job.status.as_ref().is_some_and(|status| status.attempt.is_some())
}

/// One that has ended or is going makes no Model any more; one that cannot begin until a person acts keeps nobody waiting.
fn contends(job: &FineTuneJob) -> bool {
    let status = job.status.as_ref();
    let stalled = status.is_some_and(|s| conditions::is_true(&s.conditions, conditions::STALLED));
    let ended = status.is_some_and(|s| s.completion_time.is_some());
    !ended && job.metadata.deletion_timestamp.is_none() && (has_begun(job) || !stalled)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::object;

    fn job(over: Value) -> FineTuneJob {
        let mut job = json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": "m", "namespace": "ns", "uid": "u", "creationTimestamp": "2026-01-01T00:00:05Z"},
            "spec": {"baseModelRef": {"name": "base"}, "dataset": {"train": {"uri": "pvc://d/t.jsonl"}}, "output": {"modelName": "out"}},
        });
        json_patch::merge(&mut job, &over);
        object(job)
    }

    fn at(name: &str, second: &str) -> Value {
        json!({"metadata": {"name": name, "creationTimestamp": format!("2026-01-01T00:00:{second}Z")}})
    }

    fn with(mut older: Value, over: Value) -> Value {
        json_patch::merge(&mut older, &over);
        older
    }

    fn stalled() -> Value {
        json!({"conditions": [{"type": "Stalled", "status": "True", "reason": "R", "message": "m",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}]})
    }

    #[rstest]
    #[case::older(at("z", "04"), Some("z, which is older,"))]
    #[case::younger(at("a", "06"), None)]
    #[case::of_the_same_second_by_name(at("a", "05"), Some("a, which is older,"))]
    #[case::of_the_same_second_the_other_way(at("z", "05"), None)]
    #[case::itself(at("m", "04"), None)]
    #[case::other_namespace(with(at("z", "04"), json!({"metadata": {"namespace": "other"}})), None)]
    #[case::other_output(with(at("z", "04"), json!({"spec": {"output": {"modelName": "x"}}})), None)]
    #[case::ended(with(at("z", "04"), json!({"status": {"attempt": 1, "completionTime": "2026-01-01T01:00:00Z"}})), None)]
    #[case::going(with(at("z", "04"), json!({"metadata": {"deletionTimestamp": "2026-01-01T01:00:00Z"}})), None)]
    #[case::younger_and_begun(with(at("a", "06"), json!({"status": {"attempt": 1}})), Some("a, which has begun,"))]
    #[case::cannot_begin(with(at("z", "04"), json!({"status": stalled()})), None)]
    #[case::stopped_after_it_began(
        with(at("z", "04"), json!({"status": with(stalled(), json!({"attempt": 1}))})), Some("z, which has begun,"))]
    fn who_is_ahead(#[case] other: Value, #[case] expected: Option<&str>) {
        let (own, other) = (job(json!({})), job(other));
        let found = ahead(&own, &of(&own, [&own, &other].into_iter()));
        assert_eq!(found.is_some(), expected.is_some(), "{found:?}");
        let told = found
            .zip(expected)
            .is_none_or(|(found, words)| found.contains(words) && found.contains("Next: "));
        assert!(told, "{expected:?}");
    }

    #[rstest]
    #[case::neither(json!({}), json!({}))]
    #[case::one_has_begun(json!({"status": {"attempt": 1}}), json!({}))]
    #[case::both_have_begun(json!({"status": {"attempt": 2}}), json!({"status": {"attempt": 1}}))]
    fn of_two_exactly_one_waits(#[case] a: Value, #[case] b: Value) {
        let (a, b) = (job(a), job(with(at("z", "05"), b)));
        let waits = |own: &FineTuneJob| ahead(own, &of(own, [&a, &b].into_iter())).is_some();
        assert_eq!((waits(&a), waits(&b)), (false, true));
    }
}
