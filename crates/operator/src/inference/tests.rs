//! Rounds against a scripted API server: which calls, in which order, and none when nothing changed.
use std::sync::Mutex;

use http::{Request, Response};
use http_body_util::BodyExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{Client, client::Body};
use lathe_api::InferenceServiceStatus;
use lathe_contract::Signer;
use serde_json::{Value, json};

use super::{
    fixtures::{images, model, pod, profiles, read, ready, service, stored, trust},
    *,
};
use crate::{
    channel::Channel,
    context::{ArtifactVolume, Config},
};

/// An API server that remembers what is asked of it, and gives back what is applied.
#[derive(Clone, Default)]
struct Server(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    /// `METHOD path manager`.
    calls: Vec<String>,
    /// What was written, by path and manager.
    applied: Vec<(String, Value)>,
    /// Answers in place of 404, by path.
    there: Vec<(String, Value)>,
    /// Paths on which writes are refused.
    refused: Vec<String>,
}

impl Server {
    fn client(&self) -> Client {
        let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
        let server = self.clone();
        tokio::spawn(async move {
            while let Some((request, send)) = handle.next_request().await {
                send.send_response(server.answer(request).await);
            }
        });
        Client::new(service, "n")
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let method = request.method().to_string();
        let path = request.uri().path().trim_start_matches("/apis/").trim_start_matches("/api/").to_owned();
        let query = request.uri().query().unwrap_or_default().to_owned();
        let manager =
            query.split('&').find_map(|part| part.strip_prefix("fieldManager=")).unwrap_or_default();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mut script = self.0.lock().unwrap();
        script.calls.push(format!("{method} {path} {manager}").trim_end().to_owned());
        let (code, answer) = if method == "GET" {
            match script.there.iter().find(|(there, _)| *there == path) {
                Some((_, object)) => (200, object.clone()),
                None => (404, failure(404, "NotFound", "not found")),
            }
        } else if script.refused.contains(&path) {
            (403, failure(403, "Forbidden", "exceeded quota: objects"))
        } else {
            script.applied.push((format!("{path} {manager}"), body.clone()));
            // Whole, as the API server gives it back.
            if path == STATUS {
                body["spec"] = serde_json::to_value(service(json!({})).spec).unwrap();
            }
            body["metadata"]["generation"] = json!(1);
            (200, body)
        };
        Response::builder().status(code).body(Body::from(serde_json::to_vec(&answer).unwrap())).unwrap()
    }

    /// The calls since the last time.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }

    /// What the operator applied to a path last.
    fn applied<T: DeserializeOwned>(&self, path: &str) -> T {
        self.applied_by("lathe-operator", path)
    }

    fn applied_by<T: DeserializeOwned>(&self, manager: &str, path: &str) -> T {
        let script = self.0.lock().unwrap();
        let key = format!("{path} {manager}");
        let (_, body) = script.applied.iter().rev().find(|(applied, _)| *applied == key).unwrap();
        read(body.clone())
    }
}

fn failure(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message})
}

const CONTRACT: &str = "v1/namespaces/n/configmaps/svc-serve-contract";
const POLICY: &str = "networking.k8s.io/v1/namespaces/n/networkpolicies/svc-serve";
const ENDPOINT: &str = "v1/namespaces/n/services/svc";
const BUDGET: &str = "policy/v1/namespaces/n/poddisruptionbudgets/svc-serve";
const DEPLOYMENT: &str = "apps/v1/namespaces/n/deployments/svc-serve";
const STATUS: &str = "lathe.dev/v1alpha1/namespaces/n/inferenceservices/svc/status";

fn controller_of(server: &Server, children: Children, pods: Vec<Pod>) -> Services {
    let config = Config {
        release_namespace: "lathe-system".into(),
        namespaces: Vec::new(),
        images: images(),
        pull_policy: None,
        artifacts: ArtifactVolume {
            size: "1Gi".into(),
            storage_class: None,
            access_mode: "ReadWriteOnce".into(),
        },
    };
    let channel = Channel::new(Signer::from_seed(&[7; 32])).unwrap();
    let context = Context::new(server.client(), config, channel, trust(), Arc::default());
    let guard = |model| kube::core::DeserializeGuard(Ok(model));
    let stores = Stores {
        services: stored(Vec::new()),
        models: stored(vec![guard(model("base", "pvc://models/base", None))]),
        profiles: stored(
            profiles().into_iter().map(|profile| kube::core::DeserializeGuard(Ok(profile))).collect(),
        ),
        deployments: stored(children.deployment.into_iter().collect()),
        endpoints: stored(children.endpoint.into_iter().collect()),
        contracts: stored(children.contract.into_iter().collect()),
        budgets: stored(children.budget.into_iter().collect()),
        policies: stored(children.policy.into_iter().collect()),
        pods: stored(pods),
    };
    Services { context: Arc::new(context), stores, told: Told::default() }
}

/// What the API server holds after a round.
fn children(server: &Server) -> Children {
    let mut deployment: Deployment = server.applied(DEPLOYMENT);
    let scaled: Value = server.applied_by(SCALER, DEPLOYMENT);
    let replicas = &scaled["spec"]["replicas"];
    deployment.annotations_mut().insert(SCALED.to_owned(), replicas.to_string());
    deployment.spec.as_mut().unwrap().replicas = replicas.as_i64().map(|n| n as i32);
    Children {
        contract: Some(server.applied(CONTRACT)),
        policy: Some(server.applied(POLICY)),
        endpoint: Some(server.applied(ENDPOINT)),
        budget: Some(server.applied(BUDGET)),
        deployment: Some(deployment),
    }
}

