//! Fake nodes with accelerators, kept by KWOK: they schedule and "run" pods, and hold nothing.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::control_plane::{flags, kubeconfig};
use super::layout::Layout;
use super::processes::Process;
use crate::paths;

/// Starts KWOK and makes `count` fake nodes of 8 accelerators each, and one without any.
///
/// # Errors
/// KWOK cannot be started or the API server refuses the nodes.
pub fn ensure(layout: &Layout, kwok: &Path, inside: Option<u32>, count: u32) -> Result<()> {
    let stages = paths::repository().join("e2e/cluster/kwok/stages.yaml");
    let process = Process {
        name: "kwok".to_owned(),
        program: kwok.to_path_buf(),
        args: flags(&[
            ("config", stages.display().to_string()),
            ("kubeconfig", kubeconfig(layout, "admin").display().to_string()),
            ("manage-nodes-with-annotation-selector", "kwok.x-k8s.io/node=fake".into()),
            ("node-lease-duration-seconds", "40".into()),
            ("cidr", layout.fake_pods()),
            ("v", "WARN".into()),
        ]),
        inside,
    };
    process.ensure(layout)?;
    let mut nodes: Vec<Value> = (1..=count).map(accelerated).collect();
    nodes.push(node("fleet-cpu", &json!({}), &json!({}), &json!([])));
    super::apply(layout, &json!({"apiVersion": "v1", "kind": "List", "items": nodes}))
}

/// A node as a cloud would make it: labelled by device discovery, tainted for its devices' sake.
fn accelerated(number: u32) -> Value {
    node(
        &format!("fleet-{number:04}"),
        &json!({
            "nvidia.com/gpu.present": "true",
            "nvidia.com/gpu.product": "NVIDIA-H200",
            "nvidia.com/gpu.memory": "143771",
            "nvidia.com/gpu.count": "8",
            "nvidia.com/gpu.family": "hopper",
        }),
        &json!({"nvidia.com/gpu": "8"}),
        &json!([{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]),
    )
}

fn node(name: &str, labels: &Value, devices: &Value, taints: &Value) -> Value {
    let mut all_labels = json!({
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/os": "linux",
        "kubernetes.io/hostname": name,
        "lathe.dev/fake-node": "true",
    });
    let mut resources = json!({"cpu": "64", "memory": "512Gi", "pods": "110"});
    for (into, from) in [(&mut all_labels, labels), (&mut resources, devices)] {
        for (key, value) in from.as_object().into_iter().flatten() {
            into[key] = value.clone();
        }
    }
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": all_labels,
            "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
        },
        "spec": {"taints": taints},
        "status": {"allocatable": resources, "capacity": resources},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accelerated_node_has_its_devices_labels_and_taint() {
        let node = accelerated(7);
        assert_eq!(node["metadata"]["name"], "fleet-0007");
        assert_eq!(node["metadata"]["labels"]["nvidia.com/gpu.product"], "NVIDIA-H200");
        assert_eq!(node["status"]["allocatable"]["nvidia.com/gpu"], "8");
        assert_eq!(node["spec"]["taints"][0]["effect"], "NoSchedule");
    }
}
