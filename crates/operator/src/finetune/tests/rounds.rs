//! Whole rounds against a scripted API server: which calls are made, in which order, with what.
use super::{super::*, *};
use crate::testing::{Call, failure, paths, sent, told};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rstest::rstest;

const MAPS: &str = "/api/v1/namespaces/ns/configmaps";
const JOBS: &str = "/apis/batch/v1/namespaces/ns/jobs";
const POLICY: &str = "/apis/networking.k8s.io/v1/namespaces/ns/networkpolicies/t-tune";
const CLAIM: &str = "POST /api/v1/namespaces/ns/persistentvolumeclaims";

/// A round among the base Model and what else is there.
async fn round(
    job: &FineTuneJob,
    mut world: World,
    answers: &[(&str, u16, Value)],
) -> (Vec<Call>, Result<Action, Error>) {
    world.models.push(model("base", json!({})));
    reconcile(job, world, answers).await
}

fn status_of(calls: &[Call]) -> Value {
    calls.iter().find(|(call, _)| call == STATUS).map(|(_, body)| body["status"].clone()).expect("a status")
}

fn with_status(status: Value) -> FineTuneJob {
    tune(json!({}), status)
}

#[tokio::test]
async fn a_job_goes_from_nothing_to_a_model_and_then_rests() {
    // New: the dataset is checked first.
    let (calls, done) = round(&with_status(Value::Null), World::default(), &[]).await;
    done.expect("a round");
    let made = |job: &str| {
        let map = format!("{MAPS}/{job}-contract");
        let of = |path: &str| [format!("GET {path}"), format!("PATCH {path}")];
        [of(&map), of(POLICY)].concat().into_iter().chain([format!("POST {JOBS}")]).collect::<Vec<_>>()
    };
    assert_eq!(paths(&calls), [made("t-check-data"), vec![STATUS.to_owned()]].concat());
    assert!(told(&calls).is_empty());
    let status = status_of(&calls);

    // The rows are good: the volume, the contract, the Job, in this order.
    let check = || job("t-check-data", "check-data", ended("Complete"));
    let world =
        World { jobs: vec![check()], pods: vec![said("t-check-data", 0, checked())], ..World::default() };
    let (calls, done) = round(&with_status(status), world, &[]).await;
    done.expect("a round");
    assert_eq!(
        paths(&calls),
        [vec![LIST.to_owned(), CLAIM.to_owned()], made("t-1"), vec![STATUS.to_owned()]].concat()
    );
    assert_eq!(told(&calls), ["AttemptStarted"]);
    let status = status_of(&calls);
    assert_eq!((&status["attempt"], &status["datasetDigest"]), (&json!(1), &json!(digest('d'))));
    assert_eq!(status["plan"]["profile"], "cpu");

    // It is done: the Model with its scores before the status that says so; the check goes, it is recorded.
    let world = World {
        jobs: vec![check(), job("t-1", "train", ended("Complete"))],
        pods: vec![said("t-1", 0, trained(json!({})))],
        ..World::default()
    };
    let (calls, done) = round(&with_status(status), world, &[]).await;
    done.expect("a round");
    let models = "/apis/lathe.dev/v1alpha1/namespaces/ns/models";
    let expected = [
        format!("DELETE {JOBS}/t-check-data"),
        format!("POST {models}"),
        format!("PATCH {models}/out/status"),
        STATUS.to_owned(),
    ];
    assert_eq!(paths(&calls), expected);
    assert_eq!(told(&calls), ["ModelMade", "Tuned"]);
    let made = calls.iter().find(|(call, _)| *call == format!("POST {models}")).map(|(_, body)| body.clone());
    assert_eq!(
        made.expect("a Model"),
        json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "out", "namespace": "ns"},
            "spec": {
                "source": {"uri": format!("pvc://lathe-artifacts/models/out/{}", "e".repeat(64)), "digest": digest('e')},
                "adapterOf": {"name": "base"},
                "derivedFrom": {"job": "t", "base": "base", "datasetDigest": digest('d'), "inputsHash": "aaaabbbbccccdddd"},
                "reclaimPolicy": "Retain",
            },
        })
    );
    let status = status_of(&calls);
    assert_eq!(status["modelRef"], json!({"name": "out"}));

    // A settled job: not one call.
    let world = World { jobs: vec![job("t-1", "train", ended("Complete"))], ..World::default() };
    let (calls, done) = round(&with_status(status), world, &[]).await;
    assert_eq!(done.expect("a round"), Action::await_change());
    assert!(calls.is_empty(), "{calls:?}");
}

