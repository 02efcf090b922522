use lathe_api::{AcceleratorProfileSpec, CapacityType, Location};
use lathe_contract::{InspectTask, SourceRef};
use serde_json::{Value, json};

use super::*;

fn inspect() -> Task {
    let source = SourceRef { uri: "pvc://data/m".into(), revision: None, digest: None, secret_dir: None };
    Task::Inspect(InspectTask { source, summary_of: None })
}

fn request<'a>(task: &'a Task, mounts: &'a Mounts) -> PodRequest<'a> {
    PodRequest {
        labels: labels("model", "small", Some(task_name(task))),
        image: "registry/lathe-worker:1",
        pull_policy: None,
        task,
        contract: "small-inspect-contract",
        checksum: "0123",
        mounts,
        cpu_millis: 500,
        least_cpu_millis: 500,
        memory: 300 << 20,
        cache: 1 << 30,
        placement: None,
        overrides: None,
        grace_seconds: 30,
        restart_policy: "Never",
    }
}

#[test]
fn the_whole_pod() {
    let task = inspect();
    let mut mounts = Mounts::default();
    let location = Location {
        uri: "pvc://data/m".into(),
        revision: None,
        secret_ref: Some(lathe_api::NameRef { name: "hub".into() }),
        digest: None,
    };
    mounts.source(&location, Use::Read).expect("mounts");
    let found = serde_json::to_value(template(&request(&task, &mounts))).expect("json");
    let expected = json!({
        "metadata": {
            "annotations": {"lathe.dev/contract-checksum": "0123"},
            "labels": {
                "app.kubernetes.io/managed-by": "lathe", "app.kubernetes.io/name": "lathe-worker",
                "lathe.dev/kind": "model", "lathe.dev/name": "small", "lathe.dev/task": "inspect",
            },
        },
        "spec": {
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "worker", "image": "registry/lathe-worker:1", "args": ["inspect"],
                "ports": [{"name": "control", "containerPort": 8081, "protocol": "TCP"}],
                "resources": {
                    "limits": {"cpu": "500m", "memory": "300Mi"}, "requests": {"cpu": "500m", "memory": "300Mi"},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": true,
                },
                "terminationMessagePolicy": "File",
                "volumeMounts": [
                    {"name": "contract", "mountPath": "/etc/lathe", "readOnly": true},
                    {"name": "cache", "mountPath": "/lathe/cache"},
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "claim-0", "mountPath": "/lathe/volumes/data", "readOnly": true},
                    {"name": "secret-0", "mountPath": "/lathe/secrets/hub", "readOnly": true},
                ],
            }],
            "enableServiceLinks": false,
            "restartPolicy": "Never",
            "securityContext": {
                "fsGroup": 65532, "fsGroupChangePolicy": "OnRootMismatch", "runAsGroup": 65532, "runAsNonRoot": true,
                "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": 30,
            "volumes": [
                {"name": "contract", "configMap": {"name": "small-inspect-contract"}},
                {"name": "cache", "emptyDir": {"sizeLimit": "1024Mi"}},
                {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
                {"name": "claim-0", "persistentVolumeClaim": {"claimName": "data"}},
                {"name": "secret-0", "secret": {"secretName": "hub", "defaultMode": 0o440}},
            ],
        },
    });
    assert_eq!(found, expected);
}

