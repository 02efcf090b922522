//! Objects as the API server has them.
use k8s_openapi::api::discovery::v1::EndpointSlice;
use lathe_api::{FineTuneJob, InferenceService};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// An object from JSON.
pub fn object<K: DeserializeOwned>(json: Value) -> K {
    serde_json::from_value(json).expect("an object")
}

/// A service with adapters, whose status says that `answers` answer.
pub fn service(namespace: &str, name: &str, adapters: &[&str], answers: &[&str]) -> InferenceService {
    let adapters: Vec<Value> = adapters.iter().map(|name| json!({"name": name})).collect();
    object(json!({
        "apiVersion": "lathe.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {
            "namespace": namespace, "name": name, "uid": format!("uid-{namespace}-{name}"),
            "creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "1",
        },
        "spec": {"modelRef": {"name": "base"}, "adapterRefs": adapters, "access": "Direct"},
        "status": {"modelIds": answers},
    }))
}

/// A job that makes the Model of its own name, with this status.
pub fn job(namespace: &str, name: &str, status: Value) -> FineTuneJob {
    object(json!({
        "apiVersion": "lathe.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "namespace": namespace, "name": name, "uid": format!("uid-{namespace}-{name}"),
            "creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "1",
        },
        "spec": {
            "baseModelRef": {"name": "base"},
            "dataset": {"train": {"uri": "pvc://data/train.jsonl"}},
            "output": {"modelName": name},
        },
        "status": status,
    }))
}

/// A slice of a service's pods: addresses and conditions; all at port 8080.
pub fn slice(namespace: &str, service: &str, pods: &[(&str, Value)]) -> EndpointSlice {
    let mut slice = slice_at(namespace, service, 8080);
    let endpoint =
        |(address, conditions): &(&str, Value)| json!({"addresses": [address], "conditions": conditions});
    let endpoints: Vec<Value> = pods.iter().map(endpoint).collect();
    slice["endpoints"] = json!(endpoints);
    object(slice)
}

/// An empty slice whose pods serve at `port`.
pub fn slice_at(namespace: &str, service: &str, port: u16) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {
            "namespace": namespace, "name": format!("{service}-{port}"), "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": service, "lathe.dev/kind": "inferenceservice"},
        },
        "endpoints": [],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    })
}
