//! What lies under a cluster of `cargo xtask cluster`: its processes and its volumes, on this machine.
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::{Api, ResourceExt as _};

use crate::{Session, poll};

/// The id of one of the cluster's processes, such as `kube-apiserver`.
///
/// # Errors
/// The cluster is none of `cargo xtask cluster`, or the process does not run.
pub fn process(name: &str) -> Result<u32> {
    let kubeconfig = std::env::var("KUBECONFIG").context("set KUBECONFIG")?;
    let folder = Path::new(&kubeconfig).parent().context("KUBECONFIG is no file")?;
    let path = folder.join("pids").join(name);
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!("{} is not there: is it a cluster of `cargo xtask cluster`?", path.display())
    })?;
    let pid = text.trim().parse()?;
    // Its mark, so that no stranger who got the same id is ever hit.
    let environment =
        std::fs::read(format!("/proc/{pid}/environ")).with_context(|| format!("{name} does not run"))?;
    let mark = format!("LATHE_PROCESS={name}");
    let own = environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes());
    ensure!(own, "{name} does not run: process {pid} is another one");
    Ok(pid)
}

/// Sends a signal to a process, by its name without `SIG`.
///
/// # Errors
/// There is no such process.
pub fn signal(pid: u32, name: &str) -> Result<()> {
    run(Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()))
}

/// The process of a pod's one container.
///
/// # Errors
/// It does not run, or not on this machine.
pub fn worker(pod: &Pod) -> Result<u32> {
    let name = pod.name_any();
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let id = containers.and_then(|all| all.first()?.container_id.as_deref()?.split_once("://"));
    let (_, id) = id.with_context(|| format!("{name} has no container yet"))?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that has just ended has none.
        let groups = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if groups.contains(id) {
            found.push(pid);
        }
    }
    ensure!(found.len() == 1, "{name}: processes of its container on this machine: {found:?}");
    Ok(found[0])
}

/// A process that stands still, and goes on when this is dropped.
pub struct Stopped(u32);

impl Stopped {
    /// Stops it where it is.
    ///
    /// # Errors
    /// As [`signal`].
    pub fn stop(pid: u32) -> Result<Self> {
        signal(pid, "STOP")?;
        Ok(Self(pid))
    }

    /// Ends it where it stands: it does nothing more.
    ///
    /// # Errors
    /// As [`signal`].
    pub fn kill(self) -> Result<()> {
        signal(self.0, "KILL")?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Err(error) = signal(self.0, "CONT") {
            eprintln!("process {} stays stopped: {error:#}", self.0);
        }
    }
}

/// The folder of a claim's volume, once it is bound.
///
/// # Errors
/// It is not bound after some minutes, or is no folder of this machine.
pub async fn folder(session: &Session, claim: &str) -> Result<PathBuf> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(session.client.clone(), &session.namespace);
    let name = poll(&format!("the claim {claim} to be bound"), || async {
        let found = claims.get_opt(claim).await?;
        let bound = found.as_ref().and_then(|c| c.status.as_ref()?.phase.as_deref()) == Some("Bound");
        Ok(found.filter(|_| bound).and_then(|c| c.spec?.volume_name))
    })
    .await?;
    let volumes: Api<PersistentVolume> = Api::all(session.client.clone());
    let volume = volumes.get(&name).await?.spec.and_then(|spec| spec.host_path);
    Ok(volume.with_context(|| format!("{name} is no folder of this machine"))?.path.into())
}

/// A file system of a fixed size that a node's pods can mount by `hostPath`; it goes when this is dropped.
pub struct SmallDisk {
    node: u32,
    folder: PathBuf,
}

impl SmallDisk {
    /// Mounts it on the first node.
    ///
    /// # Errors
    /// The node is none of this machine, or the mount is refused.
    pub fn mount(name: &str, kibibytes: u32) -> Result<Self> {
        let node = process("node-1")?;
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder)?;
        let disk = Self { node, folder };
        let options = format!("size={kibibytes}k,mode=777");
        run(disk.inside("mount").args(["-t", "tmpfs", "-o", &options, name]).arg(&disk.folder))?;
        Ok(disk)
    }

    /// Where the node sees it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Where this process sees it.
    #[must_use]
    pub fn seen(&self) -> PathBuf {
        let below = self.folder.strip_prefix("/").unwrap_or(&self.folder);
        Path::new("/proc").join(self.node.to_string()).join("root").join(below)
    }

    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.node.to_string(), "--mount", "--", program]);
        command
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A pod may still hold it.
        drop(run(self.inside("umount").arg("--lazy").arg(&self.folder)));
        drop(std::fs::remove_dir(&self.folder));
    }
}

/// Files below a folder, by their paths from there; one may come or go meanwhile.
///
/// # Errors
/// It cannot be listed.
pub fn files(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        let entries = match std::fs::read_dir(&next) {
            Err(error) if error.kind() == ErrorKind::NotFound && next != folder => continue,
            entries => entries.with_context(|| format!("cannot list {}", next.display()))?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(folder)?.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
