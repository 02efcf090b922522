//! Examples for programs that are not here: of the fields that their APIs have, and in agreement with what Lathe makes.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::collections::BTreeMap;
use std::fs;

use lathe_api::{Access, InferenceService};
use lathe_contract::SERVE_PORT;
use lathe_resolve::pod;
use serde::Deserialize;
use serde_json::Value;
use xtask::paths;

/// `gateway.networking.k8s.io/v1`, of its standard channel what is used.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HttpRouteSpec {
    parent_refs: Vec<ParentRef>,
    #[serde(default)]
    hostnames: Vec<String>,
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ParentRef {
    name: String,
    namespace: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    matches: Vec<Match>,
    timeouts: BTreeMap<String, String>,
    backend_refs: Vec<BackendRef>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Match {
    path: Path,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Path {
    r#type: String,
    value: String,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct BackendRef {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    /// Of an InferencePool it is the pool's.
    port: Option<u16>,
}

/// `inference.networking.k8s.io/v1`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct InferencePoolSpec {
    selector: Selector,
    target_ports: Vec<Port>,
    endpoint_picker_ref: EndpointPickerRef,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Selector {
    match_labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Port {
    number: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EndpointPickerRef {
    name: String,
    /// Needed with a Service.
    port: Port,
    failure_mode: String,
}

fn documents(path: &str) -> Vec<Value> {
    let text = fs::read_to_string(paths::repository().join(path)).unwrap();
    let mut all: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    all.retain(|document| !document.is_null());
    all
}

fn spec<T: serde::de::DeserializeOwned>(object: &Value, kind: &str, version: &str) -> T {
    assert_eq!((&object["kind"], &object["apiVersion"]), (&Value::from(kind), &Value::from(version)));
    serde_json::from_value(object["spec"].clone()).unwrap()
}

fn route(object: &Value) -> HttpRouteSpec {
    let route: HttpRouteSpec = spec(object, "HTTPRoute", "gateway.networking.k8s.io/v1");
    for rule in &route.rules {
        let paths = rule.matches.iter().map(|it| &it.path);
        assert!(paths.into_iter().all(|path| path.r#type == "PathPrefix" && path.value.starts_with('/')));
        // Streams have no end that a proxy could know.
        assert!(
            rule.timeouts.iter().all(|(of, time)| of.to_lowercase().ends_with("request") && time == "0s")
        );
    }
    assert!(route.parent_refs.iter().all(|parent| !parent.name.is_empty() && !parent.namespace.is_empty()));
    route
}

#[test]
fn a_route_leads_to_the_gateways_service() {
    let all = documents("examples/gateway-api/route.yaml");
    let spec = route(&all[0]);
    let backend = &spec.rules[0].backend_refs[0];
    assert_eq!((all.len(), spec.hostnames.len(), spec.rules.len()), (1, 1, 1));
    let service = documents("deploy/lathe.yaml").into_iter().find(|it| {
        it["kind"] == "Service"
            && it["metadata"]["name"] == backend.name.as_str()
            && it["metadata"]["namespace"] == all[0]["metadata"]["namespace"]
    });
    let ports = service.unwrap()["spec"]["ports"].clone();
    assert!(ports.as_array().unwrap().iter().any(|port| port["port"] == backend.port.unwrap()), "{ports}");
}

#[test]
fn a_pool_has_the_pods_of_a_service_that_everybody_may_ask() {
    let service = &documents("examples/inference-pool/serve.yaml")[0];
    let service: InferenceService = serde_json::from_value(service.clone()).unwrap();
    assert_eq!(service.spec.access, Access::Direct);
    let name = service.metadata.name.unwrap();
    let all = documents("examples/inference-pool/pool.yaml");
    let pool: InferencePoolSpec = spec(&all[0], "InferencePool", "inference.networking.k8s.io/v1");
    let labels = pod::labels("inferenceservice", &name, Some("serve"));
    for label in ["lathe.dev/kind", "lathe.dev/name", "lathe.dev/task"] {
        assert!(pool.selector.match_labels.get(label).is_some_and(|value| labels.get(label) == Some(value)));
    }
    assert_eq!(pool.selector.match_labels.len(), 3);
    let model = &documents("examples/quickstart/20-model.yaml")[0];
    assert_eq!(
        (&model["kind"], &model["metadata"]["name"]),
        (&"Model".into(), &service.spec.model_ref.name.into())
    );
    // No pods of another service, nor of a job of the same name.
    for other in
        [pod::labels("inferenceservice", "other", Some("serve")), pod::labels("finetunejob", &name, None)]
    {
        assert!(pool.selector.match_labels.iter().any(|(key, value)| other.get(key) != Some(value)));
    }
    assert_eq!(pool.target_ports.iter().map(|port| port.number).collect::<Vec<_>>(), [SERVE_PORT]);
    let EndpointPickerRef { name: picker, port, failure_mode } = pool.endpoint_picker_ref;
    assert!(!picker.is_empty() && port.number > 0 && ["FailOpen", "FailClose"].contains(&&*failure_mode));
    let route = route(&all[1]);
    assert_eq!(route.hostnames.len(), 1);
    let backend = &route.rules[0].backend_refs[0];
    let expected = BackendRef {
        group: Some("inference.networking.k8s.io".to_owned()),
        kind: Some("InferencePool".to_owned()),
        name,
        port: None,
    };
    assert_eq!((backend, all[0]["metadata"]["name"].as_str()), (&expected, Some(&*expected.name)));
}
