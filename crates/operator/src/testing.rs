//! A Kubernetes API that answers every call and remembers it: tests compare the whole list, so that a missing call fails as
//! a surplus one does.
use std::{collections::HashMap, sync::Arc};

use http::{Request, Response};
use kube::{
    Client, Resource,
    client::Body,
    runtime::{
        reflector::{Store, store},
        watcher::Event,
    },
};
use lathe_api::names::FIELD_MANAGER;
use lathe_contract::{Signer, Trust};
use lathe_resolve::inference::Images;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::{
    channel::Channel,
    context::{ArtifactVolume, Config, Context},
    health::Health,
};

/// A call: method, path and, where it is not the operator's usual one, the field manager; and the body.
pub type Call = (String, Value);

/// The API server's end.
pub struct Server(JoinHandle<Vec<Call>>);

impl Server {
    /// A client and its server. `answers`: status code and body by `METHOD path`; other writes are echoed, other reads find
    /// nothing.
    pub fn start(answers: &[(&str, u16, Value)]) -> (Client, Self) {
        let answers: HashMap<String, (u16, Value)> =
            answers.iter().map(|(call, code, body)| ((*call).to_owned(), (*code, body.clone()))).collect();
        let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
        let served = tokio::spawn(async move {
            let mut calls = Vec::new();
            while let Some((request, reply)) = handle.next_request().await {
                let (parts, body) = request.into_parts();
                let bytes = body.collect_bytes().await.expect("a body");
                let body: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
                let query = parts.uri.query().unwrap_or_default().split('&');
                let manager = query.filter_map(|part| part.strip_prefix("fieldManager=")).next();
                let other =
                    manager.filter(|m| *m != FIELD_MANAGER).map_or(String::new(), |m| format!(" {m}"));
                let call = format!("{} {}{other}", parts.method, parts.uri.path());
                let (code, answer) = match (answers.get(&call), parts.method.as_str()) {
                    (Some(answer), _) => answer.clone(),
                    (None, "GET") => (404, failure(404, "NotFound")),
                    (None, "DELETE") => {
                        (200, json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}))
                    }
                    (None, _) => (200, body.clone()),
                };
                calls.push((call, body));
                let response =
                    Response::builder().status(code).body(Body::from(answer.to_string().into_bytes()));
                reply.send_response(response.expect("a response"));
            }
            calls
        });
        (Client::new(service, "default"), Self(served))
    }

    /// What was called, once every client is gone.
    pub async fn calls(self) -> Vec<Call> {
        self.0.await.expect("the server")
    }
}

/// Methods and paths, in their order; events apart, which nothing depends on.
pub fn paths(calls: &[Call]) -> Vec<&str> {
    calls.iter().map(|(call, _)| call.as_str()).filter(|call| !call.ends_with("/events")).collect()
}

/// Reasons of the events that were told, in their order.
pub fn told(calls: &[Call]) -> Vec<String> {
    let events = calls.iter().filter(|(call, _)| call.ends_with("/events"));
    events.map(|(_, body)| body["reason"].as_str().unwrap_or_default().to_owned()).collect()
}

/// The last body that was sent with this call.
pub fn sent<K: DeserializeOwned>(calls: &[Call], call: &str) -> K {
    let body = calls.iter().rev().find(|(made, _)| made == call).map(|(_, body)| body.clone());
    object(body.unwrap_or_else(|| panic!("no {call} in {:?}", paths(calls))))
}

/// The API server's words of a failure.
pub fn failure(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": reason})
}

/// What controllers share, on a scripted server.
pub fn context(client: Client) -> Arc<Context> {
    let channel = Channel::new(Signer::from_seed(&[1; 32])).expect("a channel");
    Arc::new(Context::new(client, config(), channel, trust(), Health::new(Arc::default())))
}

/// How an installation is set up.
pub fn config() -> Config {
    Config {
        release_namespace: "lathe-system".to_owned(),
        scraper: None,
        namespaces: Vec::new(),
        gateway: true,
        images: images(),
        pull_policy: None,
        tracing: None,
        artifacts: ArtifactVolume {
            size: "5Gi".to_owned(),
            storage_class: None,
            access_mode: "ReadWriteMany".to_owned(),
        },
    }
}

/// Worker images.
pub fn images() -> Images {
    Images { cpu: "worker:1".to_owned(), cuda: None }
}

/// Whom workers believe.
pub fn trust() -> Trust {
    Trust { operator_key: Some("operator".to_owned()), gateway_key: None }
}

/// A store that holds these objects.
pub fn filled<K>(objects: Vec<K>) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let (reader, mut writer) = store::<K>();
    writer.apply_watcher_event(&Event::Init);
    for object in objects {
        writer.apply_watcher_event(&Event::InitApply(object));
    }
    writer.apply_watcher_event(&Event::InitDone);
    reader
}

/// An object from JSON.
pub fn object<K: DeserializeOwned>(json: Value) -> K {
    serde_json::from_value(json).expect("an object")
}
