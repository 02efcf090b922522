use std::sync::LazyLock;

use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::{
    context::{Config, peer},
    drift::APPLIED,
    inference::fixtures::{deployment as live_deployment, seen, service, serving},
    testing::config,
};

static NONE: BTreeSet<String> = BTreeSet::new();
static PEERS: LazyLock<Vec<NetworkPolicyPeer>> = LazyLock::new(|| {
    let scraper = peer(BTreeMap::from([("team".to_owned(), "metrics".to_owned())]), BTreeMap::default());
    Config { scraper: Some(scraper), ..config() }.control_peers()
});

static GATEWAY: LazyLock<NetworkPolicyPeer> = LazyLock::new(|| config().gateway_peer());

fn installation() -> Installation<'static> {
    Installation {
        control_peers: &PEERS,
        gateway: &GATEWAY,
        pull_policy: Some("IfNotPresent"),
        tracing: None,
        one_node: &NONE,
    }
}

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

fn built(service: &InferenceService, deployment: Option<&Deployment>) -> Wanted {
    let live = Live { deployment, ..Live::default() };
    build(service, &serving(service, &seen(service)), live, installation()).unwrap()
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
                        "from": [
                            {
                                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "lathe-system"}},
                                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "lathe-operator"}},
                            },
                            {"namespaceSelector": {"matchLabels": {"team": "metrics"}}, "podSelector": {}},
                        ],
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
fn who_may_ask_decides_policy_and_workers_together() {
    let made = |access: &str, live: Option<&Wanted>| {
        built(&service(json!({"access": access})), live.map(|live| &live.deployment))
    };
    let direct = made("Direct", None);
    let closed = made("GatewayOnly", Some(&direct));
    let opened = made("Direct", Some(&closed));
    let contract = |wanted: &Wanted| -> Value {
        serde_json::from_str(&wanted.contract.data.as_ref().unwrap()["contract.json"]).unwrap()
    };
    let clients = |wanted: &Wanted| json_of(&wanted.policy)["spec"]["ingress"][0].clone();
    assert_eq!(
        clients(&closed),
        json!({
            "ports": [{"port": 8080, "protocol": "TCP"}],
            "from": [{
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "lathe-system"}},
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "lathe-gateway"}},
            }],
        })
    );
    assert_eq!(contract(&closed)["task"]["serve"]["direct"], false);
    // Pods that answered everybody are replaced, and say why; nothing else is another object.
    assert_ne!(closed.contract.metadata.name, direct.contract.metadata.name);
    assert_ne!(revision(&closed.deployment), revision(&direct.deployment));
    let cause = closed.deployment.annotations().get(CHANGE_CAUSE).map(String::as_str);
    assert_eq!(cause, Some("the spec changed"));
    assert_eq!(json_of(&closed.endpoint), json_of(&direct.endpoint));
    // And back again.
    assert_eq!(clients(&opened), clients(&direct));
    assert_eq!(contract(&opened)["task"]["serve"]["direct"], true);
    assert_eq!(revision(&opened.deployment), revision(&direct.deployment));
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
            "metadata": meta("svc-serve", json!({
                "lathe.dev/adapter-slots": "4", "lathe.dev/adapter-rank": "32", "lathe.dev/profile": "cpu",
            })),
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

/// What an earlier version made of the same spec: another image, no probes, a contract with another number.
fn of_an_earlier_version(service: &InferenceService) -> ConfigMap {
    let mut map = built(service, None).contract;
    let data = map.data.as_mut().unwrap();
    let mut template: Value = serde_json::from_str(&data["template.json"]).unwrap();
    let worker = &mut template["spec"]["containers"][0];
    worker["image"] = json!("registry/lathe-worker:0");
    worker["env"] = json!([{"name": "OLD", "value": "1"}]);
    worker.as_object_mut().unwrap().remove("startupProbe");
    template["metadata"]["labels"]["old"] = json!("true");
    data.insert("template.json".to_owned(), template.to_string());
    let contract = data["contract.json"].replace("\"maxWaiting\": 64", "\"maxWaiting\": 7");
    data.insert("contract.json".to_owned(), contract);
    map
}

