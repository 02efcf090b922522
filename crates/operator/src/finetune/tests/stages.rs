//! What is there -> what is done and said.
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use lathe_api::conditions::{RECONCILING, STALLED, SUCCEEDED};
use lathe_resolve::inference::Images;
use rstest::rstest;

use super::{super::*, *};
use crate::{
    finetune::{
        observe::{Attempt, Observed},
        plan::Plan,
    },
    job::Run,
};

/// A world with what is named in it, at a fixed time.
fn world(parts: impl FnOnce(&mut Observed)) -> Observed {
    let mut observed = Observed {
        now: "2026-01-01T01:00:00Z".parse().expect("a time"),
        base: Some(model("base", json!({}))),
        profiles: profiles(),
        ..Observed::default()
    };
    parts(&mut observed);
    observed
}

fn run(job: Job, pods: Vec<Pod>) -> Run {
    let pods: Vec<Arc<Pod>> = pods.into_iter().map(Arc::new).collect();
    Run::of(Arc::new(job), &pods)
}

fn attempt(over: Value, pods: Vec<Pod>) -> Option<Attempt> {
    Some(Attempt { number: 1, run: run(job("t-1", "train", over), pods) })
}

fn running() -> Pod {
    pod("t-1", json!({"phase": "Running", "podIP": "10.0.0.1", "startTime": "2026-01-01T00:30:00Z"}))
}

fn waiting(reason: &str, message: &str) -> Pod {
    let status = json!({"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]});
    pod("t-1", status)
}

fn decide(job: &FineTuneJob, observed: &Observed) -> (Plan, lathe_api::FineTuneJobStatus) {
    let images = Images { cpu: "worker:1".to_owned(), cuda: None };
    let plan = plan::plan(job, observed, &images);
    let status = status::status(job, observed, &plan, None);
    (plan, status)
}

fn writes(plan: &Plan) -> String {
    let name = |write: &Write| match write {
        Write::Check(_) => "check".to_owned(),
        Write::Claim => "claim".to_owned(),
        Write::Start { attempt, .. } => format!("start {attempt}"),
        Write::Suspend(job, on) => format!("{} {}", if *on { "suspend" } else { "resume" }, job.name_any()),
        Write::Delete(job) | Write::CleanUp(job) => format!("delete {}", job.name_any()),
        Write::Summarise => "summarise".to_owned(),
        Write::MakeModel(..) => "model".to_owned(),
        Write::Scores(..) => "scores".to_owned(),
        Write::Pass(_) => "pass".to_owned(),
    };
    plan.writes.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// A training that is done, whose words went with its pod; the pod that looks for its report said this when it failed.
fn lost(at: &str, outcome: Value) -> Observed {
    let end = ended_at("Failed", at);
    world(|w| {
        w.attempt = attempt(ended_at("Complete", "2026-01-01T00:59:00Z"), vec![]);
        w.summary = run(job("t-summary", "inspect", end), vec![said("t-summary", 1, outcome)]);
    })
}

/// Another job of the same output.
fn older() -> FineTuneJob {
    let mut older = tune(json!({}), Value::Null);
    older.metadata.name = Some("older".to_owned());
    older.metadata.creation_timestamp = Some(Time("2025-12-31T00:00:00Z".parse().expect("a time")));
    older
}

fn known() -> Value {
    json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1,
        "plan": {"profile": "cpu", "count": 1}, "startTime": "2026-01-01T00:30:00Z"})
}

/// (what is written, `Succeeded`'s status and reason, who acts next)
type Expected = (&'static str, &'static str, &'static str, &'static str);

/// The status of a job whose dataset is not what it needs.
fn told(reason: &str) -> Value {
    let types =
        ["Planned", "DatasetValid", "Scheduled", "Training", "Evaluated", SUCCEEDED, RECONCILING, STALLED];
    let conditions = types.map(|type_| {
        let status = match type_ {
            "DatasetValid" | RECONCILING => "False",
            STALLED => "True",
            _ => "Unknown",
        };
        json!({"type": type_, "status": status, "reason": reason, "message": "line 3. Next: correct it.",
            "lastTransitionTime": "2026-01-01T00:00:00Z"})
    });
    json!({"observedGeneration": 1, "conditions": conditions})
}

#[rstest]
#[case::no_model(tune(json!({}), Value::Null), world(|w| w.base = None), ("", "Unknown", "ModelNotFound", "goes on"))]
#[case::model_is_not_ready(
    tune(json!({}), Value::Null),
    world(|w| w.base = Some(model("base", json!({"status": {"conditions": []}})))),
    ("", "Unknown", "ModelNotReady", "goes on"))]
