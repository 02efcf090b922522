use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::{
    drift::APPLIED,
    inference::fixtures::{deployment as live_deployment, seen, service, serving},
};

static NONE: BTreeSet<String> = BTreeSet::new();
const INSTALLATION: Installation<'_> =
    Installation { namespace: "lathe-system", pull_policy: Some("IfNotPresent"), one_node: &NONE };

/// Without the hashes, which are the same wherever the rest is.
fn json_of(object: impl serde::Serialize) -> Value {
    let mut value = serde_json::to_value(object).unwrap();
    for annotations in ["/metadata/annotations", "/spec/template/metadata/annotations"] {
        if let Some(Value::Object(annotations)) = value.pointer_mut(annotations) {
            annotations.retain(|key, _| key != APPLIED && key != pod::CHECKSUM);
        }
    }
    value
}

fn meta(name: &str, annotations: Value) -> Value {
    json!({
        "name": name, "namespace": "n", "annotations": annotations,
        "labels": {
            "app.kubernetes.io/managed-by": "lathe", "app.kubernetes.io/name": "lathe-worker",
            "lathe.dev/kind": "inferenceservice", "lathe.dev/name": "svc",
        },
        "ownerReferences": [{
            "apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService", "name": "svc", "uid": "uid-svc",
            "controller": true,
        }],
    })
}

fn built(service: &InferenceService, live: Option<&Deployment>) -> Wanted {
    build(service, &serving(service, &seen(service)), live, INSTALLATION).unwrap()
}

#[test]
fn the_objects_around_the_pods() {
    let wanted = built(&service(json!({})), None);
    // Labels that never change: the Deployment's selector is immutable.
    let selector = json!({"lathe.dev/kind": "inferenceservice", "lathe.dev/name": "svc"});
    assert_eq!(
        json_of(&wanted.endpoint),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": meta("svc", json!({})),
            "spec": {
                "selector": selector,
                "ports": [{"name": "http", "appProtocol": "http", "port": 8080, "targetPort": "http", "protocol": "TCP"}],
            },
        })
    );
    assert_eq!(
        json_of(&wanted.policy),
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta("svc-serve", json!({})),
            "spec": {
                "podSelector": {"matchLabels": selector}, "policyTypes": ["Ingress"],
                "ingress": [
                    {"ports": [{"port": 8080, "protocol": "TCP"}]},
                    {
                        "ports": [{"port": 8081, "protocol": "TCP"}],
                        "from": [{
                            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "lathe-system"}},
                            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "lathe-operator"}},
                        }],
                    },
                ],
            },
        })
    );
    assert_eq!(
        json_of(&wanted.budget),
        json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": meta("svc-serve", json!({})),
            "spec": {
                "maxUnavailable": 1, "selector": {"matchLabels": selector}, "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        })
    );
    let contract: Value =
        serde_json::from_str(&wanted.contract.data.as_ref().unwrap()["contract.json"]).unwrap();
    assert_eq!(contract["object"]["uid"], "uid-svc");
    assert_eq!(contract["task"]["serve"]["modelId"], "svc");
    let name = wanted.contract.metadata.name.as_deref().unwrap();
    assert!(name.starts_with("svc-serve-contract-") && name.len() == 29, "{name}");
    let template = wanted.deployment.spec.unwrap().template.spec.unwrap();
    let mounted = template.volumes.unwrap().into_iter().find_map(|v| v.config_map);
    assert_eq!(mounted.unwrap().name, name);
}

#[test]
fn the_deployment() {
    let wanted = built(&service(json!({"replicas": 2})), None);
    let mut found = json_of(&wanted.deployment);
    // What every pod of Lathe has is tested where it is made.
    let template = found["spec"]["template"].take();
    assert_eq!(
        found,
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": meta("svc-serve", json!({"lathe.dev/adapter-slots": "4", "lathe.dev/adapter-rank": "32"})),
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": {"lathe.dev/kind": "inferenceservice", "lathe.dev/name": "svc"}},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
                "progressDeadlineSeconds": 3600, "revisionHistoryLimit": 3,
                "template": null,
            },
        })
    );
    assert_eq!(template["metadata"]["labels"]["lathe.dev/task"], "serve");
    let spec = &template["spec"];
    assert_eq!(
        (&spec["restartPolicy"], &spec["terminationGracePeriodSeconds"]),
        (&json!("Always"), &json!(75))
    );
    let worker = &spec["containers"][0];
    assert_eq!(worker["args"], json!(["serve"]));
    assert_eq!(worker["imagePullPolicy"], "IfNotPresent");
    let probe = |path: &str, period: i32, failures: i32| {
        json!({
            "httpGet": {"path": path, "port": "control"}, "periodSeconds": period, "failureThreshold": failures,
            "timeoutSeconds": 5,
        })
    };
    assert_eq!(worker["startupProbe"], probe("/healthz", 1, 120));
    assert_eq!(worker["livenessProbe"], probe("/healthz", 10, 6));
    assert_eq!(worker["readinessProbe"], probe("/readyz", 2, 2));
    let mounted = worker["volumeMounts"].as_array().unwrap();
    assert!(
        mounted.contains(&json!({"name": "claim-0", "mountPath": "/lathe/volumes/models", "readOnly": true}))
    );
}

#[test]
fn replicas_are_left_to_the_scaler_once_it_has_them() {
    let service = service(json!({"replicas": 2}));
    let replicas = |annotations: Value| {
        let live = live_deployment("old", annotations);
        built(&service, Some(&live)).deployment.spec.unwrap().replicas
    };
    assert_eq!(replicas(json!({"lathe.dev/replicas": "1"})), None);
    assert_eq!(replicas(json!({})), Some(2));
}

#[test]
fn a_new_release_changes_no_running_pod_and_its_image_comes_with_the_next_roll_out() {
    let service = service(json!({}));
    let image = |checksum: &str| {
        let live = live_deployment(checksum, json!({"lathe.dev/replicas": "1"}));
        let template = built(&service, Some(&live)).deployment.spec.unwrap().template;
        template.spec.unwrap().containers[0].image.clone().unwrap()
    };
    let checksum = serving(&service, &seen(&service)).checksum;
    assert_eq!(image(&checksum), "registry/lathe-worker:0");
    assert_eq!(image("another"), "worker:1");
}

#[rstest]
#[case::first_time(json!([]), None, None)]
#[case::another_volume(json!([{"name": "far"}]), Some(("4", "32")), Some("the running pods do not mount elsewhere, where a model's files lie"))]
#[case::no_room(json!([{"name": "tone"}]), Some(("0", "32")), Some("the running pods have no room for more adapters (now 4)"))]
#[case::too_large(json!([{"name": "tone"}]), Some(("4", "16")), Some("the running pods have no room for an adapter of rank 32"))]
#[case::something_else(json!([]), Some(("4", "32")), Some("the spec changed"))]
fn a_roll_out_says_why(
    #[case] adapters: Value,
    #[case] room: Option<(&str, &str)>,
    #[case] cause: Option<&str>,
) {
    let service = service(json!({"adapterRefs": adapters}));
    let annotations = |(slots, rank): (&str, &str)| json!({"lathe.dev/adapter-slots": slots, "lathe.dev/adapter-rank": rank});
    let live = room.map(|room| live_deployment("old", annotations(room)));
    let mut seen = seen(&service);
    seen.children.deployment = live.clone();
    let wanted = build(&service, &serving(&service, &seen), live.as_ref(), INSTALLATION).unwrap();
    assert_eq!(wanted.deployment.annotations().get(CHANGE_CAUSE).map(String::as_str), cause);
}
