//! `cargo xtask cluster check`: tries what the product relies on, from a pod on every node and from here.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Cluster;
use super::layout::node_name;
use crate::command::run;
use crate::{images, ui};

const NAMESPACE: &str = "lathe-check";

/// Runs every check and removes what it made.
///
/// # Errors
/// The first check that fails; what it made stays, to be looked at.
pub fn run_all(cluster: &Cluster) -> Result<()> {
    let nodes = cluster.state.nodes.len() as u32;
    ensure!(nodes > 0, "a control plane alone runs no pods: nothing to check");
    cluster.import_image(&images::cached(&images::probe(images::PROBE_IMAGE)?)?)?;
    kubectl(cluster, &["delete", "namespace", NAMESPACE, "--ignore-not-found"])?;
    cluster.apply(&objects(nodes))?;

    let step = ui::step("pods under the restricted standard become Ready");
    kubectl(cluster, &["wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s"])?;
    step.done("");
    let step = ui::step("logs");
    let logs = kubectl(cluster, &["logs", &pod(1)])?;
    ensure!(logs == "listening\n", "the pod's log is {logs:?}");
    step.done("");

    let address: Ipv4Addr =
        kubectl(cluster, &["get", "service", "probe", "-o", "jsonpath={.spec.clusterIP}"])?.parse()?;
    for node in 1..=nodes {
        let step = ui::step(format!("{}: name, service, volume", node_name(node)));
        let found = exec(cluster, node, &["resolve", "probe"])?;
        ensure!(found.lines().any(|line| line.parse() == Ok(address)), "probe is {found:?}");
        for target in ["probe:80".to_owned(), format!("{}:8080", pod_address(cluster, 1)?)] {
            let answer = exec(cluster, node, &["get", &target])?;
            ensure!(answer == "ok", "{target} answers {answer:?}");
        }
        exec(cluster, node, &["write", &format!("/data/{node}"), "kept"])?;
        let seen = exec(cluster, 1, &["read", &format!("/data/{node}")])?;
        ensure!(seen == "kept", "the volume holds {seen:?}");
        step.done("");
    }
    let step = ui::step("service and pods answer this machine");
    fetch(address.into(), 80)?;
    for node in 1..=nodes {
        fetch(pod_address(cluster, node)?, 8080)?;
    }
    step.done(&address.to_string());

    let step = ui::step("clean up, with the volume's folder");
    let volume = kubectl(cluster, &["get", "pvc", "data", "-o", "jsonpath={.spec.volumeName}"])?;
    kubectl(cluster, &["delete", "namespace", NAMESPACE])?;
    let deleted = format!("persistentvolume/{volume}");
    kubectl(cluster, &["wait", "--for=delete", &deleted, "--timeout=30s"])?;
    let folder = cluster.layout.at("volumes").join(volume);
    ensure!(!Path::new(&folder).exists(), "{} is still there", folder.display());
    step.done("");
    Ok(())
}

fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<String> {
    run(cluster.kubectl().args(["-n", NAMESPACE]).args(args))
}

fn exec(cluster: &Cluster, node: u32, args: &[&str]) -> Result<String> {
    kubectl(cluster, &[&["exec", &pod(node), "--", "/probe"], args].concat())
}

fn pod(node: u32) -> String {
    format!("probe-{node}")
}

fn pod_address(cluster: &Cluster, node: u32) -> Result<IpAddr> {
    let address = kubectl(cluster, &["get", "pod", &pod(node), "-o", "jsonpath={.status.podIP}"])?;
    address.parse().with_context(|| format!("{address:?} is no address"))
}

fn fetch(address: IpAddr, port: u16) -> Result<()> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&(address, port).into(), limit)
        .with_context(|| format!("{address}:{port} cannot be reached from this machine"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.ends_with("\r\n\r\nok"), "{address}:{port} answers {answer:?}");
    Ok(())
}

fn objects(nodes: u32) -> Value {
    let mut items = vec![
        json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "data", "namespace": NAMESPACE},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "10Mi"}},
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "probe", "namespace": NAMESPACE},
            "spec": {"selector": {"app": "probe"}, "ports": [{"port": 80, "targetPort": 8080}]},
        }),
    ];
    items.extend((1..=nodes).map(|node| {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": pod(node),
                "namespace": NAMESPACE,
                "labels": {"app": "probe"},
            },
            "spec": {
                "nodeSelector": {"kubernetes.io/hostname": node_name(node)},
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "securityContext": {
                    "runAsNonRoot": true,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [{
                    "name": "probe",
                    "image": images::PROBE_IMAGE,
                    "args": ["serve"],
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "resources": {
                        "requests": {"cpu": "10m", "memory": "16Mi"},
                        "limits": {"cpu": "200m", "memory": "32Mi"},
                    },
                    "readinessProbe": {
                        "httpGet": {"port": 8080, "path": "/"},
                        "periodSeconds": 1,
                    },
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                }],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
            },
        })
    }));
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}
