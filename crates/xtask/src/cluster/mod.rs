//! A real Kubernetes on this machine, without virtual machines or a container engine.
//!
//! [`up`] is the whole story. With nodes, all of it lives in namespaces of its own, joined to the host
//! by one bridge. Without, it is a control plane on loopback ports, which needs no root.

mod certs;
mod check;
mod cleanup;
pub mod cli;
mod containerd;
mod control_plane;
mod dns;
mod fleet;
mod kubelet;
mod layout;
mod network;
mod node;
mod processes;
mod state;
mod storage;

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::toolchain::{self, COREDNS, ETCD, GoProgram, HELM, KUBERNETES, KWOK};
use crate::{images, ui};
use certs::Authority;
use control_plane::Endpoint;
use layout::{Layout, MOST_NODES, node_name};
use state::State;

/// Debian's packages for the programs that nodes need.
const PACKAGES: [(&str, &str); 8] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("socat", "socat"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
];

/// Which cluster to bring up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its name: clusters of different names run side by side.
    pub name: String,
    /// Real nodes; 0 means a control plane alone.
    pub nodes: u32,
    /// Fake nodes with 8 accelerators each.
    pub fleet: u32,
}

/// A cluster that runs.
pub struct Cluster {
    layout: Layout,
    state: State,
}

/// Brings the cluster up, or makes an existing one what `options` ask for. Nodes are only ever added.
///
/// # Errors
/// Something cannot be built, installed or started; the text says what, with its last words.
pub fn up(options: &Options) -> Result<Cluster> {
    up_with(&KUBERNETES, options)
}

/// As [`up`], of another version of Kubernetes.
///
/// # Errors
/// As [`up`].
pub fn up_with(kubernetes: &GoProgram, options: &Options) -> Result<Cluster> {
    ensure!(options.nodes <= MOST_NODES, "--nodes: at most {MOST_NODES}");
    if options.nodes > 0 {
        let root = rustix::process::geteuid().is_root();
        ensure!(root, "real nodes need root: run this as root, or with --control-plane-only");
        toolchain::packages(&PACKAGES)?;
    }
    let etcd = toolchain::go_program(&ETCD)?;
    let kubernetes = toolchain::go_program(kubernetes)?;

    let (_lock, layout, mut state) = open(options)?;
    let authority = Authority::open(layout.at("certs"))?;
    control_plane::issue(&layout, &authority, &state.endpoint)?;
    control_plane::link_components(&layout, &kubernetes)?;

    for number in state.nodes.len() as u32 + 1..=options.nodes {
        let step = ui::step(format!("{}: mounts, network", node_name(number)));
        let inside = node::ensure(&layout, number)?;
        network::plug(&layout, number, &state.holders(), inside)?;
        state.nodes.push(inside);
        state.save(&layout)?;
        step.done(&layout.node_address(number).to_string());
    }
    let first = state.nodes.first().copied();

    let step = ui::step("control plane");
    control_plane::ensure(&layout, &authority, &state.endpoint, &etcd, first)?;
    storage::ensure(&layout)?;
    step.done(&state.endpoint.url());

    for (number, inside) in state.holders() {
        let step = ui::step(format!("{}: containerd, kubelet, kube-proxy", node_name(number)));
        containerd::ensure(&layout, number, inside)?;
        containerd::import(inside, &images::cached(&images::pause()?)?)?;
        kubelet::ensure(&layout, &authority, &state.endpoint, number, inside)?;
        step.done("Ready");
    }
    if let Some(inside) = first {
        let coredns = toolchain::go_program(&COREDNS)?;
        let step = ui::step("name server");
        dns::ensure(&layout, &coredns, inside)?;
        step.done(&layout.dns_service().to_string());
    }
    if options.fleet > state.fleet {
        let kwok = toolchain::go_program(&KWOK)?;
        let step = ui::step("fake nodes");
        fleet::ensure(&layout, &kwok, first, options.fleet)?;
        state.fleet = options.fleet;
        state.save(&layout)?;
        step.done(&options.fleet.to_string());
    }
    Ok(Cluster { layout, state })
}