/// A service after its first two rounds: everything is made, and the replicas are the scaler's alone.
async fn settled(server: &Server) -> InferenceService {
    let mut service = service(json!({}));
    controller_of(server, Children::default(), Vec::new()).reconcile(&service).await.unwrap();
    let written: Value = server.applied(STATUS);
    service.status = Some(read::<InferenceServiceStatus>(written["status"].clone()));
    controller_of(server, children(server), Vec::new()).reconcile(&service).await.unwrap();
    server.calls();
    service
}

#[tokio::test]
async fn what_pods_need_is_there_before_them() {
    let server = Server::default();
    controller_of(&server, Children::default(), Vec::new()).reconcile(&service(json!({}))).await.unwrap();
    let get = [CONTRACT, POLICY, ENDPOINT, BUDGET, DEPLOYMENT].map(|path| format!("GET {path}"));
    let apply =
        [CONTRACT, POLICY, ENDPOINT, BUDGET, DEPLOYMENT].map(|path| format!("PATCH {path} lathe-operator"));
    let rest = [
        format!("PATCH {DEPLOYMENT} lathe-scaler"),
        format!("PATCH {STATUS} lathe-operator"),
        "POST events.k8s.io/v1/namespaces/n/events".to_owned(),
    ];
    assert_eq!(server.calls(), [get.as_slice(), &apply, &rest].concat());
    // Made with its replicas, so that there never is another number of them.
    assert_eq!(server.applied::<Value>(DEPLOYMENT)["spec"]["replicas"], 1);
    assert_eq!(server.applied_by::<Value>(SCALER, DEPLOYMENT)["spec"], json!({"replicas": 1}));
}

#[tokio::test]
async fn replicas_are_given_up_once_and_then_nothing_is_written() {
    let server = Server::default();
    let service = settled(&server).await;
    assert_eq!(server.applied::<Value>(DEPLOYMENT)["spec"].get("replicas"), None);
    controller_of(&server, children(&server), Vec::new()).reconcile(&service).await.unwrap();
    assert_eq!(server.calls(), Vec::<String>::new());
}

#[tokio::test]
async fn what_somebody_changed_is_set_right_alone() {
    let server = Server::default();
    let service = settled(&server).await;
    let mut changed = children(&server);
    changed.endpoint.as_mut().unwrap().spec.as_mut().unwrap().selector = None;
    controller_of(&server, changed, Vec::new()).reconcile(&service).await.unwrap();
    assert_eq!(server.calls(), [format!("PATCH {ENDPOINT} lathe-operator")]);
}

#[tokio::test]
async fn replicas_are_the_scalers_and_no_plan_is_needed_to_stop() {
    let server = Server::default();
    settled(&server).await;
    let stopped = service(json!({"replicas": 0, "modelRef": {"name": "gone"}}));
    controller_of(&server, children(&server), Vec::new()).reconcile(&stopped).await.unwrap();
    let writes: Vec<String> = server.calls().into_iter().filter(|call| call.starts_with("PATCH")).collect();
    assert_eq!(
        writes,
        [format!("PATCH {DEPLOYMENT} lathe-scaler"), format!("PATCH {STATUS} lathe-operator")]
    );
    assert_eq!(server.applied_by::<Value>(SCALER, DEPLOYMENT)["spec"], json!({"replicas": 0}));
}

#[tokio::test]
async fn an_object_of_somebody_else_is_left_alone() {
    let server = Server::default();
    let foreign = json!({"metadata": {"name": "svc", "namespace": "n", "uid": "uid-foreign"}});
    server.0.lock().unwrap().there.push((ENDPOINT.to_owned(), foreign));
    controller_of(&server, Children::default(), Vec::new()).reconcile(&service(json!({}))).await.unwrap();
    let writes: Vec<String> = server.calls().into_iter().filter(|call| call.starts_with("PATCH")).collect();
    assert_eq!(writes, [format!("PATCH {STATUS} lathe-operator")]);
    let status: Value = server.applied(STATUS);
    let ready =
        status["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap();
    assert_eq!(ready["reason"], "NameTaken");
}

#[tokio::test]
async fn a_refusal_of_the_api_server_is_a_condition() {
    let server = Server::default();
    server.0.lock().unwrap().refused.push(DEPLOYMENT.to_owned());
    controller_of(&server, Children::default(), Vec::new()).reconcile(&service(json!({}))).await.unwrap();
    let status: Value = server.applied(STATUS);
    let stalled =
        status["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Stalled").unwrap();
    assert_eq!((&stalled["status"], &stalled["reason"]), (&json!("True"), &json!("WriteRefused")));
    assert!(stalled["message"].as_str().unwrap().contains("exceeded quota"));
}

#[tokio::test]
async fn a_worker_that_does_not_answer_holds_up_nothing() {
    let server = Server::default();
    let mut status = ready();
    status["podIP"] = json!("not an address");
    let checksum = "none";
    let services = controller_of(&server, Children::default(), vec![pod("p", checksum, status)]);
    services.reconcile(&service(json!({}))).await.unwrap();
    let written: Value = server.applied(STATUS);
    assert_eq!(written["status"]["replicas"], 1);
    assert!(written["status"].get("throughput").is_none());
}