#[test]
fn a_new_release_changes_no_running_pod_and_comes_with_the_next_roll_out() {
    let service = service(json!({}));
    let (serving, old) = (serving(&service, &seen(&service)), of_an_earlier_version(&service));
    let here = BTreeSet::from(["models".to_owned()]);
    let installation = Installation { pull_policy: Some("Always"), one_node: &here, ..installation() };
    let made = |kept| {
        let wanted = build(&service, &serving, Live { kept, ..Live::default() }, installation).unwrap();
        (wanted.contract.data.unwrap(), wanted.deployment.spec.unwrap().template)
    };
    let (data, template) = made(Some(&old));
    let before: Value = serde_json::from_str(&old.data.as_ref().unwrap()["template.json"]).unwrap();
    assert_eq!(serde_json::to_value(&template).unwrap(), before);
    assert_eq!(data["contract.json"], old.data.as_ref().unwrap()["contract.json"]);
    // And so the next time.
    let kept = ConfigMap { data: Some(data.clone()), ..ConfigMap::default() };
    assert_eq!(made(Some(&kept)).0, data);
    // Nothing works that would be replaced.
    let (data, template) = made(None);
    assert_eq!(template.spec.unwrap().containers[0].image.as_deref(), Some("worker:1"));
    assert!(data["contract.json"].contains("\"maxWaiting\": 64"));
}

#[test]
fn running_pods_get_other_adapters_and_nothing_else() {
    let old = of_an_earlier_version(&service(json!({})));
    let service = service(json!({"adapterRefs": [{"name": "tone"}]}));
    let serving = serving(&service, &seen(&service));
    let wanted =
        build(&service, &serving, Live { kept: Some(&old), ..Live::default() }, installation()).unwrap();
    let contract = |map: &ConfigMap| -> Value {
        serde_json::from_str(&map.data.as_ref().unwrap()["contract.json"]).unwrap()
    };
    let (mut before, after) = (contract(&old), contract(&wanted.contract));
    assert_eq!(after["task"]["serve"]["adapters"][0]["modelId"], "tone");
    before["task"]["serve"]["adapters"] = after["task"]["serve"]["adapters"].clone();
    assert_eq!(before, after);
    assert_eq!(wanted.contract.metadata.name, old.metadata.name, "the same revision");
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
    let there = Live { deployment: live.as_ref(), ..Live::default() };
    let wanted = build(&service, &serving(&service, &seen), there, installation()).unwrap();
    assert_eq!(wanted.deployment.annotations().get(CHANGE_CAUSE).map(String::as_str), cause);
}

#[test]
fn traces_go_where_the_user_says_or_else_where_the_installation_does() {
    let theirs = Tracing { endpoint: "http://theirs:4318".to_owned(), sampling: "0.01".to_owned() };
    let told = |env: &Value, tracing: Option<&Tracing>| {
        let mut service = service(json!({}));
        service.spec.pod = Some(serde_json::from_value(json!({"env": env})).unwrap());
        let installation = Installation { tracing, ..installation() };
        let wanted =
            build(&service, &serving(&service, &seen(&service)), Live::default(), installation).unwrap();
        let pod = wanted.deployment.spec.unwrap().template.spec.unwrap();
        let all = pod.containers[0].env.clone().unwrap_or_default().into_iter();
        let all = all.filter(|e| [OTLP_ENDPOINT, SAMPLER, SAMPLER_ARG].contains(&e.name.as_str()));
        all.map(|e| e.value.unwrap()).collect::<Vec<_>>()
    };
    assert!(told(&json!([]), None).is_empty());
    let all = ["http://theirs:4318", "parentbased_traceidratio", "0.01"];
    assert_eq!(told(&json!([]), Some(&theirs)), all);
    let env = json!([{"name": OTLP_ENDPOINT, "value": "http://ours:4318"}]);
    assert_eq!(told(&env, Some(&theirs)), ["http://ours:4318", all[1], all[2]]);
    // Theirs is no argument of our sampler.
    let env = json!([{"name": SAMPLER, "value": "always_on"}]);
    assert_eq!(told(&env, Some(&theirs)), ["always_on", all[0]]);
}