/// Finds what is left to do: the running cluster's state, or a fresh one after clearing a broken one's
/// remains. The lock keeps a second `up` or `down` of the same name waiting.
fn open(options: &Options) -> Result<(File, Layout, State)> {
    let lock = state::lock(&options.name)?;
    if let Some((layout, state)) = state::load(&options.name)? {
        let alive = state.is_alive(&layout);
        let alone = state.nodes.is_empty();
        if alive && alone == (options.nodes == 0) {
            return Ok((lock, layout, state));
        }
        ensure!(
            !alive,
            "cluster {:?} runs {} real nodes: take it down first, or choose another --name",
            options.name,
            if alone { "without" } else { "with" }
        );
        clear_remains(&layout)?;
    } else {
        // Its folder may have been removed under it.
        let layout = Layout::new(&options.name, 0)?;
        if !processes::running(&layout).is_empty() {
            clear_remains(&layout)?;
        }
    }
    let (layout, endpoint) = if options.nodes > 0 {
        // Two clusters that start at once must not choose the same network.
        let _lock = state::lock_file("networks")?;
        let layout = Layout::new(&options.name, network::free_subnet()?)?;
        network::bridge(&layout)?;
        let endpoint = Endpoint::on_node(&layout);
        (layout, endpoint)
    } else {
        (Layout::new(&options.name, 0)?, Endpoint::on_loopback()?)
    };
    let state = State::new(layout.subnet, endpoint);
    state.save(&layout)?;
    Ok((lock, layout, state))
}

fn clear_remains(layout: &Layout) -> Result<()> {
    let step = ui::step("clear what an earlier run left");
    cleanup::clear(layout)?;
    step.done("");
    Ok(())
}

/// Takes the cluster of that name down. False if there is none.
///
/// # Errors
/// A process does not end, or root is needed.
pub fn down(name: &str) -> Result<bool> {
    let _lock = state::lock(name)?;
    let layout = match state::load(name)? {
        Some((layout, _)) => layout,
        None => Layout::new(name, 0)?,
    };
    let found = layout.folder.exists() || !processes::running(&layout).is_empty();
    cleanup::clear(&layout)?;
    Ok(found)
}

/// The cluster of that name, if it runs.
///
/// # Errors
/// Its state cannot be read.
pub fn find(name: &str) -> Result<Option<Cluster>> {
    let found = state::load(name)?.filter(|(layout, state)| state.is_alive(layout));
    Ok(found.map(|(layout, state)| Cluster { layout, state }))
}

impl Cluster {
    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        control_plane::kubeconfig(&self.layout, "admin")
    }

    /// `kubectl` with the administrator's rights.
    pub fn kubectl(&self) -> Command {
        kubectl(&self.layout)
    }

    /// Helm, speaking to this cluster.
    ///
    /// # Errors
    /// It is not built yet and does not build.
    pub fn helm(&self) -> Result<Command> {
        let mut command = Command::new(toolchain::go_program(&HELM)?);
        command.arg("--kubeconfig").arg(self.kubeconfig());
        Ok(command)
    }

    /// Tries what the product relies on: a restricted pod on every node, its log, exec, names, service,
    /// volume; and the same from this machine.
    ///
    /// # Errors
    /// The first of them that fails.
    pub fn check(&self) -> Result<()> {
        check::run_all(self)
    }

    /// Applies an object, or a `List` of them.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn apply(&self, object: &serde_json::Value) -> Result<()> {
        apply(&self.layout, object)
    }

    /// This machine's address as pods see it; none without real nodes.
    pub fn host_address(&self) -> Option<Ipv4Addr> {
        (!self.state.nodes.is_empty()).then(|| self.layout.host_address())
    }

    /// Brings an OCI archive into every real node.
    ///
    /// # Errors
    /// containerd refuses it.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        self.state.nodes.iter().try_for_each(|inside| {
            containerd::import(*inside, archive)
                .with_context(|| format!("cannot import {}", archive.display()))
        })
    }

    /// Lets all nodes pull from `HOST:PORT` without TLS.
    ///
    /// # Errors
    /// The cluster's folder cannot be written.
    pub fn trust_registry(&self, host: &str) -> Result<()> {
        let mut nodes = self.state.holders().into_iter();
        nodes.try_for_each(|(node, _)| containerd::trust_registry(&self.layout, node, host))
    }
}

fn kubectl(layout: &Layout) -> Command {
    let mut command = Command::new(layout.at("bin/kubectl"));
    command.arg("--kubeconfig").arg(control_plane::kubeconfig(layout, "admin"));
    command
}

fn apply(layout: &Layout, object: &serde_json::Value) -> Result<()> {
    storage::apply(kubectl(layout), object)
}