#[tokio::test]
async fn a_clean_up_that_is_refused_hides_nothing_and_is_tried_again() {
    let delete = format!("DELETE {JOBS}/t-check-data");
    let refused = || [(delete.as_str(), 403, failure(403, "Forbidden"))];
    let check = || job("t-check-data", "check-data", ended("Complete"));
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1});
    let world = World {
        jobs: vec![check(), job("t-1", "train", ended("Complete"))],
        pods: vec![said("t-1", 0, trained(json!({})))],
        ..World::default()
    };
    // The Model is made all the same, and the status says so.
    let (calls, done) = round(&with_status(known), world, &refused()).await;
    assert_eq!(done.expect_err("refused").category(), "WriteRefused");
    assert_eq!(told(&calls), ["ModelMade", "Tuned"]);
    let status = status_of(&calls);
    let over: lathe_api::FineTuneJobStatus = object(status.clone());
    assert_eq!(condition(&over, conditions::SUCCEEDED).1, "Tuned");
    // Afterwards it stands.
    let world = World { jobs: vec![check()], ..World::default() };
    let (calls, done) = round(&with_status(status), world, &refused()).await;
    let words = done.expect_err("refused").to_string();
    assert!(words.contains("delete Job t-check-data") && words.contains("Next: "), "{words}");
    assert_eq!(paths(&calls), [delete.as_str()]);
}

#[tokio::test]
async fn a_job_that_waited_long_for_its_base_looks_at_its_rows_again_soon() {
    let ago = |seconds: i64| (Timestamp::now() - jiff::SignedDuration::from_secs(seconds)).to_string();
    let planned = json!({"type": "Planned", "status": "True", "reason": "Planned", "message": "m", "lastTransitionTime": ago(70)});
    let known = json!({"observedGeneration": 1, "conditions": [planned]});
    let world = World {
        jobs: vec![job("t-check-data", "check-data", ended_at("Failed", &ago(60)))],
        pods: vec![said("t-check-data", 64, failed("NotFound"))],
        ..World::default()
    };
    let (calls, done) = round(&with_status(known), world, &[]).await;
    done.expect("a round");
    assert_eq!(paths(&calls), [&format!("DELETE {JOBS}/t-check-data"), STATUS]);
}

#[tokio::test]
async fn the_job_is_what_the_cluster_needs() {
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d')});
    let (calls, _) = round(&with_status(known), World::default(), &[]).await;
    let made = calls
        .iter()
        .find(|(call, _)| *call == format!("POST {JOBS}"))
        .map(|(_, body)| body.clone())
        .expect("a Job");
    let labels = json!({
        "app.kubernetes.io/managed-by": "lathe", "app.kubernetes.io/name": "lathe-worker",
        "lathe.dev/kind": "finetunejob", "lathe.dev/name": "t", "lathe.dev/task": "train",
    });
    assert_eq!(made["metadata"]["labels"], labels);
    assert_eq!(made["metadata"]["name"], "t-1");
    assert_eq!(made["metadata"]["annotations"]["lathe.dev/profile"], "cpu");
    let map: ConfigMap = sent(&calls, &format!("PATCH {MAPS}/t-1-contract"));
    let contract = &map.data.expect("data")["contract.json"];
    assert_eq!(made["metadata"]["annotations"]["lathe.dev/contract"], contract.as_str());
    assert_eq!(
        made["metadata"]["ownerReferences"],
        json!([
        {"apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob", "name": "t", "uid": "uid-t", "controller": true}])
    );
    let mut spec = made["spec"].clone();
    let template = spec.as_object_mut().expect("a spec").remove("template").expect("a template");
    assert_eq!(
        spec,
        json!({
            "backoffLimit": 3, "completions": 1, "parallelism": 1, "podReplacementPolicy": "Failed", "suspend": false,
            "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [75]}},
                {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [64]}},
            ]},
        })
    );
    assert_eq!(template["metadata"]["labels"], labels);
    let pod = &template["spec"];
    assert_eq!(
        (&pod["restartPolicy"], &pod["terminationGracePeriodSeconds"]),
        (&json!("Never"), &json!(120))
    );
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(
        (&pod["containers"][0]["args"], &pod["containers"][0]["image"]),
        (&json!(["train"]), &json!("worker:1"))
    );
    let mounted: Vec<&str> = pod["volumes"]
        .as_array()
        .expect("volumes")
        .iter()
        .filter_map(|v| v["persistentVolumeClaim"]["claimName"].as_str())
        .collect();
    assert_eq!(mounted, ["data", "lathe-artifacts", "models"]);
}

