//! Rounds against a scripted API server: which calls, in which order, and none when nothing changed.
mod recorded;
mod rollout;

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::core::DeserializeGuard;
use lathe_api::{InferenceServiceStatus, Model};
use rstest::rstest;
use serde_json::{Value, json};

use super::{
    fixtures::{model, pod, profiles, ready, seen, service, serving},
    *,
};
use crate::{
    scaling::{SCALED, SCALER},
    testing::{Call, Server, context, failure, filled, object, paths, sent},
};

const POLICY: &str = "/apis/networking.k8s.io/v1/namespaces/n/networkpolicies/svc-serve";
const ENDPOINT: &str = "/api/v1/namespaces/n/services/svc";
const BUDGET: &str = "/apis/policy/v1/namespaces/n/poddisruptionbudgets/svc-serve";
const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/n/deployments/svc-serve";
const STATUS: &str = "PATCH /apis/lathe.dev/v1alpha1/namespaces/n/inferenceservices/svc/status";

/// Path of the contract of the revision that `service` asks for.
fn contract(service: &InferenceService) -> String {
    let checksum = serving(service, &seen(service)).checksum;
    format!("/api/v1/namespaces/n/configmaps/svc-serve-contract-{}", &checksum[..10])
}

fn patch(path: &str) -> String {
    format!("PATCH {path}")
}

fn scale() -> String {
    format!("PATCH {DEPLOYMENT} {SCALER}")
}

/// One round in a cluster that holds these objects.
async fn round(
    service: &InferenceService,
    children: Children,
    pods: Vec<Pod>,
    answers: &[(&str, u16, Value)],
) -> Vec<Call> {
    round_among(service, vec![model("base", "pvc://models/base", None)], children, pods, answers).await
}

/// As [`round`], with these Models; a refusal is told in the status.
async fn round_among(
    service: &InferenceService,
    models: Vec<Model>,
    children: Children,
    pods: Vec<Pod>,
    answers: &[(&str, u16, Value)],
) -> Vec<Call> {
    let (calls, done) = attempt(service, models, children, pods, answers).await;
    assert!(done.as_ref().err().is_none_or(Error::is_told), "{done:?}");
    calls
}

/// The calls of one round, and how it ended.
async fn attempt(
    service: &InferenceService,
    models: Vec<Model>,
    children: Children,
    pods: Vec<Pod>,
    answers: &[(&str, u16, Value)],
) -> (Vec<Call>, Result<Action, Error>) {
    let (client, server) = Server::start(answers);
    let guard = |model| DeserializeGuard(Ok(model));
    let stores = Stores {
        services: filled(Vec::new()),
        models: filled(models.into_iter().map(guard).collect()),
        profiles: filled(profiles().into_iter().map(|profile| DeserializeGuard(Ok(profile))).collect()),
        deployments: filled(children.deployment.into_iter().chain(children.candidate).collect()),
        endpoints: filled(children.endpoint.into_iter().collect()),
        contracts: filled(children.contracts),
        budgets: filled(children.budget.into_iter().collect()),
        policies: filled(children.policy.into_iter().collect()),
        pods: filled(pods),
        claims: filled(Vec::new()),
    };
    let services = Services { context: context(client), stores, told: Told::default() };
    // On the heap: some tests await many rounds.
    let done = services.reconcile(service).boxed().await;
    drop(services);
    (server.calls().await, done)
}

/// What the API server holds after the calls of a round of `service`.
fn children(service: &InferenceService, calls: &[Call]) -> Children {
    let mut deployment: Deployment = sent(calls, &patch(DEPLOYMENT));
    // The scaler of an autoscaled service takes what is there.
    let replicas = match service.spec.autoscaling {
        None => sent::<Value>(calls, &scale())["spec"]["replicas"].as_i64().expect("a number") as i32,
        Some(_) => scaling::begin(service),
    };
    deployment.annotations_mut().insert(SCALED.to_owned(), replicas.to_string());
    deployment.spec.as_mut().expect("a spec").replicas = Some(replicas);
    Children {
        contracts: vec![sent(calls, &patch(&contract(service)))],
        policy: Some(sent(calls, &patch(POLICY))),
        endpoint: Some(sent(calls, &patch(ENDPOINT))),
        budget: Some(sent(calls, &patch(BUDGET))),
        deployment: Some(deployment),
        candidate: None,
    }
}

