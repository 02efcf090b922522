mod recorded;

use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::core::DeserializeGuard;
use lathe_api::conditions::{READY, RECONCILING, STALLED, find};
use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::testing::{Call, Server, context, failure, filled, object, paths, sent, told};

const JOB: &str = "/apis/batch/v1/namespaces/ns/jobs/m-inspect";
const MAKE_CONTRACT: &str = "PATCH /api/v1/namespaces/ns/configmaps/m-inspect-contract";
const MAKE_POLICY: &str = "PATCH /apis/networking.k8s.io/v1/namespaces/ns/networkpolicies/m-inspect";
const GET_CONTRACT: &str = "GET /api/v1/namespaces/ns/configmaps/m-inspect-contract";
const GET_POLICY: &str = "GET /apis/networking.k8s.io/v1/namespaces/ns/networkpolicies/m-inspect";
const MAKE_JOB: &str = "POST /apis/batch/v1/namespaces/ns/jobs";
const STATUS: &str = "PATCH /apis/lathe.dev/v1alpha1/namespaces/ns/models/m/status";

fn model(name: &str, spec: Value, status: Value) -> Model {
    object(json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "Model",
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": spec, "status": status,
    }))
}

fn source() -> Value {
    json!({"source": {"uri": "pvc://data/model"}})
}

fn job(condition: Option<(&str, Timestamp)>) -> Job {
    let conditions: Vec<Value> = condition
        .iter()
        .map(|(type_, at)| json!({"type": type_, "status": "True", "lastTransitionTime": at.to_string()}))
        .collect();
    object(json!({
        "metadata": {"name": "m-inspect", "namespace": "ns", "uid": "job-uid",
            "ownerReferences": [{"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "name": "m", "uid": "uid-m", "controller": true}]},
        "spec": {"template": {}}, "status": {"conditions": conditions},
    }))
}

fn pod(code: i32, words: Value) -> Pod {
    object(json!({
        "metadata": {"name": "m-inspect-x", "namespace": "ns",
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "m-inspect", "uid": "job-uid", "controller": true}]},
        "status": {"phase": "Succeeded", "containerStatuses": [{
            "name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "message": words.to_string()}},
        }]},
    }))
}

fn report(over: &[(&str, Value)]) -> Value {
    let mut report = json!({
        "architecture": "LlamaForCausalLM", "parameters": 1_235_814_400, "contextLength": 2048, "digest": format!("sha256:{}", "b".repeat(64)),
        "weights": [{"precision": "BF16", "bytes": 2_471_628_800_i64}],
        "shape": {"vocab": 32000, "hidden": 2048, "layers": 16, "heads": 32, "kvHeads": 8, "headDim": 64, "intermediate": 8192, "tieEmbeddings": true},
    });
    for (key, value) in over {
        report[*key] = value.clone();
    }
    json!({"outcome": {"inspected": report}})
}

/// One round; the calls, and the status that was written.
async fn round(
    model: &Model,
    jobs: Vec<Job>,
    pods: Vec<Pod>,
    others: Vec<Model>,
) -> (Vec<Call>, Option<Value>) {
    let (calls, done) = attempt(model, jobs, pods, others, &[]).await;
    done.expect("a round");
    let status = calls.iter().find(|(call, _)| call == STATUS).map(|(_, body)| body["status"].clone());
    (calls, status)
}

/// One round against an API server that answers so; the calls, and how it ended.
async fn attempt(
    model: &Model,
    jobs: Vec<Job>,
    pods: Vec<Pod>,
    others: Vec<Model>,
    answers: &[(&str, u16, Value)],
) -> (Vec<Call>, Result<Action, Error>) {
    let (client, server) = Server::start(answers);
    let context = context(client);
    let policy = build::policy(model, &context).expect("a policy");
    let controller = Models {
        context,
        models: filled(others.into_iter().map(|m| DeserializeGuard(Ok(m))).collect()),
        jobs: filled(jobs),
        pods: filled(pods),
        claims: filled(Vec::new()),
        contracts: filled(Vec::new()),
        policies: filled(vec![policy]),
    };
    let done = controller.reconcile(model).await;
    drop(controller);
    (server.calls().await, done)
}

fn condition(status: &Value, type_: &str) -> (String, String, String) {
    let status: lathe_api::ModelStatus = object(status.clone());
    let c = find(&status.conditions, type_).expect("a condition");
    (c.status.clone(), c.reason.clone(), c.message.clone())
}

#[tokio::test]
async fn a_new_model_gets_a_job_and_every_condition() {
    let (calls, status) = round(&model("m", source(), Value::Null), vec![], vec![], vec![]).await;
    assert_eq!(paths(&calls), [GET_CONTRACT, MAKE_CONTRACT, GET_POLICY, MAKE_POLICY, MAKE_JOB, STATUS]);
    let status = status.expect("a status");
    assert_eq!(condition(&status, READY).0, "Unknown");
    assert_eq!(condition(&status, RECONCILING).0, "True");
    assert_eq!(condition(&status, STALLED).0, "False");
    assert_eq!(status["observedGeneration"], 1);
    let contract = calls[1].1["data"]["contract.json"].as_str().expect("a contract");
    let contract: Value = serde_json::from_str(contract).expect("JSON");
    assert_eq!(contract["task"], json!({"inspect": {"source": {"uri": "pvc://data/model"}}}));
    assert_eq!(contract["object"]["uid"], "uid-m");
}

#[tokio::test]
async fn the_pod_is_as_the_user_says() {
    let spec = json!({"source": {"uri": "hf://o/m"}, "pod": {
        "serviceAccountName": "reader", "imagePullSecrets": [{"name": "registry"}], "memory": "2Gi",
        "tolerations": [{"key": "dedicated", "operator": "Exists"}], "env": [{"name": "HF_ENDPOINT", "value": "https://hub"}]}});
    let (calls, _) = round(&model("m", spec, Value::Null), vec![], vec![], vec![]).await;
    let job = sent::<Value>(&calls, MAKE_JOB);
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(
        (&pod["serviceAccountName"], &pod["automountServiceAccountToken"]),
        (&json!("reader"), &json!(false))
    );
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "registry"}]));
    assert_eq!(pod["tolerations"], json!([{"key": "dedicated", "operator": "Exists"}]));
    let container = &pod["containers"][0];
    assert_eq!(container["env"], json!([{"name": "HF_ENDPOINT", "value": "https://hub"}]));
    assert_eq!(
        (&container["resources"]["limits"]["memory"], &container["resources"]["limits"]["cpu"]),
        (&json!("2Gi"), &json!("500m"))
    );
}