#[case::base_is_an_adapter(
    tune(json!({}), Value::Null),
    world(|w| w.base = Some(model("base", json!({"spec": {"adapterOf": {"name": "x"}}})))),
    ("", "Unknown", "AdapterBaseUnsupported", "a person"))]
#[case::no_profile(tune(json!({"accelerator": {"profiles": ["x"]}}), Value::Null), world(|_| ()), ("", "Unknown", "ProfileNotFound", "a person"))]
#[case::too_large(tune(json!({"pod": {"memory": "300Mi"}}), Value::Null), world(|_| ()), ("", "Unknown", "DoesNotFit", "a person"))]
#[case::new(tune(json!({}), Value::Null), world(|_| ()), ("check", "Unknown", "CheckingDataset", "goes on"))]
#[case::new_and_suspended(tune(json!({"suspend": true}), Value::Null), world(|_| ()), ("", "Unknown", "Suspended", "goes on"))]
#[case::output_is_there(tune(json!({}), Value::Null), world(|w| w.output = Some(model("out", json!({})))), ("", "Unknown", "OutputExists", "a person"))]
#[case::what_was_said_of_the_rows_stands_while_they_are_read_again(
    tune(json!({}), told("MalformedRow")),
    world(|_| ()), ("check", "Unknown", "MalformedRow", "a person"))]
#[case::output_of_another_job_is_looked_at_after_the_check(
    tune(json!({}), Value::Null),
    world(|w| w.output = Some(model("out", json!({"spec": {"derivedFrom": {"job": "t", "base": "base", "inputsHash": "ffffffffffffffff"}}})))),
    ("check", "Unknown", "CheckingDataset", "goes on"))]
#[case::checking(
    tune(json!({}), Value::Null),
    world(|w| w.check = run(job("t-check-data", "check-data", json!({})), vec![])),
    ("", "Unknown", "CheckingDataset", "goes on"))]
#[case::bad_row(
    tune(json!({}), Value::Null),
    world(|w| w.check = run(job("t-check-data", "check-data", ended("Failed")), vec![said("t-check-data", 64, failed("MalformedRow"))])),
    ("", "Unknown", "MalformedRow", "a person"))]
#[case::good_rows(
    tune(json!({}), Value::Null),
    world(|w| w.check = run(job("t-check-data", "check-data", ended("Complete")), vec![said("t-check-data", 0, checked())])),
    ("claim, start 1", "Unknown", "Pending", "goes on"))]
#[case::its_words_are_lost(
    tune(json!({}), Value::Null),
    world(|w| w.check = run(job("t-check-data", "check-data", ended_at("Complete", "2026-01-01T00:55:00Z")), vec![])),
    ("", "Unknown", "ReportLost", "goes on"))]
#[case::its_words_were_lost_some_time_ago(
    tune(json!({}), Value::Null),
    world(|w| w.check = run(job("t-check-data", "check-data", ended_at("Complete", "2026-01-01T00:01:00Z")), vec![])),
    ("delete t-check-data", "Unknown", "ReportLost", "goes on"))]
#[case::its_words_are_those_of_something_else(
    tune(json!({}), Value::Null),
    world(|w| w.check = run(job("t-check-data", "check-data", ended("Complete")), vec![said("t-check-data", 0, json!({"inspected": {}}))])),
    ("", "Unknown", "WorkerFailed", "a person"))]