/// A service after its first two rounds: everything is made, and the replicas are the scaler's alone. Also the calls of both.
async fn settled() -> (InferenceService, Vec<Call>) {
    settled_as(service(json!({}))).await
}

async fn settled_as(mut service: InferenceService) -> (InferenceService, Vec<Call>) {
    let mut calls = round(&service, Children::default(), Vec::new(), &[]).await;
    let written: Value = sent(&calls, STATUS);
    service.status = Some(object::<InferenceServiceStatus>(written["status"].clone()));
    // From the third on the Deployment is seen as the API server has it, and not by the fields alone that were sent last.
    for _ in 0..2 {
        let next = round(&service, children(&service, &calls), Vec::new(), &[]).await;
        calls.extend(next);
    }
    let written: Value = sent(&calls, STATUS);
    service.status = Some(object::<InferenceServiceStatus>(written["status"].clone()));
    (service, calls)
}

fn writes(calls: &[Call]) -> Vec<&str> {
    paths(calls).into_iter().filter(|call| !call.starts_with("GET")).collect()
}

fn said(calls: &[Call], type_: &str) -> Value {
    let status: Value = sent(calls, STATUS);
    let conditions = status["status"]["conditions"].as_array().expect("conditions").clone();
    conditions.into_iter().find(|condition| condition["type"] == type_).expect("the condition")
}

#[tokio::test]
async fn what_pods_need_is_there_before_them() {
    let service = service(json!({}));
    let calls = round(&service, Children::default(), Vec::new(), &[]).await;
    let get = |path: &str| format!("GET {path}");
    let contract = contract(&service);
    let apply =
        [contract.as_str(), POLICY, ENDPOINT, BUDGET, DEPLOYMENT].map(|path| [get(path), patch(path)]);
    let rest = [scale(), STATUS.to_owned()];
    assert_eq!(paths(&calls), [&[get(DEPLOYMENT)][..], &apply.concat(), &rest].concat());
    // Made with its replicas, so that there never is another number of them.
    assert_eq!(sent::<Value>(&calls, &patch(DEPLOYMENT))["spec"]["replicas"], 1);
    assert_eq!(sent::<Value>(&calls, &scale())["spec"], json!({"replicas": 1}));
}

#[tokio::test]
async fn replicas_are_given_up_once_and_then_nothing_is_written() {
    let (service, calls) = settled().await;
    assert_eq!(sent::<Value>(&calls, &patch(DEPLOYMENT))["spec"].get("replicas"), None);
    let calls = round(&service, children(&service, &calls), Vec::new(), &[]).await;
    assert!(calls.is_empty(), "{calls:?}");
}