#[tokio::test]
async fn what_the_pod_found_is_recorded_then_the_job_goes_then_nothing_is_written() {
    let done = || job(Some(("Complete", Timestamp::now())));
    let (calls, status) =
        round(&model("m", source(), Value::Null), vec![done()], vec![pod(0, report(&[]))], vec![]).await;
    assert_eq!(paths(&calls), [STATUS]);
    assert_eq!(told(&calls), ["Inspected"]);
    let status = status.expect("a status");
    assert_eq!(
        condition(&status, READY),
        ("True".into(), "Inspected".into(), "LlamaForCausalLM with 1.24B parameters in 2358Mi".into())
    );
    assert_eq!(condition(&status, RECONCILING).0, "False");
    let recorded = model("m", source(), status);
    let (calls, _) = round(&recorded, vec![done()], vec![], vec![]).await;
    assert_eq!(paths(&calls), [format!("DELETE {JOB}")]);
    // The API server refuses that: it is tried again, and what is known stands.
    let delete = format!("DELETE {JOB}");
    let refused = [(delete.as_str(), 403, failure(403, "Forbidden"))];
    let (calls, failed) = attempt(&recorded, vec![done()], vec![], vec![], &refused).await;
    assert_eq!(failed.expect_err("refused").category(), "WriteRefused");
    assert_eq!(paths(&calls), [delete.as_str()]);
    let (calls, _) = round(&recorded, vec![], vec![], vec![]).await;
    assert!(calls.is_empty(), "a settled object: {calls:?}");
}