#[case::its_words_are_no_words(
    tune(json!({}), Value::Null),
    world(|w| w.check = run(job("t-check-data", "check-data", ended("Complete")), vec![said("t-check-data", 0, json!("?"))])),
    ("", "Unknown", "WorkerFailed", "a person"))]
#[case::the_attempt_is_gone(tune(json!({}), known()), world(|_| ()), ("claim, start 2", "Unknown", "Pending", "goes on"))]
#[case::an_older_job_makes_the_same_model(
    tune(json!({}), json!({"observedGeneration": 1, "datasetDigest": digest('d')})),
    world(|w| w.rivals = vec![older()]), ("", "Unknown", "OutputReserved", "goes on"))]
#[case::its_rows_are_checked_all_the_same(tune(json!({}), Value::Null), world(|w| w.rivals = vec![older()]), ("check", "Unknown", "CheckingDataset", "goes on"))]
#[case::it_runs_already(
    tune(json!({}), known()),
    world(|w| {
        w.attempt = attempt(json!({}), vec![running()]);
        w.rivals = vec![older()];
    }),
    ("", "Unknown", "Starting", "goes on"))]
#[case::own_volumes_need_no_claim(
    tune(json!({"output": {"destination": {"uri": "pvc://mine/out"}}, "checkpoint": {"destination": {"uri": "pvc://mine/state"}}}), known()),
    world(|_| ()), ("start 2", "Unknown", "Pending", "goes on"))]
#[case::queued(
    object(json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": "t", "namespace": "ns", "uid": "uid-t", "labels": {"kueue.x-k8s.io/queue-name": "q"}},
        "spec": tune(json!({}), Value::Null).spec, "status": known()})),
    world(|w| w.attempt = attempt(json!({"spec": {"suspend": true}}), vec![])), ("", "Unknown", "Queued", "goes on"))]
#[case::pending(tune(json!({}), known()), world(|w| w.attempt = attempt(json!({}), vec![])), ("", "Unknown", "Pending", "goes on"))]
#[case::no_room(
    tune(json!({}), known()),
    world(|w| w.attempt = attempt(json!({}), vec![waiting("Unschedulable", "0/1 nodes are available: 1 Insufficient cpu.")])),
    ("", "Unknown", "AcceleratorUnavailable", "goes on"))]
#[case::no_volume(
    tune(json!({}), known()),
    world(|w| w.attempt = attempt(json!({}), vec![waiting("Unschedulable", "pod has unbound immediate PersistentVolumeClaims")])),
    ("", "Unknown", "VolumeNotBound", "goes on"))]
#[case::running(tune(json!({}), known()), world(|w| w.attempt = attempt(json!({}), vec![running()])), ("", "Unknown", "Starting", "goes on"))]
#[case::the_check_goes_once_it_is_recorded(
    tune(json!({}), known()),
    world(|w| {
        w.attempt = attempt(json!({}), vec![running()]);
        w.check = run(job("t-check-data", "check-data", ended("Complete")), vec![said("t-check-data", 0, checked())]);
    }),
    ("delete t-check-data", "Unknown", "Starting", "goes on"))]
#[case::suspend(tune(json!({"suspend": true}), known()), world(|w| w.attempt = attempt(json!({}), vec![running()])), ("suspend t-1", "Unknown", "Suspended", "goes on"))]
#[case::suspended(tune(json!({"suspend": true}), known()), world(|w| w.attempt = attempt(json!({"spec": {"suspend": true}}), vec![])), ("", "Unknown", "Suspended", "goes on"))]
#[case::resume(tune(json!({}), known()), world(|w| w.attempt = attempt(json!({"spec": {"suspend": true}}), vec![])), ("resume t-1", "Unknown", "Pending", "goes on"))]
#[case::budget(
    tune(json!({"budget": {"maxCost": "1.5"}}), known()),
    world(|w| w.attempt = attempt(json!({}), vec![running()])), ("suspend t-1", "Unknown", "BudgetExceeded", "a person"))]
