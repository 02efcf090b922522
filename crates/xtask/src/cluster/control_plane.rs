//! etcd, API server, controller manager and scheduler.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::certs::{Authority, Subject, names};
use super::layout::Layout;
use super::processes::{Process, wait_until};
use crate::command::run;
use crate::ports;

/// What each component is called; links by these names choose it in the one Kubernetes program.
const COMPONENTS: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];

/// Where the control plane listens.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Endpoint {
    /// The API server's address.
    pub address: Ipv4Addr,
    /// The API server's port.
    pub api: u16,
    /// etcd's ports, for clients and peers, on loopback.
    pub etcd: [u16; 2],
}

impl Endpoint {
    /// On node 1, where every port is free.
    pub fn on_node(layout: &Layout) -> Self {
        Self { address: layout.node_address(1), api: 6443, etcd: [2379, 2380] }
    }

    /// On this machine's loopback, on ports that were free a moment ago.
    ///
    /// # Errors
    /// No port is free.
    pub fn on_loopback() -> Result<Self> {
        let [api, clients, peers] = ports::free()?;
        Ok(Self { address: Ipv4Addr::LOCALHOST, api, etcd: [clients, peers] })
    }

    /// The API server's URL.
    pub fn url(&self) -> String {
        format!("https://{}:{}", self.address, self.api)
    }
}

/// Links the components' names to the one program, so that each can be started by its name.
///
/// # Errors
/// The cluster's folder cannot be written.
pub fn link_components(layout: &Layout, kubernetes: &Path) -> Result<()> {
    let bin = layout.at("bin");
    fs::create_dir_all(&bin)?;
    for name in COMPONENTS {
        let link = bin.join(name);
        if link.read_link().is_ok_and(|target| target == kubernetes) {
            continue;
        }
        let _ = fs::remove_file(&link);
        symlink(kubernetes, &link)?;
    }
    Ok(())
}

/// Issues what the control plane's programs and their clients need.
///
/// # Errors
/// The cluster's folder cannot be written.
pub fn issue(layout: &Layout, authority: &Authority, endpoint: &Endpoint) -> Result<()> {
    let masters = Some("system:masters");
    let server = Subject {
        common_name: "kube-apiserver",
        organization: None,
        names: names(
            &[
                "localhost",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "kubernetes.default.svc.cluster.local",
            ],
            [IpAddr::from(endpoint.address), layout.api_service().into(), Ipv4Addr::LOCALHOST.into()],
        ),
    };
    authority.issue("apiserver", &server)?;
    authority.signing_pair("service-account")?;
    for (file, common_name, organization) in [
        ("admin", "lathe-admin", masters),
        ("kubelet-client", "kube-apiserver", masters),
        ("front-proxy", "front-proxy-client", None),
        ("controller-manager", "system:kube-controller-manager", None),
        ("scheduler", "system:kube-scheduler", None),
        ("proxy", "system:kube-proxy", None),
    ] {
        let names = Vec::new();
        authority.issue(file, &Subject { common_name, organization, names })?;
    }
    for file in ["admin", "controller-manager", "scheduler", "proxy"] {
        let path = kubeconfig(layout, file);
        let context = format!("lathe-cluster-{}", layout.name);
        authority.kubeconfig(file, &endpoint.url(), &context, &path)?;
    }
    Ok(())
}

/// The kubeconfig of one of the clients above; `admin` is the user's.
pub fn kubeconfig(layout: &Layout, client: &str) -> PathBuf {
    match client {
        "admin" => layout.at("kubeconfig"),
        client => layout.at(format!("certs/{client}.kubeconfig")),
    }
}

/// Starts what does not run yet and waits until the API server is ready.
///
/// # Errors
/// A program cannot be started, or ends; the text has its last words.
pub fn ensure(
    layout: &Layout,
    authority: &Authority,
    endpoint: &Endpoint,
    etcd: &Path,
    inside: Option<u32>,
) -> Result<()> {
    let component = |name: &str, args: Vec<String>| Process {
        name: name.to_owned(),
        program: layout.at("bin").join(name),
        args,
        inside,
    };
    let store = Process {
        name: "etcd".to_owned(),
        program: etcd.to_path_buf(),
        args: etcd_args(layout, endpoint),
        inside,
    };
    store.ensure(layout)?;
    let api = apiserver_args(layout, authority, endpoint);
    component("kube-apiserver", api).ensure(layout)?;
    let needed = ["etcd", "kube-apiserver"];
    wait_until(layout, "the API server", &needed, || {
        // A refused connection costs nothing, kubectl a tenth of a second of a processor.
        if TcpStream::connect((endpoint.address, endpoint.api)).is_err() {
            return false;
        }
        let mut ready = super::kubectl(layout);
        run(ready.args(["get", "--raw", "/readyz"])).is_ok()
    })?;
    let manager = manager_args(layout, authority);
    component("kube-controller-manager", manager).ensure(layout)?;
    component("kube-scheduler", scheduler_args(layout)).ensure(layout)?;
    Ok(())
}

