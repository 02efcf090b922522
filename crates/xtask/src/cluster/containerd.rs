//! containerd of one node: its settings, its pod network, its images.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::json;

use super::layout::Layout;
use super::processes::{Process, wait_until};
use crate::command::run;
use crate::images::PAUSE_IMAGE;

/// Starts containerd of a node and waits until it answers.
///
/// # Errors
/// It cannot be started, or ends.
pub fn ensure(layout: &Layout, node: u32, inside: u32) -> Result<()> {
    let config = layout.node_at(node, "containerd.toml");
    fs::write(&config, settings(layout, node))?;
    let network = layout.node_at(node, "cni.d");
    fs::create_dir_all(&network)?;
    fs::create_dir_all(layout.node_at(node, "certs.d"))?;
    fs::write(network.join("10-lathe.conflist"), pod_network(layout, node)?)?;
    let name = format!("containerd-{node}");
    let process = Process {
        name: name.clone(),
        program: "containerd".into(),
        args: vec!["--config".into(), config.display().to_string()],
        inside: Some(inside),
    };
    process.ensure(layout)?;
    wait_until(layout, "containerd", &[&name], || run(ctr(inside).arg("version")).is_ok())
}

/// Brings an OCI archive into the node.
///
/// # Errors
/// containerd refuses the archive.
pub fn import(inside: u32, archive: &Path) -> Result<()> {
    // nsenter leaves this process's folder.
    let archive = std::path::absolute(archive)?;
    run(ctr(inside).args(["images", "import"]).arg(archive)).map(drop)
}

/// Lets the node pull from a registry without TLS.
///
/// # Errors
/// The cluster's folder cannot be written.
pub fn trust_registry(layout: &Layout, node: u32, host: &str) -> Result<()> {
    // containerd reads this folder at each pull.
    let folder = layout.node_at(node, "certs.d").join(host);
    fs::create_dir_all(&folder)?;
    // containerd 1.6 refuses a file without a host section.
    let hosts = format!(
        "server = \"http://{host}\"\n\n[host.\"http://{host}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
    );
    fs::write(folder.join("hosts.toml"), hosts)?;
    Ok(())
}

/// `ctr` in the kubelet's namespace of one node's containerd.
fn ctr(inside: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &inside.to_string(), "--mount", "--", "ctr", "-n", "k8s.io"]);
    command
}

/// Folders are those of [`super::node`]'s mounts: containerd's own defaults.
fn settings(layout: &Layout, node: u32) -> String {
    let network = layout.node_at(node, "cni.d");
    let registries = layout.node_at(node, "certs.d");
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# Without CAP_SYS_RESOURCE the score the kubelet asks for cannot be set, and no pod would start.
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{}"

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{}"
"#,
        network.display(),
        registries.display()
    )
}

fn pod_network(layout: &Layout, node: u32) -> Result<String> {
    let list = json!({
        "cniVersion": "0.4.0",
        "name": layout.cgroup(node),
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                // A pod may ask itself through its service.
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": layout.pod_range(node)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    Ok(serde_json::to_string_pretty(&list)?)
}