#[case::budget_is_enough(
    tune(json!({"budget": {"maxCost": "2"}}), known()),
    world(|w| w.attempt = attempt(json!({}), vec![running()])), ("", "Unknown", "Starting", "goes on"))]
#[case::profile_taken_off_the_list(
    tune(json!({"accelerator": {"profiles": ["gpu"]}}), json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1})),
    world(|w| w.attempt = attempt(json!({}), vec![])), ("delete t-1", "Unknown", "Pending", "goes on"))]
#[case::profile_taken_off_while_the_next_pod_finds_no_room(
    tune(json!({"accelerator": {"profiles": ["gpu"]}}), known()),
    world(|w| w.attempt = attempt(json!({}), vec![waiting("Unschedulable", "0/1 nodes are available: 1 Insufficient cpu.")])),
    ("delete t-1", "Unknown", "Pending", "goes on"))]
#[case::profile_taken_off_too_late(
    tune(json!({"accelerator": {"profiles": ["gpu"]}}), known()),
    world(|w| w.attempt = attempt(json!({}), vec![running()])), ("", "Unknown", "Starting", "goes on"))]
#[case::done(
    tune(json!({}), known()),
    world(|w| w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({})))])), ("model", "True", "Tuned", "nobody"))]
#[case::done_and_the_model_was_made_before_a_crash(
    tune(json!({}), known()),
    world(|w| {
        w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({})))]);
        w.output = Some(model("out", json!({"spec": {"derivedFrom": {"job": "t", "base": "base", "inputsHash": "aaaabbbbccccdddd"}}})));
    }),
    ("scores", "True", "Tuned", "nobody"))]
#[case::done_and_the_name_is_taken_meanwhile(
    tune(json!({}), known()),
    world(|w| {
        w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({})))]);
        w.output = Some(model("out", json!({})));
    }),
    ("", "Unknown", "OutputExists", "a person"))]
#[case::done_and_a_gate_fails(
    tune(json!({"evaluation": {"gates": [{"metric": "Perplexity", "atMost": "4"}]}}), known()),
    world(|w| w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({})))])), ("model", "False", "GateFailed", "a person"))]
#[case::done_with_lower_gates_than_an_equal_job(
    tune(json!({"evaluation": {"gates": [{"metric": "Perplexity", "atMost": "6"}]}}), known()),
    world(|w| {
        w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({})))]);
        w.output = Some(model("out", json!({
            "spec": {"derivedFrom": {"job": "t", "base": "base", "inputsHash": "aaaabbbbccccdddd", "failedGates": ["Perplexity is 5"]}},
            "status": {"scores": [{"metric": "Perplexity", "after": "5"}]}})));
    }),
    ("pass", "True", "Tuned", "nobody"))]
#[case::done_and_it_improved_enough(
    tune(json!({"evaluation": {"gates": [{"metric": "Perplexity", "minImprovement": "0.75"}]}}), known()),
    world(|w| w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({})))])), ("model", "True", "Tuned", "nobody"))]
#[case::a_result_elsewhere_is_not_believed(
    tune(json!({}), known()),
    world(|w| w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({"uri": "pvc://lathe-artifacts/models/out/../../x"})))])),
    ("", "False", "WorkerFailed", "a person"))]
#[case::another_volume_is_not_believed(
    tune(json!({}), known()),
    world(|w| w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({"uri": "s3://other/x"})))])),
    ("", "False", "WorkerFailed", "a person"))]
#[case::done_and_the_pod_is_gone(
    tune(json!({}), known()), world(|w| w.attempt = attempt(ended("Complete"), vec![])), ("summarise", "Unknown", "ReportLost", "goes on"))]
