//! Taking a cluster down, and clearing what a killed run left behind.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::layout::{Layout, MOST_NODES};
use super::processes::{kill, running};
use super::{network, node};

/// Ends every process of the cluster and removes all it left: cgroups, bridge, routes, data.
///
/// Mounts and network namespaces need no care: they end with the processes that hold them.
///
/// # Errors
/// A process does not die within 30 s, or root is needed.
pub fn clear(layout: &Layout) -> Result<()> {
    kill_all(layout)?;
    for number in 1..=MOST_NODES {
        let cgroup = layout.cgroup(number);
        wait(|| node::remove_cgroups(&cgroup))?;
    }
    network::remove(layout)?;
    remove_folder(&layout.folder)
}

/// Kubelets first, so that nothing is started again while the rest is killed.
fn kill_all(layout: &Layout) -> Result<()> {
    let (kubelets, _): (Vec<_>, Vec<_>) =
        running(layout).into_iter().partition(|process| process.name.starts_with("kubelet-"));
    kubelets.iter().for_each(|process| kill(process.pid));
    wait(|| {
        let processes = running(layout);
        processes.iter().for_each(|process| kill(process.pid));
        let mut left = processes.len();
        for number in 1..=MOST_NODES {
            left += node::kill_pods(&layout.cgroup(number))?;
        }
        Ok(left == 0)
    })
}

fn wait(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !done()? {
        ensure!(
            started.elapsed() < Duration::from_secs(30),
            "some of the cluster's processes do not end; `cargo xtask cluster status` shows them"
        );
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A folder may gain a file while a last process ends: then once more.
fn remove_folder(folder: &Path) -> Result<()> {
    wait(|| {
        if !folder.exists() {
            return Ok(true);
        }
        Ok(fs::remove_dir_all(folder).is_ok())
    })
}