#[tokio::test]
async fn a_status_that_is_newer_than_the_watch_of_jobs_makes_no_second_job() {
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1});
    let live = serde_json::to_value(job("t-1", "train", json!({}))).expect("JSON");
    let get = format!("GET {JOBS}/t-1");
    let (calls, done) = round(&with_status(known), World::default(), &[(&get, 200, live)]).await;
    done.expect("a round");
    assert_eq!(paths(&calls), [get.as_str(), STATUS]);
}

#[tokio::test]
async fn what_the_api_server_refuses_is_in_the_status_and_tried_again() {
    let quota = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403, "reason": "Forbidden",
        "message": "exceeded quota: jobs"});
    let make = format!("POST {JOBS}");
    let (calls, done) = round(&with_status(Value::Null), World::default(), &[(&make, 403, quota)]).await;
    assert_eq!(done.expect_err("refused").category(), "WriteRefused");
    let status: lathe_api::FineTuneJobStatus = object(status_of(&calls));
    let (_, reason, message) = condition(&status, conditions::SUCCEEDED);
    assert!(
        reason == "WriteRefused" && message.contains("exceeded quota: jobs") && message.contains("Next: "),
        "{message}"
    );
}

/// Another object stands under the name of something that is made once.
async fn taken(spec: Value, world: World, kind: &str, name: &str, there: Value) -> (Vec<Call>, String) {
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1});
    let (make, get) = (format!("POST {kind}"), format!("GET {kind}/{name}"));
    let answers = [(make.as_str(), 409, failure(409, "AlreadyExists")), (get.as_str(), 200, there)];
    let (calls, done) = round(&tune(spec, known), world, &answers).await;
    assert_eq!(done.expect_err("taken").category(), "NameTaken");
    let status: lathe_api::FineTuneJobStatus = object(status_of(&calls));
    assert!(conditions::is_true(&status.conditions, conditions::STALLED));
    let (_, reason, message) = condition(&status, conditions::SUCCEEDED);
    assert_eq!(reason, "NameTaken");
    (calls, message)
}

#[tokio::test]
async fn a_volume_or_model_of_somebody_else_is_never_taken_for_ours() {
    let claims = "/api/v1/namespaces/ns/persistentvolumeclaims";
    let claim = json!({"metadata": {"name": "lathe-artifacts", "namespace": "ns", "uid": "theirs"}});
    let (calls, message) = taken(json!({}), World::default(), claims, "lathe-artifacts", claim).await;
    assert!(message.contains("label it `lathe.dev/kind=artifacts`"), "{message}");
    assert!(!paths(&calls).iter().any(|call| call.ends_with("/jobs")), "{calls:?}");

    let models = "/apis/lathe.dev/v1alpha1/namespaces/ns/models";
    let done = World {
        jobs: vec![job("t-1", "train", ended("Complete"))],
        pods: vec![said("t-1", 0, trained(json!({})))],
        ..World::default()
    };
    let theirs = serde_json::to_value(model("out", json!({}))).expect("JSON");
    let (calls, message) = taken(json!({}), done, models, "out", theirs).await;
    assert!(message.contains("Next: delete Model out"), "{message}");
    assert!(!paths(&calls).contains(&format!("PATCH {models}/out/status").as_str()), "{calls:?}");
}

#[tokio::test]
async fn a_server_that_is_away_changes_nothing() {
    let map = format!("PATCH {MAPS}/t-check-data-contract");
    let (calls, done) =
        round(&with_status(Value::Null), World::default(), &[(&map, 500, failure(500, "InternalError"))])
            .await;
    assert_eq!(done.expect_err("away").category(), "WriteFailed");
    assert_eq!(paths(&calls), [format!("GET {MAPS}/t-check-data-contract"), map]);
}