fn etcd_args(layout: &Layout, endpoint: &Endpoint) -> Vec<String> {
    let [client, peer] = endpoint.etcd.map(|port| format!("http://127.0.0.1:{port}"));
    flags(&[
        ("name", "default".into()),
        ("data-dir", layout.at("etcd").display().to_string()),
        ("listen-client-urls", client.clone()),
        ("advertise-client-urls", client),
        ("listen-peer-urls", peer.clone()),
        ("initial-advertise-peer-urls", peer.clone()),
        ("initial-cluster", format!("default={peer}")),
        // The cluster does not outlive the machine, so neither need its data.
        ("unsafe-no-fsync", "true".into()),
        ("log-level", "warn".into()),
    ])
}

fn apiserver_args(layout: &Layout, authority: &Authority, endpoint: &Endpoint) -> Vec<String> {
    let file = |name: &str| authority.file(name).display().to_string();
    let mut list = vec![
        ("etcd-servers", format!("http://127.0.0.1:{}", endpoint.etcd[0])),
        ("bind-address", endpoint.address.to_string()),
        ("advertise-address", endpoint.address.to_string()),
        ("secure-port", endpoint.api.to_string()),
        ("tls-cert-file", file("apiserver.crt")),
        ("tls-private-key-file", file("apiserver.key")),
        ("client-ca-file", file("ca.crt")),
        ("service-account-issuer", "https://kubernetes.default.svc.cluster.local".into()),
        ("service-account-key-file", file("service-account.pub")),
        ("service-account-signing-key-file", file("service-account.key")),
        ("service-cluster-ip-range", layout.services()),
        ("authorization-mode", "Node,RBAC".into()),
        ("enable-admission-plugins", "NodeRestriction".into()),
        ("allow-privileged", "true".into()),
        ("kubelet-client-certificate", file("kubelet-client.crt")),
        ("kubelet-client-key", file("kubelet-client.key")),
        ("kubelet-certificate-authority", file("ca.crt")),
        // Without it, logs and exec look the node's name up in DNS.
        ("kubelet-preferred-address-types", "InternalIP".into()),
        // For aggregated APIs, such as metrics of the autoscaler.
        ("requestheader-client-ca-file", file("ca.crt")),
        ("requestheader-allowed-names", "front-proxy-client".into()),
        ("requestheader-username-headers", "X-Remote-User".into()),
        ("requestheader-group-headers", "X-Remote-Group".into()),
        ("requestheader-extra-headers-prefix", "X-Remote-Extra-".into()),
        ("proxy-client-cert-file", file("front-proxy.crt")),
        ("proxy-client-key-file", file("front-proxy.key")),
    ];
    if endpoint.address.is_loopback() {
        // An endpoint on loopback is refused; nothing needs the service `kubernetes` there.
        list.push(("endpoint-reconciler-type", "none".into()));
    }
    flags(&list)
}

fn manager_args(layout: &Layout, authority: &Authority) -> Vec<String> {
    let file = |name: &str| authority.file(name).display().to_string();
    let config = kubeconfig(layout, "controller-manager").display().to_string();
    flags(&[
        ("kubeconfig", config.clone()),
        ("authentication-kubeconfig", config.clone()),
        ("authorization-kubeconfig", config),
        ("bind-address", "127.0.0.1".into()),
        // No metrics are read; so no port is needed, and several control planes fit one machine.
        ("secure-port", "0".into()),
        ("leader-elect", "false".into()),
        ("use-service-account-credentials", "true".into()),
        ("root-ca-file", file("ca.crt")),
        ("service-account-private-key-file", file("service-account.key")),
        ("cluster-signing-cert-file", file("ca.crt")),
        ("cluster-signing-key-file", file("ca.key")),
    ])
}

fn scheduler_args(layout: &Layout) -> Vec<String> {
    let config = kubeconfig(layout, "scheduler").display().to_string();
    flags(&[
        ("kubeconfig", config.clone()),
        ("authentication-kubeconfig", config.clone()),
        ("authorization-kubeconfig", config),
        ("secure-port", "0".into()),
        ("leader-elect", "false".into()),
    ])
}

/// `--name=value` for each pair.
pub fn flags(list: &[(&str, String)]) -> Vec<String> {
    list.iter().map(|(name, value)| format!("--{name}={value}")).collect()
}
