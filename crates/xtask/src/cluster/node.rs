//! A node: mounts and a network of its own, and cgroups of its own, on the one machine.
//!
//! A process that only sleeps holds both namespaces; containerd, kubelet and kube-proxy of the node join
//! it. The folders whose paths are fixed in their code are bind mounts of the node's state, so nodes
//! do not disturb each other, and when the last process ends the kernel takes all mounts with it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::layout::{Layout, node_name};
use super::processes::{Process, kill, wait_until};

/// Folders of the node's state and where its programs look for them.
const MOUNTS: [(&str, &str); 6] = [
    ("kubelet", "/var/lib/kubelet"),
    ("containerd", "/var/lib/containerd"),
    ("run", "/run/containerd"),
    ("cni", "/var/lib/cni"),
    ("pod-logs", "/var/log/pods"),
    ("container-logs", "/var/log/containers"),
];

/// Starts the node's holder and returns its process id.
///
/// # Errors
/// Not root, or a mount is refused.
pub fn ensure(layout: &Layout, node: u32) -> Result<u32> {
    make_cgroups(&layout.cgroup(node))?;
    let ready = layout.node_at(node, "ready");
    let name = node_name(node);
    if super::processes::recorded(layout, &name).is_none() && ready.exists() {
        fs::remove_file(&ready)?;
    }
    for (source, target) in MOUNTS {
        fs::create_dir_all(layout.node_at(node, source))?;
        fs::create_dir_all(target)?;
    }
    let holder = Process {
        name: name.clone(),
        program: "unshare".into(),
        args: ["--mount", "--net", "--propagation", "private", "sh", "-euc"]
            .map(str::to_owned)
            .into_iter()
            .chain([script(layout, node, &ready)])
            .collect(),
        inside: None,
    };
    let pid = holder.ensure(layout)?;
    wait_until(layout, "the node's mounts", &[&name], || ready.exists())?;
    Ok(pid)
}

fn script(layout: &Layout, node: u32, ready: &Path) -> String {
    // Shared among the node's own processes, so that containers see the kubelet's mounts.
    let mut lines = vec!["mount --make-rshared /".to_owned()];
    for (source, target) in MOUNTS {
        let source = layout.node_at(node, source);
        lines.push(format!("mount --bind '{}' {target}", source.display()));
    }
    lines.push("ip link set lo up".to_owned());
    lines.push("echo 1 > /proc/sys/net/ipv4/ip_forward".to_owned());
    lines.push(format!("touch '{}'", ready.display()));
    lines.push("exec sleep infinity".to_owned());
    lines.join("\n")
}

/// The root folders of the machine's cgroup controllers: several in version 1, one in version 2.
fn cgroup_roots() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    Ok(roots_in(&mounts))
}

fn roots_in(mounts: &str) -> Vec<PathBuf> {
    let parsed = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        Some((PathBuf::from(words.nth(1)?), words.next()?))
    });
    let (old, new): (Vec<_>, Vec<_>) =
        parsed.filter(|(_, kind)| kind.starts_with("cgroup")).partition(|(_, kind)| *kind == "cgroup");
    // Beside version 1 controllers, a version 2 mount has none.
    let chosen = if old.is_empty() { new } else { old };
    chosen.into_iter().map(|(path, _)| path).collect()
}

fn make_cgroups(name: &str) -> Result<()> {
    for root in cgroup_roots()? {
        let folder = root.join(name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the cgroup {}", folder.display()))?;
        // A new cpuset has neither processors nor memory, and takes no process until it has.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if root.join(file).exists() {
                fs::write(folder.join(file), fs::read(root.join(file))?)?;
            }
        }
        let controllers = root.join("cgroup.controllers");
        if let Ok(all) = fs::read_to_string(controllers) {
            let enable: Vec<_> = all.split_whitespace().map(|name| format!("+{name}")).collect();
            fs::write(root.join("cgroup.subtree_control"), enable.join(" "))?;
            fs::write(folder.join("cgroup.subtree_control"), enable.join(" "))?;
        }
    }
    Ok(())
}

/// Kills everything in the node's pods. Returns how many processes that were.
///
/// # Errors
/// The machine's mounts cannot be read.
pub fn kill_pods(cgroup: &str) -> Result<usize> {
    let mut killed = 0;
    for root in cgroup_roots()? {
        for folder in folders_below(&root.join(cgroup)) {
            let list = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            for pid in list.lines().filter_map(|line| line.parse().ok()) {
                kill(pid);
                killed += 1;
            }
        }
    }
    Ok(killed)
}

/// Removes the node's cgroups. False while a process is still in one.
///
/// # Errors
/// The machine's mounts cannot be read.
pub fn remove_cgroups(cgroup: &str) -> Result<bool> {
    let mut all = true;
    for root in cgroup_roots()? {
        for folder in folders_below(&root.join(cgroup)).iter().rev() {
            all &= fs::remove_dir(folder).is_ok();
        }
    }
    Ok(all)
}

/// The folder and all below it, each before its children. Empty if there is none.
fn folders_below(folder: &Path) -> Vec<PathBuf> {
    if !folder.is_dir() {
        return Vec::new();
    }
    let mut found = vec![folder.to_path_buf()];
    let mut next = 0;
    while next < found.len() {
        let children = fs::read_dir(&found[next]).into_iter().flatten().flatten();
        let folders = children.filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir()));
        let folders: Vec<_> = folders.map(|child| child.path()).collect();
        found.extend(folders);
        next += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_controllers_win_over_an_empty_version_2() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(roots_in(hybrid), [PathBuf::from("/sys/fs/cgroup/cpu")]);
        let unified = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(roots_in(unified), [PathBuf::from("/sys/fs/cgroup")]);
    }

    #[test]
    fn children_come_after_their_parents() -> Result<()> {
        let root = tempfile::tempdir()?;
        fs::create_dir_all(root.path().join("a/b"))?;
        let found = folders_below(root.path());
        assert_eq!(found, [root.path().to_path_buf(), root.path().join("a"), root.path().join("a/b")]);
        assert!(folders_below(&root.path().join("none")).is_empty());
        Ok(())
    }
}