#[rstest]
#[case::asks_for_acceptance(source(), &[("license", json!("llama3.2")), ("licenseNeedsAcceptance", json!(true))], "LicenseNotAccepted", "spec.license.accept` to llama3.2", true)]
#[case::accepted(json!({"source": {"uri": "pvc://a/b"}, "license": {"accept": "llama3.2"}}), &[("license", json!("llama3.2")), ("licenseNeedsAcceptance", json!(true))], "Inspected", "", false)]
#[case::adapter_without_base(source(), &[("architecture", json!("LoRA")), ("shape", json!({}))], "AdapterBaseMissing", "spec.adapterOf", true)]
#[case::weights_with_base(json!({"source": {"uri": "pvc://a/b"}, "adapterOf": {"name": "base"}}), &[], "NotAnAdapter", "whole weights", true)]
#[case::base_is_not_there(json!({"source": {"uri": "pvc://a/b"}, "adapterOf": {"name": "nobody"}}), &[("architecture", json!("LoRA")), ("shape", json!({}))], "BaseNotFound", "Model nobody", false)]
#[case::base_is_not_ready(json!({"source": {"uri": "pvc://a/b"}, "adapterOf": {"name": "base"}}), &[("architecture", json!("LoRA")), ("shape", json!({}))], "BaseNotReady", "describe model base", false)]
#[case::failed_its_gates(json!({"source": {"uri": "pvc://a/b"}, "derivedFrom": {"job": "t", "base": "b", "failedGates": ["BLEU is 3, must be at least 20"]}}), &[], "GateFailed", "FineTuneJob t: BLEU is 3, must be at least 20. Next: tune again", true)]
#[tokio::test]
async fn a_model_that_was_read_may_still_not_be_ready(
    #[case] spec: Value,
    #[case] over: &[(&str, Value)],
    #[case] reason: &str,
    #[case] words: &str,
    #[case] stalled: bool,
) {
    let done = job(Some(("Complete", Timestamp::now())));
    let base = model("base", source(), Value::Null);
    let (_, status) =
        round(&model("m", spec, Value::Null), vec![done], vec![pod(0, report(over))], vec![base]).await;
    let (_, found, message) = condition(&status.clone().expect("a status"), READY);
    assert_eq!(found, reason);
    assert!(message.contains(words), "{message}");
    assert_eq!(condition(&status.expect("a status"), STALLED).0 == "True", stalled);
}

#[tokio::test]
async fn a_failed_look_says_why_and_is_repeated_after_a_while() {
    let words = json!({"outcome": {"failed": {"reason": "MalformedModel", "message": "config.json is missing. Next: put it there.", "userError": true}}});
    let made = "2026-01-01T00:00:00Z".parse().expect("a time");
    let just = job(Some(("Failed", Timestamp::now())));
    let (calls, status) =
        round(&model("m", source(), Value::Null), vec![just], vec![pod(64, words.clone())], vec![]).await;
    assert_eq!(paths(&calls), [STATUS]);
    assert_eq!(told(&calls), ["MalformedModel"]);
    let status = status.expect("a status");
    assert_eq!(
        condition(&status, READY),
        ("False".into(), "MalformedModel".into(), "config.json is missing. Next: put it there.".into())
    );
    assert_eq!(condition(&status, STALLED).0, "True");
    let long_ago = job(Some(("Failed", made)));
    let (calls, _) =
        round(&model("m", source(), status.clone()), vec![long_ago], vec![pod(64, words)], vec![]).await;
    assert_eq!(paths(&calls), [format!("DELETE {JOB}")], "the status says it already");
    for jobs in [vec![], vec![job(None)]] {
        let (calls, _) = round(&model("m", source(), status.clone()), jobs, vec![], vec![]).await;
        assert!(!paths(&calls).contains(&STATUS), "it stands while a pod looks again: {calls:?}");
    }
}