/// A node that is short of memory leaves the pod behind that it ended, for days.
#[tokio::test]
async fn a_pod_that_its_node_ended_does_not_count() {
    let (service, calls) = settled().await;
    let checksum = serving(&service, &seen(&service)).checksum;
    let mut children = children(&service, &calls);
    children.deployment.as_mut().expect("there").status = Some(object(json!({"observedGeneration": 1})));
    let ended =
        json!({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."});
    let pods = vec![pod("evicted", &checksum, ended), pod("next", &checksum, ready())];
    let calls = round(&service, children, pods, &[]).await;
    assert_eq!(said(&calls, "RolledOut")["status"], "True");
    assert_eq!(said(&calls, "Reconciling")["status"], "False");
}

/// However long it waits: the watches tell what changes.
#[tokio::test]
async fn a_service_that_waits_for_a_node_asks_the_api_server_for_nothing() {
    let (mut service, calls) = settled().await;
    let checksum = serving(&service, &seen(&service)).checksum;
    let unscheduled = json!({"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "1 Insufficient cpu"}]});
    let pods = || vec![pod("p", &checksum, unscheduled.clone())];
    let told = round(&service, children(&service, &calls), pods(), &[]).await;
    assert_eq!(said(&told, "Ready")["reason"], "AcceleratorUnavailable");
    let written: Value = sent(&told, STATUS);
    service.status = Some(object::<InferenceServiceStatus>(written["status"].clone()));
    let calls = round(&service, children(&service, &calls), pods(), &[]).await;
    assert!(calls.is_empty(), "{calls:?}");
}

#[tokio::test]
async fn what_somebody_changed_is_set_right_alone() {
    let (service, calls) = settled().await;
    let mut changed = children(&service, &calls);
    changed.endpoint.as_mut().expect("there").spec.as_mut().expect("a spec").selector = None;
    let calls = round(&service, changed, Vec::new(), &[]).await;
    assert_eq!(paths(&calls), [patch(ENDPOINT)]);
}

#[tokio::test]
async fn what_somebody_put_beside_ours_is_taken_out_and_nothing_else_is_written() {
    let (service, calls) = settled().await;
    let mut changed = children(&service, &calls);
    let deployment = changed.deployment.as_mut().expect("there");
    deployment.metadata.resource_version = Some("7".to_owned());
    let pod = deployment.spec.as_mut().and_then(|spec| spec.template.spec.as_mut()).expect("a pod");
    pod.containers.insert(0, object(json!({"name": "miner", "image": "x"})));
    let endpoint = changed.endpoint.as_mut().and_then(|endpoint| endpoint.spec.as_mut()).expect("there");
    endpoint.ports.as_mut().expect("ports").push(object(json!({"name": "debug", "port": 22})));
    let (of_endpoint, of_deployment) = (patch(ENDPOINT), patch(DEPLOYMENT));
    let answers = [(of_endpoint.as_str(), 200, json!({})), (of_deployment.as_str(), 200, json!({}))];
    let calls = round(&service, changed, Vec::new(), &answers).await;
    assert_eq!(paths(&calls), [of_endpoint, of_deployment]);
    assert_eq!(calls[0].1, json!([{"op": "remove", "path": "/spec/ports/1"}]));
    assert_eq!(
        calls[1].1,
        json!([{"op": "add", "path": "/metadata/resourceVersion", "value": "7"},
            {"op": "remove", "path": "/spec/template/spec/containers/0"}])
    );
}

/// Each is one edit by hand; what is written is ours again, and nothing else is touched.
#[rstest]
#[case::of_the_endpoint("endpoint", "/spec/selector/app", json!("x"), patch(ENDPOINT), None)]
#[case::of_the_policy("policy", "/spec/podSelector/matchLabels/app", json!("x"), patch(POLICY), None)]
#[case::of_the_budget("budget", "/spec/selector/matchLabels/app", json!("x"), patch(BUDGET), None)]
#[case::environment("deployment", "/spec/template/spec/containers/0/env", json!([{"name": "LD_PRELOAD", "value": "x"}]),
    patch(DEPLOYMENT), Some(json!({"op": "remove", "path": "/spec/template/spec/containers/0/env"})))]
#[case::hooks("deployment", "/spec/template/spec/containers/0/lifecycle", json!({"postStart": {"exec": {"command": ["x"]}}}),
    patch(DEPLOYMENT), Some(json!({"op": "remove", "path": "/spec/template/spec/containers/0/lifecycle"})))]
#[case::tolerations(
    "deployment", "/spec/template/spec/tolerations/-", json!({"operator": "Exists"}), patch(DEPLOYMENT), None)]
#[case::nodes(
    "deployment", "/spec/template/spec/nodeSelector", json!({"a": "b"}), patch(DEPLOYMENT),
    Some(json!({"op": "remove", "path": "/spec/template/spec/nodeSelector"})))]
#[case::volumes("deployment", "/spec/template/spec/volumes/-", json!({"name": "root", "hostPath": {"path": "/"}}),
    patch(DEPLOYMENT), Some(json!({"op": "remove", "path": "/spec/template/spec/volumes/4"})))]