#[test]
fn a_profile_places_the_pod() {
    let profile: AcceleratorProfileSpec = serde_json::from_value(json!({
        "resource": "nvidia.com/gpu", "memory": "24Gi", "runtime": "CUDA",
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["L4"]}]}],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    }))
    .expect("a profile");
    let (task, mounts) = (inspect(), Mounts::default());
    let placement = Placement { profile: &profile, count: 2, capacity: CapacityType::OnDemand };
    let pod = template(&PodRequest { placement: Some(placement), ..request(&task, &mounts) });
    let found = serde_json::to_value(pod.spec.expect("spec")).expect("json");
    assert_eq!(found["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "2");
    assert_eq!(found["tolerations"], json!([{"key": "nvidia.com/gpu", "operator": "Exists"}]));
    let terms = &found["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
    assert_eq!(terms[0]["matchExpressions"][0], json!({"key": "gpu", "operator": "In", "values": ["L4"]}));
}

#[test]
fn users_change_what_they_may_and_nothing_else() {
    let user: PodOverrides = serde_json::from_value(json!({
        "labels": {"team": "a", "lathe.dev/name": "other", "app.kubernetes.io/name": "mine"},
        "annotations": {"note": "b", "lathe.dev/contract-checksum": "never"},
        "nodeSelector": {"zone": "z"},
        "tolerations": [{"key": "batch", "operator": "Exists"}],
        "priorityClassName": "low", "schedulerName": "own", "serviceAccountName": "cloud",
        "cpu": "3", "memory": "5Gi",
        "env": [{"name": "HF_ENDPOINT", "value": "https://hub"}],
        "imagePullSecrets": [{"name": "registry"}],
    }))
    .expect("overrides");
    let (task, mounts) = (inspect(), Mounts::default());
    let pod = template(&PodRequest { overrides: Some(&user), ..request(&task, &mounts) });
    let found = serde_json::to_value(pod).expect("json");
    let labels = &found["metadata"]["labels"];
    assert_eq!(
        (&labels["team"], &labels["lathe.dev/name"], &labels["app.kubernetes.io/name"]),
        (&json!("a"), &json!("small"), &json!("lathe-worker"))
    );
    assert_eq!(found["metadata"]["annotations"], json!({"note": "b", "lathe.dev/contract-checksum": "0123"}));
    let spec = &found["spec"];
    assert_eq!(spec["containers"][0]["resources"]["limits"], json!({"cpu": "3", "memory": "5Gi"}));
    assert_eq!(spec["containers"][0]["env"], json!([{"name": "HF_ENDPOINT", "value": "https://hub"}]));
    assert_eq!(spec["imagePullSecrets"], json!([{"name": "registry"}]));
    assert_eq!(spec["nodeSelector"], json!({"zone": "z"}));
    assert_eq!(
        [&spec["priorityClassName"], &spec["schedulerName"], &spec["serviceAccountName"]],
        [&json!("low"), &json!("own"), &json!("cloud")]
    );
    assert_eq!(spec["automountServiceAccountToken"], Value::Bool(false));
}

#[test]
fn a_pod_may_start_with_less_processor_time_than_it_may_use() {
    let (task, mounts) = (inspect(), Mounts::default());
    let resources = |request: &PodRequest<'_>| {
        let pod = serde_json::to_value(template(request)).expect("json");
        let resources = &pod["spec"]["containers"][0]["resources"];
        (resources["requests"]["cpu"].clone(), resources["limits"]["cpu"].clone())
    };
    let large = PodRequest { cpu_millis: 8000, least_cpu_millis: 1000, ..request(&task, &mounts) };
    assert_eq!(resources(&large), (json!("1"), json!("8")));
    let user = PodOverrides { cpu: Some("3".into()), ..PodOverrides::default() };
    assert_eq!(resources(&PodRequest { overrides: Some(&user), ..large }), (json!("3"), json!("3")));
}

#[test]
fn pods_that_share_a_volume_of_one_node_want_to_stand_together() {
    let task = inspect();
    let mut mounts = Mounts::default();
    for uri in ["pvc://data/m", "pvc://other/x"] {
        let location = Location { uri: uri.into(), revision: None, secret_ref: None, digest: None };
        mounts.source(&location, Use::Read).expect("mounts");
    }
    mounts.on_one_node(&["data".to_owned(), "elsewhere".to_owned()].into());
    let found = serde_json::to_value(template(&request(&task, &mounts))).expect("json");
    assert_eq!(found["metadata"]["labels"]["claim.lathe.dev/data"], "true");
    assert_eq!(found["metadata"]["labels"].get("claim.lathe.dev/other"), None);
    let wish = json!({"preferredDuringSchedulingIgnoredDuringExecution": [{
        "weight": 100,
        "podAffinityTerm": {
            "labelSelector": {"matchLabels": {"claim.lathe.dev/data": "true"}}, "topologyKey": "kubernetes.io/hostname",
        },
    }]});
    assert_eq!(found["spec"]["affinity"]["podAffinity"], wish);
}
