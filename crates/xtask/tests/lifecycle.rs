//! A cluster from its beginning to its end: two nodes that work, the demo with images from a registry, a node
//! that survives its kubelet, and nothing left afterwards.

mod registry;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use registry::Server;
use xtask::cluster::{self, Cluster};

const NAME: &str = "lathe-test-lifecycle";

#[test]
#[ignore = "needs root, the programs of `cargo xtask cluster build`, and docker-registry"]
fn a_cluster_works_heals_and_leaves_nothing() -> Result<()> {
    xtask(&["down"])?;
    xtask(&["up"])?;
    xtask(&["up", "--nodes", "2"])?;
    let cluster = cluster::find(NAME)?.context("it does not run")?;
    cluster.check()?;
    the_demo_runs_from_a_registry(&cluster)?;

    let pids = cluster.kubeconfig().with_file_name("pids");
    let pid = fs::read_to_string(pids.join("kubelet-2"))?;
    ensure!(Command::new("kill").args(["-KILL", &pid]).status()?.success());
    xtask(&["up", "--nodes", "2"])?;
    ensure!(fs::read_to_string(pids.join("kubelet-2"))? != pid, "the kubelet was not started again");

    let folder = cluster.kubeconfig().parent().context("no folder")?.to_owned();
    xtask(&["down"])?;
    ensure!(!folder.exists(), "{} is left", folder.display());
    for (place, file) in [("/sys/class/net", "ifalias"), ("/proc", "environ")] {
        let marked = marked(Path::new(place), file, &folder)?;
        ensure!(marked.is_empty(), "left in {place}: {marked:?}");
    }
    Ok(())
}

fn xtask(args: &[&str]) -> Result<()> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("cluster").args(args).args(["--name", NAME]);
    ensure!(command.status()?.success(), "xtask cluster {args:?} failed");
    Ok(())
}

/// As with a cluster of the user's own: by a context of the user's kubeconfig and the kubectl in PATH.
fn the_demo_runs_from_a_registry(cluster: &Cluster) -> Result<()> {
    let storage = tempfile::tempdir()?;
    let address = cluster.host_address().context("no address of this machine")?;
    let server = Server::start(storage.path(), address, "")?;
    cluster.trust_registry(&server.host)?;
    let kubectl = PathBuf::from(cluster.kubectl().get_program());
    let path = std::env::var_os("PATH").context("no PATH")?;
    let folders = kubectl.parent().map(Path::to_owned).into_iter().chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders)?;
    let context = String::from_utf8(cluster.kubectl().args(["config", "current-context"]).output()?.stdout)?;
    let registry = format!("{}/team", server.host);
    for down in [None, Some("--down")] {
        let mut demo = Command::new(env!("CARGO_BIN_EXE_xtask"));
        demo.args(["demo", "--context", context.trim(), "--registry", &registry]).args(down);
        demo.env("KUBECONFIG", cluster.kubeconfig()).env("PATH", &path);
        ensure!(demo.status()?.success(), "the demo from a registry failed");
    }
    Ok(())
}

/// Entries of `place` whose `file` names the cluster's folder.
fn marked(place: &Path, file: &str, folder: &Path) -> Result<Vec<String>> {
    let needle = folder.to_str().context("the folder's name is not UTF-8")?;
    let mut found = Vec::new();
    for entry in fs::read_dir(place)?.flatten() {
        let content = fs::read(entry.path().join(file)).unwrap_or_default();
        if String::from_utf8_lossy(&content).contains(needle) {
            found.push(entry.file_name().display().to_string());
        }
    }
    Ok(found)
}