#[tokio::test]
async fn what_somebody_added_goes(
    #[case] which: &str,
    #[case] pointer: &str,
    #[case] value: Value,
    #[case] written: String,
    #[case] taken_out: Option<Value>,
) {
    fn edited<K: serde::Serialize + serde::de::DeserializeOwned>(
        object: &mut Option<K>,
        pointer: &str,
        value: &Value,
    ) {
        let mut json = serde_json::to_value(&object).expect("JSON");
        let add = json!([{"op": "add", "path": pointer, "value": value}]);
        json_patch::patch(&mut json, &crate::testing::object::<json_patch::Patch>(add)).expect("there");
        *object = Some(crate::testing::object(json));
    }
    let (service, calls) = settled().await;
    let mut changed = children(&service, &calls);
    match which {
        "endpoint" => edited(&mut changed.endpoint, pointer, &value),
        "policy" => edited(&mut changed.policy, pointer, &value),
        "budget" => edited(&mut changed.budget, pointer, &value),
        _ => edited(&mut changed.deployment, pointer, &value),
    }
    let answers = [(written.as_str(), 200, json!({}))];
    let calls = round(&service, changed, Vec::new(), if taken_out.is_some() { &answers } else { &[] }).await;
    let mut expected = vec![written.clone()];
    // Who applies a Deployment applies its replicas too.
    expected
        .extend((which == "deployment" && taken_out.is_none()).then(|| format!("{written} lathe-scaler")));
    assert_eq!(paths(&calls), expected);
    match taken_out {
        Some(operation) => assert_eq!(calls[0].1, json!([operation])),
        None => assert_eq!(sent::<Value>(&calls, &written).pointer(pointer), None),
    }
}

#[tokio::test]
async fn replicas_are_the_scalers_and_no_plan_is_needed_to_stop() {
    let (was, calls) = settled().await;
    let stopped = service(json!({"replicas": 0, "modelRef": {"name": "gone"}}));
    let calls = round(&stopped, children(&was, &calls), Vec::new(), &[]).await;
    assert_eq!(writes(&calls), [scale().as_str(), STATUS]);
    assert_eq!(sent::<Value>(&calls, &scale())["spec"], json!({"replicas": 0}));
}

/// Of a service whose replicas the tokens that flow decide.
fn autoscaled(min: i32, more: Value) -> InferenceService {
    let mut spec = json!({"access": "GatewayOnly", "autoscaling": {"minReplicas": min, "maxReplicas": 3}});
    json_patch::merge(&mut spec, &more);
    service(spec)
}

#[rstest]
#[case::as_the_spec_says(json!({"replicas": 2}), None, 2)]
#[case::within_the_bounds(json!({"replicas": 9}), None, 3)]
#[case::as_many_as_there_were_last(json!({}), Some(0), 0)]
#[tokio::test]
async fn an_autoscaled_deployment_is_made_with_its_replicas_and_left_to_the_scaler(
    #[case] spec: Value,
    #[case] last: Option<i32>,
    #[case] expected: i32,
) {
    let mut service = autoscaled(0, spec);
    if let Some(replicas) = last {
        service.status = Some(object(json!({"observedGeneration": 1, "scaling": {"replicas": replicas}})));
    }
    let calls = round(&service, Children::default(), Vec::new(), &[]).await;
    assert_eq!(sent::<Value>(&calls, &patch(DEPLOYMENT))["spec"]["replicas"], expected);
    assert!(!paths(&calls).contains(&scale().as_str()), "{calls:?}");
}

#[tokio::test]
async fn what_the_scaler_writes_of_the_status_is_no_change() {
    let (manual, calls) = settled().await;
    let mut service = autoscaled(1, json!({"access": "Direct"}));
    let mut children = children(&manual, &calls);
    // As the scaler left it.
    let deployment = children.deployment.as_mut().expect("there");
    deployment.spec.as_mut().expect("a spec").replicas = Some(2);
    deployment.annotations_mut().insert(SCALED.to_owned(), "2".to_owned());
    let first = round(&service, children.clone(), Vec::new(), &[]).await;
    assert_eq!(writes(&first), [STATUS]);
    let written: Value = sent(&first, STATUS);
    assert!(written["status"].get("scaling").is_none() && written["status"].get("decisions").is_none());
    let mut status = written["status"].clone();
    status["scaling"] = json!({"replicas": 2});
    status["decisions"] =
        json!([{"time": "2026-01-01T00:00:00Z", "from": 1, "to": 2, "reason": "OnTarget", "message": "m"}]);
    service.status = Some(object(status));
    // Only the condition knows of it.
    let second = round(&service, children.clone(), Vec::new(), &[]).await;
    assert_eq!(said(&second, "ScalingActive")["reason"], "FollowsThroughput");
    let mut both: Value = sent::<Value>(&second, STATUS)["status"].clone();
    both["scaling"] = json!({"replicas": 2, "memory": {"busy": 7}});
    service.status = Some(object(both));
    assert!(round(&service, children, Vec::new(), &[]).await.is_empty());
}

