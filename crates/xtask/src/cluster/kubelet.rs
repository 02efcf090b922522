//! The kubelet and kube-proxy of one node.

use std::fs;

use anyhow::Result;
use serde_json::json;

use super::certs::{Authority, Subject, names};
use super::control_plane::{Endpoint, flags, kubeconfig};
use super::layout::{Layout, node_name};
use super::processes::{Process, wait_until};
use crate::command::run;

/// Starts both and waits until the node is Ready.
///
/// # Errors
/// One of them cannot be started or ends, or the node does not become Ready.
pub fn ensure(
    layout: &Layout,
    authority: &Authority,
    endpoint: &Endpoint,
    node: u32,
    inside: u32,
) -> Result<()> {
    let name = node_name(node);
    let address = layout.node_address(node);
    let subject = Subject {
        common_name: &format!("system:node:{name}"),
        organization: Some("system:nodes"),
        names: names(&[&name], [address.into()]),
    };
    authority.issue(&name, &subject)?;
    let credentials = layout.node_at(node, "kubelet.kubeconfig");
    authority.kubeconfig(&name, &endpoint.url(), &layout.name, &credentials)?;
    // Pods that do not use the cluster's DNS service ask the same server directly.
    let resolver = layout.node_at(node, "resolv.conf");
    fs::write(&resolver, format!("nameserver {}\n", layout.node_address(1)))?;
    let config = layout.node_at(node, "kubelet.json");
    fs::write(&config, settings(layout, authority, node)?)?;

    let kubelet = Process {
        name: format!("kubelet-{node}"),
        program: layout.at("bin/kubelet"),
        args: flags(&[
            ("config", config.display().to_string()),
            ("kubeconfig", credentials.display().to_string()),
            ("hostname-override", name.clone()),
            ("node-ip", address.to_string()),
        ]),
        inside: Some(inside),
    };
    kubelet.ensure(layout)?;
    let proxy = Process {
        name: format!("kube-proxy-{node}"),
        program: layout.at("bin/kube-proxy"),
        args: flags(&[
            ("kubeconfig", kubeconfig(layout, "proxy").display().to_string()),
            ("hostname-override", name.clone()),
            ("proxy-mode", "iptables".into()),
            ("cluster-cidr", layout.all_pods()),
            // The limit belongs to the whole machine, not to this node.
            ("conntrack-max-per-core", "0".into()),
        ]),
        inside: Some(inside),
    };
    proxy.ensure(layout)?;
    let needed = [kubelet.name.as_str(), proxy.name.as_str()];
    wait_until(layout, &format!("{name} to be Ready"), &needed, || {
        // It waits by itself once the node is there; not for ever, so that an end of the kubelet shows.
        let mut wait = super::kubectl(layout);
        wait.args(["wait", "--for=condition=Ready", "--timeout=2s", "node", &name]);
        run(&mut wait).is_ok()
    })
}

fn settings(layout: &Layout, authority: &Authority, node: u32) -> Result<String> {
    let file = |name: String| authority.file(&name).display().to_string();
    let name = node_name(node);
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": file("ca.crt".into())},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": file(format!("{name}.crt")),
        "tlsPrivateKeyFile": file(format!("{name}.key")),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", layout.cgroup(node)),
        "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDomain": "cluster.local",
        "clusterDNS": [layout.dns_service()],
        "resolvConf": layout.node_at(node, "resolv.conf"),
        "volumePluginDir": layout.node_at(node, "volume-plugins"),
        // Imported images cannot be pulled again, so a disk that fills up must not cost them.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "0%",
        },
    });
    Ok(serde_json::to_string_pretty(&config)?)
}