#[case::the_words_are_found_again(
    tune(json!({}), known()),
    world(|w| {
        w.attempt = attempt(ended("Complete"), vec![]);
        w.summary = run(job("t-summary", "inspect", ended("Complete")), vec![said("t-summary", 0, trained(json!({})))]);
    }),
    ("model", "True", "Tuned", "nobody"))]
#[case::the_report_cannot_be_reached_for_now(
    tune(json!({}), known()), lost("2026-01-01T00:59:55Z", failed_for_now("Unreachable")), ("", "Unknown", "Unreachable", "goes on"))]
#[case::the_report_is_looked_for_again(
    tune(json!({}), known()), lost("2026-01-01T00:59:00Z", failed_for_now("Unreachable")),
    ("delete t-summary", "Unknown", "Unreachable", "goes on"))]
#[case::the_report_may_not_be_read(
    tune(json!({}), known()), lost("2026-01-01T00:59:55Z", failed("Unauthorized")), ("", "Unknown", "Unauthorized", "a person"))]
#[case::the_repeated_words_are_no_words(
    tune(json!({}), known()),
    world(|w| {
        w.attempt = attempt(ended("Complete"), vec![]);
        w.summary = run(job("t-summary", "inspect", ended("Complete")), vec![said("t-summary", 0, json!("?"))]);
    }),
    ("", "Unknown", "WorkerFailed", "a person"))]
#[case::there_is_no_report(
    tune(json!({}), known()), lost("2026-01-01T00:59:55Z", failed("NotFound")), ("", "False", "NotFound", "a person"))]
#[case::failed(
    tune(json!({}), known()),
    world(|w| w.attempt = attempt(ended("Failed"), vec![said("t-1", 64, failed("LossNotFinite"))])), ("", "False", "LossNotFinite", "a person"))]
fn each_state_of_the_world_has_one_answer(
    #[case] tuned: FineTuneJob,
    #[case] observed: Observed,
    #[case] expected: Expected,
) {
    let (plan, status) = decide(&tuned, &observed);
    let (state, reason, message) = condition(&status, SUCCEEDED);
    let next = match (condition(&status, RECONCILING).0.as_str(), condition(&status, STALLED).0.as_str()) {
        ("True", "False") => "goes on",
        ("False", "True") => "a person",
        ("False", "False") => "nobody",
        both => panic!("both: {both:?}"),
    };
    let found = (writes(&plan), state.as_str(), reason.as_str(), next);
    assert_eq!(found, (expected.0.to_owned(), expected.1, expected.2, expected.3), "{message}");
    if next == "a person" {
        assert!(message.contains("Next: "), "{message}");
    }
    let all =
        ["Planned", "DatasetValid", "Scheduled", "Training", "Evaluated", SUCCEEDED, RECONCILING, STALLED];
    assert_eq!(status.conditions.iter().map(|c| c.type_.as_str()).collect::<Vec<_>>(), all);
    assert!(status.conditions.iter().all(|c| !c.reason.is_empty() && !c.message.is_empty()));
    let over = next == "nobody" || state == "False";
    assert_eq!(status.completion_time.is_some(), over);
}

#[test]
fn an_equal_jobs_model_is_adopted() {
    let hash = |observed: &Observed| {
        let (plan, _) = decide(&tune(json!({}), known()), observed);
        plan.training.expect("planned").inputs_hash.expect("known")
    };
    let hash = hash(&world(|_| ()));
    let there = model(
        "out",
        json!({
            "spec": {"derivedFrom": {"job": "other", "base": "base", "inputsHash": hash}},
            "status": {"scores": [{"metric": "Perplexity", "before": "9", "after": "3"}]},
        }),
    );
    let (plan, status) = decide(&tune(json!({}), known()), &world(|w| w.output = Some(there.clone())));
    assert_eq!((writes(&plan).as_str(), condition(&status, SUCCEEDED).1.as_str()), ("", "Adopted"));
    assert_eq!(status.scores.len(), 1);
    let (_, status) =
        decide(&tune(json!({"training": {"seed": 7}}), known()), &world(|w| w.output = Some(there)));
    assert_eq!(condition(&status, SUCCEEDED).1, "OutputExists");
}