#[tokio::test]
async fn an_object_of_somebody_else_is_left_alone() {
    let foreign = json!({"metadata": {"name": "svc", "namespace": "n", "uid": "uid-foreign"}});
    let get = format!("GET {ENDPOINT}");
    let service = service(json!({}));
    let calls = round(&service, Children::default(), Vec::new(), &[(&get, 200, foreign)]).await;
    // No pod is made that could not be reached.
    assert_eq!(writes(&calls), [patch(&contract(&service)), patch(POLICY), STATUS.to_owned()]);
    assert_eq!(said(&calls, "Ready")["reason"], "NameTaken");
    assert_eq!(said(&calls, "Stalled")["status"], "True");
}

#[tokio::test]
async fn a_refusal_of_the_api_server_is_a_condition() {
    let mut refusal = failure(403, "Forbidden");
    refusal["message"] = json!("exceeded quota: objects");
    let make = patch(DEPLOYMENT);
    let models = vec![model("base", "pvc://models/base", None)];
    let answers = [(make.as_str(), 403, refusal)];
    let (calls, done) = attempt(&service(json!({})), models, Children::default(), Vec::new(), &answers).await;
    // It is tried again as everything that fails is: with pauses that grow.
    assert_eq!(done.expect_err("refused").category(), "WriteRefused");
    let stalled = said(&calls, "Stalled");
    assert_eq!((&stalled["status"], &stalled["reason"]), (&json!("True"), &json!("WriteRefused")));
    assert!(stalled["message"].as_str().is_some_and(|words| words.contains("exceeded quota")));
}

#[tokio::test]
async fn a_worker_that_does_not_answer_holds_up_nothing() {
    let mut status = ready();
    status["podIP"] = json!("not an address");
    let pods = vec![pod("p", "none", status)];
    let calls = round(&service(json!({})), Children::default(), pods, &[]).await;
    let written: Value = sent(&calls, STATUS);
    assert_eq!(written["status"]["readyReplicas"], 1);
    assert!(written["status"].get("throughput").is_none());
}

/// A roll-out has its own contract; the one before stays until no pod of it is left.
#[tokio::test]
async fn the_contract_of_an_earlier_revision_goes_when_nobody_reads_it_any_more() {
    let (service, calls) = settled().await;
    let world = |updated: i32| {
        let mut children = children(&service, &calls);
        let mut old: ConfigMap = children.contracts[0].clone();
        old.metadata.name = Some("svc-serve-contract-old".to_owned());
        children.contracts.push(old);
        let deployment = children.deployment.as_mut().expect("there");
        deployment.metadata.generation = Some(2);
        let status = json!({"observedGeneration": 2, "replicas": 1, "updatedReplicas": updated});
        deployment.status = Some(object(status));
        children
    };
    let checksum = serving(&service, &seen(&service)).checksum;
    let delete = "DELETE /api/v1/namespaces/n/configmaps/svc-serve-contract-old";
    let deletes = |calls: &[Call]| writes(calls).contains(&delete);
    let current = || vec![pod("new", &checksum, json!({}))];
    assert!(deletes(&round(&service, world(1), current(), &[]).await));
    assert!(!deletes(&round(&service, world(0), current(), &[]).await), "an old pod may be made again");
    // What is left over says nothing of the service.
    let before: Value = sent(&round(&service, world(1), current(), &[]).await, STATUS);
    let models = vec![model("base", "pvc://models/base", None)];
    let refused = [(delete, 403, failure(403, "Forbidden"))];
    let (calls, done) = attempt(&service, models, world(1), current(), &refused).await;
    assert_eq!(done.expect_err("refused").category(), "WriteRefused");
    let reasons = |status: &Value| -> Vec<Value> {
        let conditions = status["status"]["conditions"].as_array().expect("conditions");
        conditions.iter().map(|condition| condition["reason"].clone()).collect()
    };
    assert_eq!(reasons(&sent(&calls, STATUS)), reasons(&before));
    let both = vec![pod("new", &checksum, json!({})), pod("old", "before", json!({}))];
    assert!(!deletes(&round(&service, world(1), both, &[]).await));
}
