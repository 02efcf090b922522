//! CoreDNS on node 1, behind the service where pods expect it. It knows the cluster's names alone.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::control_plane::kubeconfig;
use super::layout::Layout;
use super::processes::{Process, wait_until};

/// Starts CoreDNS and makes the service `kube-system/kube-dns`.
///
/// # Errors
/// It cannot be started, or the API server refuses the service.
pub fn ensure(layout: &Layout, coredns: &Path, inside: u32) -> Result<()> {
    let address = layout.node_address(1);
    let config = layout.at("Corefile");
    let text = format!(
        ".:53 {{\n  bind {address}\n  errors\n  health 127.0.0.1:8080\n  \
         ready 127.0.0.1:8181\n  cache 10\n  kubernetes cluster.local in-addr.arpa {{\n    \
         kubeconfig {}\n    ttl 5\n  }}\n}}\n",
        kubeconfig(layout, "admin").display()
    );
    fs::write(&config, text)?;
    let process = Process {
        name: "coredns".to_owned(),
        program: coredns.to_path_buf(),
        args: vec!["-conf".into(), config.display().to_string()],
        inside: Some(inside),
    };
    process.ensure(layout)?;
    super::apply(layout, &service(layout))?;
    wait_until(layout, "CoreDNS", &["coredns"], || std::net::TcpStream::connect((address, 53)).is_ok())
}

fn service(layout: &Layout) -> serde_json::Value {
    let ports = json!([
        {"name": "dns", "protocol": "UDP", "port": 53},
        {"name": "dns-tcp", "protocol": "TCP", "port": 53},
    ]);
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": "kube-dns",
                "namespace": "kube-system",
                "labels": {"k8s-app": "kube-dns"},
            },
            "spec": {"clusterIP": layout.dns_service(), "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns",
                "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": [{
                "addresses": [layout.node_address(1)],
                "conditions": {"ready": true},
            }],
        },
    ]})
}