#[test]
fn a_finished_job_keeps_its_words_and_loses_its_jobs_when_their_time_has_come() {
    let job = tune(json!({}), known());
    let done =
        |w: &mut Observed| w.attempt = attempt(ended("Complete"), vec![said("t-1", 0, trained(json!({})))]);
    let (_, status) = decide(&job, &world(done));
    let finished = |ttl: Value| {
        let mut over = tune(json!({"ttlSecondsAfterFinished": ttl}), Value::Null);
        over.metadata.generation = Some(2);
        over.status = Some(status.clone());
        over
    };
    let at = |time: &str| {
        world(|w| {
            done(w);
            w.now = time.parse().expect("a time");
        })
    };
    let (plan, kept) = decide(&finished(json!(600)), &at("2026-01-01T01:09:59Z"));
    assert_eq!((writes(&plan).as_str(), plan.next.map(|n| n.as_secs())), ("", Some(1)));
    assert_eq!(condition(&kept, SUCCEEDED), condition(&status, SUCCEEDED));
    assert_eq!(kept.conditions.iter().filter_map(|c| c.observed_generation).min(), Some(2));
    assert_eq!(writes(&decide(&finished(json!(600)), &at("2026-01-01T01:10:00Z")).0), "delete t-1");
    assert_eq!(writes(&decide(&finished(Value::Null), &at("2027-01-01T00:00:00Z")).0), "");
}

#[rstest]
#[case::a_part(json!({"heldOut": 5000, "rows": 1000, "questions": 64}), "Perplexity 20.0000 -> 5.0000 (on 1000 of 5000 held-out rows, with 64 questions)")]
#[case::all(json!({"heldOut": 50, "rows": 50, "questions": 0}), "Perplexity 20.0000 -> 5.0000 (on 50 held-out rows)")]
#[case::untold(json!({}), "Perplexity 20.0000 -> 5.0000")]
fn scores_say_what_they_are_made_from(#[case] measured: Value, #[case] says: &str) {
    let words = said("t-1", 0, trained(json!({"measured": measured})));
    let (_, status) =
        decide(&tune(json!({}), known()), &world(|w| w.attempt = attempt(ended("Complete"), vec![words])));
    assert_eq!(condition(&status, "Evaluated").2, says);
}

#[test]
fn progress_is_told_in_the_columns_and_bounded() {
    let report = json!({"phase": "Training", "message": "step 120", "progress": {
        "step": 120, "steps": 300, "tokens": 9000, "tokensPerSecond": 812.4, "loss": 1.23456, "remainingSeconds": 3700.0,
        "checkpointStep": 100, "checkpointDigest": "sha256:x", "restarts": 1, "lostSteps": 20}});
    let observed = world(|w| {
        w.attempt = attempt(json!({}), vec![running()]);
        w.report = Some(object(report));
    });
    let (_, status) = decide(&tune(json!({}), known()), &observed);
    let progress = serde_json::to_value(status.progress.as_ref().expect("progress")).expect("JSON");
    assert_eq!(
        progress,
        json!({"summary": "120/300 40%", "step": 120, "steps": 300, "tokens": 9000, "tokensPerSecond": "812",
        "loss": "1.2346", "remaining": "1h1m", "lastCheckpoint": {"step": 100, "digest": "sha256:x"}})
    );
    assert_eq!(serde_json::to_value(&status.restarts).expect("JSON"), json!({"count": 1, "lostSteps": 20}));
    assert_eq!((status.device_seconds, status.cost.as_deref()), (Some(1800), Some("1.80 USD")));
    assert_eq!(condition(&status, "Training").0, "True");
    let wild = json!({"phase": "Training", "progress": {"step": -5, "steps": i64::MAX, "loss": 1e300, "restarts": -1}});
    let observed = world(|w| {
        w.attempt = attempt(json!({}), vec![running()]);
        w.report = Some(object(wild));
    });
    let (_, status) = decide(&tune(json!({}), known()), &observed);
    let progress = status.progress.expect("progress");
    assert_eq!(
        (progress.step, progress.steps, progress.loss, status.restarts),
        (0, (1 << 53) - 1, None, None)
    );
}

