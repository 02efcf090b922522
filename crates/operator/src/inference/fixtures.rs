//! A service, its models and what surrounds them, for tests.
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use lathe_api::{AcceleratorProfile, InferenceService, Model};
use lathe_resolve::inference::Serving;
use serde_json::{Value, json};

pub use crate::testing::{config, object as read, trust};

use super::{observe::Observed, plan::plan};

/// A service of the namespace `n` with some fields of its spec.
pub fn service(more: Value) -> InferenceService {
    let mut spec = json!({"modelRef": {"name": "base"}, "access": "Direct"});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    read(json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {
            "name": "svc", "namespace": "n", "uid": "uid-svc", "generation": 1,
            "creationTimestamp": "2026-01-02T00:00:00Z",
        },
        "spec": spec,
    }))
}

/// A Model that is ready; `adapter_of` names an adapter's base.
pub fn model(name: &str, uri: &str, adapter_of: Option<&str>) -> Model {
    let mut spec = json!({"source": {"uri": uri}});
    if let Some(base) = adapter_of {
        spec["adapterOf"] = json!({"name": base});
    }
    read(json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "Model",
        "metadata": {"name": name, "namespace": "n", "uid": format!("uid-{name}")},
        "spec": spec,
        "status": {
            "observedGeneration": 1, "contextLength": 512,
            "conditions": [condition("Ready", "True", "Inspected", "")],
            "shape": {
                "vocab": 1000, "hidden": 64, "layers": 2, "heads": 4, "kvHeads": 2, "headDim": 16, "intermediate": 128,
            },
        },
    }))
}

pub fn condition(type_: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({
        "type": type_, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    })
}

pub fn profiles() -> Vec<AcceleratorProfile> {
    let profile = |name: &str, spec: Value| AcceleratorProfile::new(name, read(spec));
    vec![
        profile("cpu", json!({"resource": "cpu", "devicesPerNode": 64, "runtime": "CPU"})),
        profile(
            "gpu",
            json!({
                "resource": "nvidia.com/gpu", "memory": "24Gi", "runtime": "CUDA", "image": "own/worker:1",
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["L4"]}]}],
            }),
        ),
    ]
}

/// What is seen where nothing was made yet; adapters `tone` and `far` are on the base's volume and on another.
pub fn seen(service: &InferenceService) -> Observed {
    let adapters =
        [("tone", "pvc://models/tone"), ("far", "pvc://elsewhere/far"), ("foreign", "pvc://models/f")];
    let find = |name: &str| {
        let (_, uri) = adapters.iter().find(|(own, _)| *own == name)?;
        Some(model(name, uri, Some(if name == "foreign" { "other" } else { "base" })))
    };
    Observed {
        base: Some(model("base", "pvc://models/base", None)),
        adapters: service.spec.adapter_refs.iter().map(|adapter| find(&adapter.name)).collect(),
        profiles: profiles(),
        ..Observed::default()
    }
}

pub fn serving(service: &InferenceService, seen: &Observed) -> Serving {
    plan(service, seen, &trust(), &config()).unwrap()
}

/// A Deployment that its controller has seen, for pods of `checksum`.
pub fn deployment(checksum: &str, annotations: Value) -> Deployment {
    read(json!({
        "metadata": {"name": "svc-serve", "namespace": "n", "uid": "uid-d", "generation": 3, "annotations": annotations},
        "spec": {
            "replicas": 1, "selector": {},
            "template": {
                "metadata": {"annotations": {"lathe.dev/contract-checksum": checksum}},
                "spec": {
                    "containers": [{"name": "worker", "image": "registry/lathe-worker:0"}],
                    "volumes": [{"name": "claim-0", "persistentVolumeClaim": {"claimName": "models"}}],
                },
            },
        },
        "status": {"observedGeneration": 3},
    }))
}

/// A pod of `checksum` with this status.
pub fn pod(name: &str, checksum: &str, status: Value) -> Pod {
    read(json!({
        "metadata": {
            "name": name, "namespace": "n", "uid": format!("uid-{name}"),
            "labels": {"lathe.dev/kind": "inferenceservice", "lathe.dev/name": "svc", "lathe.dev/task": "serve"},
            "annotations": {"lathe.dev/contract-checksum": checksum},
        },
        "spec": {"containers": [{"name": "worker"}]},
        "status": status,
    }))
}

pub fn ready() -> Value {
    json!({"podIP": "10.0.0.9", "conditions": [{"type": "Ready", "status": "True"}]})
}
