//! `cargo xtask cluster up | down | status`.

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::layout::node_name;
use super::{Cluster, Options, processes, state};
use crate::toolchain::{self, COREDNS, ETCD, HELM, KUBERNETES, KWOK};
use crate::ui;

/// A real Kubernetes on this machine: up, down, status.
#[derive(Subcommand)]
pub enum Command {
    /// Bring it up, or add what is missing.
    Up(Up),
    /// Take it down and remove everything it made.
    Down(Named),
    /// Show its processes, addresses and how to talk to it.
    Status(Named),
    /// Try the running cluster: restricted pods, logs, exec, names, services, volumes.
    Check(Named),
    /// Build every program that clusters and charts need, such as for a cache.
    Build,
    /// Give claims of the storage class lathe-local their volumes, for ever.
    #[command(hide = true)]
    Provision(Named),
}

/// Which cluster.
#[derive(Args)]
pub struct Named {
    /// The cluster's name.
    #[arg(long, default_value = "lathe")]
    name: String,
}

/// What to bring up.
#[derive(Args)]
pub struct Up {
    #[command(flatten)]
    named: Named,
    /// Real nodes: containerd and kubelet each. Needs root.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    nodes: u32,
    /// Fake nodes with 8 accelerators each, kept by KWOK.
    #[arg(long, default_value_t = 0)]
    fleet: u32,
    /// No real node: etcd, API server, controllers and scheduler on loopback. Needs no root.
    #[arg(long, conflicts_with = "nodes")]
    control_plane_only: bool,
}

/// Runs the command.
///
/// # Errors
/// As [`super::up`] and [`super::down`].
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Up(up) => {
            let options = Options {
                name: up.named.name.clone(),
                nodes: if up.control_plane_only { 0 } else { up.nodes },
                fleet: up.fleet,
            };
            ui::heading(&format!("Cluster {}", options.name));
            let cluster = super::up(&options)?;
            say_how_to_use(&cluster);
        }
        Command::Down(named) => {
            let step = ui::step(format!("take cluster {} down", named.name));
            let there_was_one = super::down(&named.name)?;
            step.done(if there_was_one { "" } else { "there was none" });
        }
        Command::Check(named) => {
            let cluster = super::find(&named.name)?;
            cluster.context("that cluster does not run: `cluster up` first")?.check()?;
        }
        Command::Status(named) => status(&named.name)?,
        Command::Build => {
            for program in [KUBERNETES, ETCD, COREDNS, KWOK, HELM] {
                println!("{}", toolchain::go_program(&program)?.display());
            }
        }
        Command::Provision(named) => {
            let (layout, _) = state::load(&named.name)?.context("there is no such cluster")?;
            super::storage::provision(&layout);
        }
    }
    Ok(())
}

fn status(name: &str) -> Result<()> {
    let Some((layout, state)) = state::load(name)? else {
        println!("there is no cluster {name:?}");
        return Ok(());
    };
    let mut found = processes::running(&layout);
    found.retain(|process| processes::recorded(&layout, &process.name) == Some(process.pid));
    found.sort_by(|a, b| a.name.cmp(&b.name));
    for process in &found {
        println!("{:<28} pid {}", process.name, process.pid);
    }
    for (number, inside) in state.holders() {
        let (name, address) = (node_name(number), layout.node_address(number));
        println!("{name}: {address}; enter it: nsenter --target {inside} --mount --net");
    }
    println!("logs: {}", layout.at("logs").display());
    if !state.is_alive(&layout) {
        println!("it does not run: `cargo xtask cluster up` starts it afresh");
        return Ok(());
    }
    say_how_to_use(&Cluster { layout, state });
    Ok(())
}

fn say_how_to_use(cluster: &Cluster) {
    ui::note(&format!("export KUBECONFIG={}", cluster.kubeconfig().display()));
    ui::note(&format!("{} get nodes", cluster.kubectl().get_program().display()));
    ui::note(&format!("take down: cargo xtask cluster down --name {}", cluster.layout.name));
}