#[test]
fn out_of_memory_has_the_step_the_limit_and_what_was_planned() {
    let killed = json!({"phase": "Failed", "containerStatuses": [{"name": "worker", "image": "w", "imageID": "",
        "ready": false, "restartCount": 0, "state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]});
    let mut pod = pod("t-1", killed);
    pod.metadata.labels = Some([(names::LABEL_TASK.to_owned(), "train".to_owned())].into());
    let mut status = known();
    status["plan"]["memory"] = json!([{"name": "total", "value": "900Mi"}]);
    status["progress"] = json!({"summary": "120/300 40%", "step": 120, "steps": 300});
    let (_, status) =
        decide(&tune(json!({}), status), &world(|w| w.attempt = attempt(ended("Failed"), vec![pod])));
    let message = condition(&status, "Training").2;
    let expected =
        "killed at its memory limit of 1Gi after step 120; planned 900Mi. Next: make a new FineTuneJob";
    assert!(message.contains(expected), "{message}");
}

/// A job that waits for a processor since 01:00 and may fall back to a device, of which `World` has one that fits. An
/// earlier pod of it ran.
fn impatient(status: Value) -> FineTuneJob {
    tune(json!({"accelerator": {"profiles": ["cpu", "gpu"], "count": 1, "fallbackAfter": "30m"}}), status)
}

fn unscheduled() -> Option<Attempt> {
    let status = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False",
        "reason": "Unschedulable", "message": "Insufficient cpu", "lastTransitionTime": "2026-01-01T01:00:00Z"}]});
    attempt(json!({}), vec![pod("t-1", status)])
}

#[rstest]
#[case::in_time("2026-01-01T01:29:59Z", json!({}), None)]
#[case::too_late("2026-01-01T01:30:00Z", json!({}), Some("cpu"))]
#[case::nothing_is_left("2026-01-01T01:30:00Z", json!({"passedOver": ["gpu"]}), None)]
fn an_attempt_that_finds_no_room_falls_back(
    #[case] now: &str,
    #[case] more: Value,
    #[case] expected: Option<&str>,
) {
    let mut status = known();
    status.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let world = world(|w| {
        w.attempt = unscheduled();
        w.now = now.parse().expect("a time");
    });
    let (plan, status) = decide(&impatient(status), &world);
    assert_eq!((writes(&plan).as_str(), plan.passed_over.as_deref()), ("", expected));
    let message = condition(&status, "Scheduled").2;
    let told = message.contains("another profile is tried at 01:30 UTC");
    assert_eq!(told, now.contains("29:59"), "{message}");
}

#[test]
fn what_was_given_up_is_written_then_deleted_then_replaced() {
    let late = |w: &mut Observed| w.now = "2026-01-01T02:00:00Z".parse().expect("a time");
    let first = world(|w| {
        w.attempt = unscheduled();
        late(w);
    });
    let (_, status) = decide(&impatient(known()), &first);
    assert_eq!(status.passed_over, ["cpu"]);
    let given_up = impatient(serde_json::to_value(&status).expect("JSON"));
    let (plan, _) = decide(&given_up, &first);
    assert_eq!(writes(&plan), "delete t-1");
    let (plan, status) = decide(&given_up, &world(late));
    assert_eq!(writes(&plan), "claim, start 2");
    assert_eq!(status.plan.and_then(|plan| plan.profile).as_deref(), Some("gpu"));
    let planned = conditions::find(&status.conditions, "Planned").expect("set");
    assert!(planned.message.contains("; cpu had no room within"), "{}", planned.message);
}