/// An object with this owner stands under the name of the contract.
async fn with_contract_of(owner: Value) -> (Vec<Call>, Value) {
    let there = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": {"name": "m-inspect-contract", "namespace": "ns", "uid": "there", "ownerReferences": [owner]}});
    let (client, server) = Server::start(&[(GET_CONTRACT, 200, there)]);
    let controller = Models {
        context: context(client),
        models: filled(vec![]),
        jobs: filled(vec![]),
        pods: filled(vec![]),
        claims: filled(Vec::new()),
        contracts: filled(Vec::new()),
        policies: filled(Vec::new()),
    };
    // What is refused is in the status.
    drop(controller.reconcile(&model("m", source(), Value::Null)).await);
    drop(controller);
    let calls = server.calls().await;
    let status = sent::<Value>(&calls, STATUS)["status"].clone();
    (calls, status)
}

#[tokio::test]
async fn a_config_map_of_somebody_else_is_left_alone_and_told() {
    let owner = |kind: &str, name: &str, uid: &str| json!({"apiVersion": "a/v1", "kind": kind, "name": name, "uid": uid, "controller": true});
    let (calls, status) = with_contract_of(owner("App", "theirs", "other")).await;
    assert_eq!(paths(&calls), [GET_CONTRACT, STATUS]);
    let (_, reason, message) = condition(&status, READY);
    assert!(reason == "NameTaken" && message.contains("ConfigMap m-inspect-contract exists"), "{message}");
    assert_eq!(condition(&status, STALLED).0, "True");
    // Garbage collection takes what a Model of this name had; nobody need act.
    let (calls, status) = with_contract_of(owner("Model", "m", "earlier")).await;
    assert_eq!(paths(&calls), [GET_CONTRACT, STATUS]);
    assert_eq!(condition(&status, READY).1, "NameTaken");
    assert_eq!(
        (condition(&status, STALLED).0, condition(&status, RECONCILING).0),
        ("False".into(), "True".into())
    );
    // Our own one, made before a crash.
    let (calls, _) = with_contract_of(owner("Model", "m", "uid-m")).await;
    assert_eq!(sent::<Value>(&calls, MAKE_CONTRACT)["metadata"]["uid"], "there");
}

#[tokio::test]
async fn a_job_of_that_name_that_is_not_ours_is_told() {
    let foreign = json!({"metadata": {"name": "m-inspect", "namespace": "ns", "uid": "other"}, "spec": {"template": {}}});
    let (client, server) = Server::start(&[
        (MAKE_JOB, 409, failure(409, "AlreadyExists")),
        ("GET /apis/batch/v1/namespaces/ns/jobs/m-inspect", 200, foreign),
    ]);
    let controller = Models {
        context: context(client),
        models: filled(vec![]),
        jobs: filled(vec![]),
        pods: filled(vec![]),
        claims: filled(Vec::new()),
        contracts: filled(Vec::new()),
        policies: filled(Vec::new()),
    };
    let error = controller.reconcile(&model("m", source(), Value::Null)).await.expect_err("taken");
    assert_eq!(error.category(), "NameTaken");
    drop(controller);
    let calls = server.calls().await;
    let get = "GET /apis/batch/v1/namespaces/ns/jobs/m-inspect";
    assert_eq!(paths(&calls), [GET_CONTRACT, MAKE_CONTRACT, GET_POLICY, MAKE_POLICY, MAKE_JOB, get, STATUS]);
    let (_, reason, message) = condition(&calls[6].1["status"], READY);
    assert!(reason == "NameTaken" && message.contains("Next: delete Job m-inspect"), "{message}");
    assert_eq!(condition(&calls[6].1["status"], STALLED).0, "True");
}

#[tokio::test]
async fn an_inspection_that_lost_its_contract_has_it_again() {
    let mut live = job(None);
    live.metadata.annotations = Some([("lathe.dev/contract".to_owned(), "{as it was}".to_owned())].into());
    let (calls, _) = round(&model("m", source(), Value::Null), vec![live], vec![], vec![]).await;
    assert_eq!(paths(&calls), [GET_CONTRACT, MAKE_CONTRACT, STATUS]);
    let map: ConfigMap = sent(&calls, MAKE_CONTRACT);
    assert_eq!(map.data.expect("data")["contract.json"], "{as it was}");
}
