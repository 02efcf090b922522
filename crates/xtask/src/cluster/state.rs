//! What must be remembered of a cluster between two commands.

use std::fs::{self, File};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::control_plane::Endpoint;
use super::layout::{Layout, node_name};
use super::processes::recorded;
use crate::paths;

/// Kept as `cluster.json` in the cluster's folder.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// `S` in `10.S.0.0/16`; 0 without real nodes.
    pub subnet: u8,
    /// Where the control plane listens.
    pub endpoint: Endpoint,
    /// The process that holds each real node's namespaces, from node 1 on.
    pub nodes: Vec<u32>,
    /// How many fake nodes were made.
    pub fleet: u32,
}

impl State {
    /// Of a cluster that has nothing yet.
    pub fn new(subnet: u8, endpoint: Endpoint) -> Self {
        Self { subnet, endpoint, nodes: Vec::new(), fleet: 0 }
    }

    /// Each real node's number and holder.
    pub fn holders(&self) -> Vec<(u32, u32)> {
        (1..).zip(self.nodes.iter().copied()).collect()
    }

    /// Whether the store, the API server and every node's holder run.
    pub fn is_alive(&self, layout: &Layout) -> bool {
        let core = ["etcd", "kube-apiserver"];
        let core = core.iter().all(|name| recorded(layout, name).is_some());
        core && self.holders().iter().all(|(number, pid)| recorded(layout, &node_name(*number)) == Some(*pid))
    }

    /// # Errors
    /// The cluster's folder cannot be written.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        fs::create_dir_all(&layout.folder)?;
        let unfinished = layout.at("cluster.json.unfinished");
        fs::write(&unfinished, serde_json::to_vec_pretty(self)?)?;
        fs::rename(unfinished, layout.at("cluster.json"))?;
        Ok(())
    }
}

/// Reads a cluster's state; none if there is no such cluster.
///
/// # Errors
/// The name is not allowed, or the state is damaged.
pub fn load(name: &str) -> Result<Option<(Layout, State)>> {
    let mut layout = Layout::new(name, 0)?;
    let path = layout.at("cluster.json");
    if !path.is_file() {
        return Ok(None);
    }
    let state: State = serde_json::from_slice(&fs::read(&path)?)
        .with_context(|| format!("{} is damaged: remove its folder", path.display()))?;
    layout.subnet = state.subnet;
    Ok(Some((layout, state)))
}

/// Waits until no other command works on that cluster, and keeps others waiting while held.
///
/// # Errors
/// The name is not allowed, or the cache folder cannot be written.
pub fn lock(name: &str) -> Result<File> {
    lock_file(&format!("cluster-{}", Layout::new(name, 0)?.name))
}

/// As [`lock`], for something that clusters share.
///
/// # Errors
/// The cache folder cannot be written.
pub fn lock_file(name: &str) -> Result<File> {
    let folder = paths::cache()?.join("cluster");
    fs::create_dir_all(&folder)?;
    let lock = File::create(folder.join(format!(".{name}.lock")))?;
    lock.lock()?;
    Ok(lock)
}