#[tokio::test]
async fn suspending_patches_the_job_and_nothing_else_of_it() {
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1});
    let world = World { jobs: vec![job("t-1", "train", json!({}))], ..World::default() };
    let (calls, done) = round(&tune(json!({"suspend": true}), known), world, &[]).await;
    done.expect("a round");
    assert_eq!(paths(&calls), [format!("PATCH {JOBS}/t-1").as_str(), STATUS]);
    assert_eq!(calls[0].1, json!({"metadata": {"uid": "uid-t-1"}, "spec": {"suspend": true}}));
}

/// An attempt that lives, with the contract that it was made with.
fn live(phase: &str, over: Value) -> World {
    let mut made = json!({"metadata": {"annotations": {"lathe.dev/contract": "{as it was}"}}});
    json_patch::merge(&mut made, &over);
    World {
        jobs: vec![job("t-1", "train", made)],
        pods: vec![pod("t-1", json!({"phase": phase}))],
        ..World::default()
    }
}

#[rstest]
#[case::its_pod_is_on_its_way("Pending")]
#[case::it_runs("Running")]
#[tokio::test]
async fn what_a_live_job_lost_is_made_again_as_it_was_and_the_job_is_not_touched(#[case] phase: &str) {
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1});
    let (map, made_map) = (format!("GET {MAPS}/t-1-contract"), format!("PATCH {MAPS}/t-1-contract"));
    let (policy, made_policy) = (format!("GET {POLICY}"), format!("PATCH {POLICY}"));
    let world = World { unguarded: true, ..live(phase, json!({})) };
    let (calls, done) = round(&with_status(known.clone()), world, &[]).await;
    done.expect("a round");
    assert_eq!(paths(&calls), [policy.as_str(), &made_policy, &map, &made_map, STATUS]);
    let there: ConfigMap = sent(&calls, &made_map);
    let data = there.data.clone().expect("data");
    assert_eq!(data, [("contract.json".to_owned(), "{as it was}".to_owned())].into());

    // It is there: nothing is written again.
    let world = World { contracts: vec![there.clone()], ..live(phase, json!({})) };
    let (calls, _) = round(&with_status(known.clone()), world, &[]).await;
    assert_eq!(paths(&calls), [STATUS]);

    // Somebody changed it.
    let data = Some([("contract.json".to_owned(), "{another}".to_owned())].into());
    let world = World { contracts: vec![ConfigMap { data, ..there }], ..live(phase, json!({})) };
    let (calls, _) = round(&with_status(known.clone()), world, &[]).await;
    assert_eq!(paths(&calls), [map.as_str(), &made_map, STATUS]);

    // It has ended: nobody needs it any more.
    let over = World { unguarded: true, ..live(phase, ended("Failed")) };
    let (calls, _) = round(&with_status(known), over, &[]).await;
    assert_eq!(paths(&calls), [STATUS]);
}

#[tokio::test]
async fn a_policy_that_is_in_the_way_does_not_keep_a_job_from_being_suspended() {
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1});
    let theirs = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": {"name": "t-tune", "namespace": "ns", "uid": "theirs"}});
    let world = World { unguarded: true, ..live("Pending", json!({})) };
    let get = format!("GET {POLICY}");
    let (calls, done) = round(&tune(json!({"suspend": true}), known), world, &[(&get, 200, theirs)]).await;
    assert_eq!(done.expect_err("taken").category(), "NameTaken");
    assert_eq!(paths(&calls), [format!("PATCH {JOBS}/t-1").as_str(), &get, STATUS]);
}

#[rstest]
#[case::older("2025-12-31T00:00:00Z", true)]
#[case::younger("2026-01-02T00:00:00Z", false)]
#[tokio::test]
async fn a_job_that_the_watch_has_not_brought_is_seen_before_the_start(
    #[case] created: &str,
    #[case] held: bool,
) {
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d')});
    let mut other = with_status(Value::Null);
    other.metadata.name = Some("other".to_owned());
    other.metadata.creation_timestamp = Some(Time(created.parse().expect("a time")));
    let (calls, done) = round(&with_status(known), World::default(), &[(LIST, 200, tunes(&[other]))]).await;
    done.expect("a round");
    assert_eq!(paths(&calls).contains(&format!("POST {JOBS}").as_str()), !held, "{calls:?}");
    let status: lathe_api::FineTuneJobStatus = object(status_of(&calls));
    let (_, reason, message) = condition(&status, conditions::SUCCEEDED);
    assert_eq!((reason == "OutputReserved", status.attempt.is_none()), (held, held), "{message}");
    assert_eq!(message.contains("FineTuneJob other, which is older"), held, "{message}");
}
