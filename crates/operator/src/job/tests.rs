use rstest::rstest;
use serde_json::{Value, json};

use super::*;

fn run(job_status: Value, pods: &[Value]) -> Run {
    let job: Job = serde_json::from_value(json!({
        "metadata": {"name": "j", "namespace": "ns", "uid": "job-uid"},
        "spec": {"suspend": false, "template": {}}, "status": job_status,
    }))
    .unwrap();
    let pods: Vec<Arc<Pod>> = pods
        .iter()
        .enumerate()
        .map(|(age, status)| {
            let pod = json!({
                "metadata": {"name": format!("p{age}"), "namespace": "ns", "uid": format!("pod-{age}"),
                    "creationTimestamp": format!("2026-01-01T00:0{age}:00Z"),
                    "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "job-uid", "controller": true}]},
                "spec": {"containers": [{"name": "worker", "resources": {"limits": {"memory": "1Gi"}}}]},
                "status": status,
            });
            Arc::new(serde_json::from_value(pod).unwrap())
        })
        .collect();
    Run::of(Arc::new(job), &pods)
}

fn ended(reason: &str, code: i32, words: Value) -> Value {
    json!({"phase": if code == 0 { "Succeeded" } else { "Failed" }, "containerStatuses": [{
        "name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 0, "lastState": {},
        "state": {"terminated": {"reason": reason, "exitCode": code, "message": if words.is_null() { String::new() } else { words.to_string() }}},
    }]})
}

fn stopped() -> Value {
    ended("Error", 75, json!({"outcome": {"stopped": {}}}))
}

fn failed(reason: &str) -> Value {
    ended("Error", 1, json!({"outcome": {"failed": {"reason": reason, "message": "m", "userError": false}}}))
}

fn condition_of(type_: &str) -> Value {
    json!({"conditions": [{"type": type_, "status": "True", "message": "Job has reached the limit.", "lastTransitionTime": "2026-01-01T00:00:00Z"}]})
}

#[rstest]
#[case::new(json!({}), &[], "Waiting(None)")]
#[case::starting(json!({}), &[json!({"phase": "Pending"})], "Waiting(None)")]
#[case::running(json!({}), &[failed("Unreachable"), json!({"phase": "Running"})], "Running")]
#[case::between_two_pods_the_last_cause_is_told(json!({}), &[failed("Unreachable")], "Unreachable")]
#[case::a_stop_is_no_trouble(json!({}), &[stopped()], "Waiting(None)")]
#[case::what_ended_a_pod_is_tried_again(json!({}), &[ended("OOMKilled", 137, Value::Null), json!({"phase": "Pending"})], "stalled: false")]
#[case::also_before_the_next_pod_is_made(json!({}), &[ended("OOMKilled", 137, Value::Null)], "stalled: false")]
#[case::done(condition_of("Complete"), &[ended("Completed", 0, json!({"outcome": {"inspected": {}}}))], "Inspected")]
#[case::done_after_a_stop(condition_of("Complete"), &[ended("Completed", 0, json!({"outcome": {"inspected": {}}})), stopped()], "Inspected")]
#[case::done_after_a_failure(condition_of("Complete"), &[failed("Unreachable"), ended("Completed", 0, json!({"outcome": {"inspected": {}}}))], "Inspected")]
#[case::done_after_a_failure_and_the_pod_is_gone(condition_of("Complete"), &[failed("Unreachable")], "ReportLost")]
#[case::done_and_the_pod_is_not_seen_to_its_end(condition_of("Complete"), &[failed("Unreachable"), json!({"phase": "Running"})], "Running")]
#[case::done_and_the_pod_is_gone(condition_of("Complete"), &[], "ReportLost")]
#[case::done_and_it_said_nothing(condition_of("Complete"), &[ended("Completed", 0, Value::Null)], "ReportLost")]
#[case::done_and_the_words_are_no_words(condition_of("Complete"), &[ended("Completed", 0, json!("?"))], "WorkerFailed")]
#[case::words_of_one_that_failed_do_not_matter(condition_of("Complete"), &[ended("Error", 101, json!("panicked"))], "ReportLost")]
#[case::failed_with_a_cause(condition_of("Failed"), &[failed("NotANumber")], "NotANumber")]
#[case::failed_for_memory(condition_of("Failed"), &[ended("OOMKilled", 137, Value::Null)], "OutOfMemory")]
#[case::failed_at_last_for_memory(condition_of("Failed"), &[failed("Unreachable"), ended("OOMKilled", 137, Value::Null)], "OutOfMemory")]
#[case::failed_without_a_trace(condition_of("Failed"), &[], "WorkerFailed")]
fn where_a_job_stands(#[case] status: Value, #[case] pods: &[Value], #[case] part: &str) {
    let found = format!("{:?}", run(status, pods).state());
    assert!(found.contains(part), "{found}");
}

#[rstest]
#[case::young(0, 10)]
#[case::after_two_minutes(120, 30)]
#[case::old(1_000_000, 600)]
fn a_failing_look_is_repeated_ever_less_often(#[case] failing: i64, #[case] pause: i64) {
    let created = Timestamp::from_second(1_000).unwrap();
    let failed = Timestamp::from_second(1_000 + failing).unwrap();
    assert_eq!(again_at(Some(created), failed).as_second(), 1_000 + failing + pause);
}

#[test]
fn a_job_of_an_earlier_object_of_the_same_name_is_not_ours() {
    let mut job = Job::default();
    job.metadata.name = Some("j".to_owned());
    let object: lathe_api::Model = serde_json::from_value(json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m", "namespace": "ns", "uid": "new"},
        "spec": {"source": {"uri": "pvc://a/b"}},
    }))
    .unwrap();
    let owner = Owner::of(&object);
    let reference = |uid: &str| OwnerReference { uid: uid.to_owned(), ..owner.reference.clone() };
    job.metadata.owner_references = Some(vec![reference("old")]);
    assert_eq!(Run::find(&owner, "j", &[Arc::new(job.clone())], &[]).state(), State::Absent);
    job.metadata.owner_references = Some(vec![reference("new")]);
    assert_eq!(Run::find(&owner, "j", &[Arc::new(job)], &[]).state(), State::Waiting(None));
}
