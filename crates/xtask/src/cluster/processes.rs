//! The cluster's long-lived processes: started apart from this one, found again by a mark.
//!
//! Each carries its cluster's folder in its environment and hands it on to its children (containerd's
//! shims too), so that nothing is missed and no stranger is ever hit, even after a killed run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::layout::Layout;
use crate::command::last_lines;

const CLUSTER: &str = "LATHE_CLUSTER";
const PROCESS: &str = "LATHE_PROCESS";
/// Long enough for a machine busy with a build; a process that ends is seen at once anyway.
const PATIENCE: Duration = Duration::from_secs(300);

/// One long-lived process.
pub struct Process {
    /// Unique in the cluster: `etcd`, `kubelet-2`.
    pub name: String,
    /// What to run.
    pub program: PathBuf,
    /// With which arguments.
    pub args: Vec<String>,
    /// The process whose network and mounts it shares; none means this machine's own.
    pub inside: Option<u32>,
}

/// A process found running.
#[derive(Debug, PartialEq, Eq)]
pub struct Running {
    /// As in [`Process`]; children have their parent's.
    pub name: String,
    /// Its id.
    pub pid: u32,
}

impl Process {
    /// Starts it unless it runs; its output goes to `logs/<name>.log`. Returns its id.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn ensure(&self, layout: &Layout) -> Result<u32> {
        if let Some(pid) = recorded(layout, &self.name) {
            return Ok(pid);
        }
        let log = log_file(layout, &self.name);
        let pids = layout.at("pids");
        fs::create_dir_all(layout.at("logs"))?;
        fs::create_dir_all(&pids)?;
        let output = File::create(&log)?;
        // setsid: neither Ctrl-C nor a closed terminal reaches it.
        let mut command = Command::new("setsid");
        if let Some(pid) = self.inside {
            // Not `ip netns exec`: its fresh /sys hides the cgroups from the kubelet.
            command.args(["nsenter", "--target", &pid.to_string(), "--mount", "--net", "--"]);
        }
        let child = command
            .arg(&self.program)
            .args(&self.args)
            .env(CLUSTER, &layout.folder)
            .env(PROCESS, &self.name)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .current_dir("/")
            .spawn()
            .with_context(|| format!("cannot start {}", self.name))?;
        fs::write(pids.join(&self.name), child.id().to_string())?;
        Ok(child.id())
    }
}

/// The id under which a process was started, if it still runs.
pub fn recorded(layout: &Layout, name: &str) -> Option<u32> {
    let text = fs::read_to_string(layout.at("pids").join(name)).ok()?;
    let pid = text.trim().parse().ok()?;
    (mark(pid, &layout.folder)? == name).then_some(pid)
}

/// All processes of the cluster, children included.
pub fn running(layout: &Layout) -> Vec<Running> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| {
            let name = mark(pid, &layout.folder)?;
            Some(Running { name, pid })
        })
        .collect()
}

/// The name a process of this cluster carries in its environment.
fn mark(pid: u32, folder: &Path) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    mark_in(&environment, folder)
}

fn mark_in(environment: &[u8], folder: &Path) -> Option<String> {
    let value = |key: &str| {
        environment.split(|byte| *byte == 0).find_map(|entry| {
            let rest = entry.strip_prefix(key.as_bytes())?.strip_prefix(b"=")?;
            std::str::from_utf8(rest).ok()
        })
    };
    (Path::new(value(CLUSTER)?) == folder).then(|| value(PROCESS).map(str::to_owned))?
}

/// Kills one process; that it is gone already is no error.
pub fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Waits until `ready`, asking every 100 ms. A process that ended meanwhile is an error at once.
///
/// # Errors
/// The time is over or one of `needed` has ended; the text has the log's last lines.
pub fn wait_until(
    layout: &Layout,
    what: &str,
    needed: &[&str],
    mut ready: impl FnMut() -> bool,
) -> Result<()> {
    let started = Instant::now();
    let mut missed = "";
    loop {
        if ready() {
            return Ok(());
        }
        let missing = needed.iter().find(|name| recorded(layout, name).is_none());
        match missing {
            // In the middle of an exec a process has no environment: only the second miss counts.
            Some(name) if *name == missed => {
                bail!("{name} ended while waiting for {what}:\n{}", log_tail(layout, name))
            }
            Some(name) => missed = name,
            None => missed = "",
        }
        if started.elapsed() > PATIENCE {
            let logs: Vec<_> = needed.iter().map(|name| log_tail(layout, name)).collect();
            bail!(
                "{what}: not after {} s; the last lines of the logs:\n{}",
                PATIENCE.as_secs(),
                logs.join("\n")
            );
        }
        sleep(Duration::from_millis(100));
    }
}

fn log_file(layout: &Layout, name: &str) -> PathBuf {
    layout.at("logs").join(format!("{name}.log"))
}

fn log_tail(layout: &Layout, name: &str) -> String {
    let path = log_file(layout, name);
    let text = fs::read(&path).unwrap_or_default();
    format!("{}:\n{}", path.display(), last_lines(&String::from_utf8_lossy(&text), 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_clusters_mark_counts() {
        let own = Path::new("/c/lathe");
        let env = b"A=1\0LATHE_CLUSTER=/c/lathe\0LATHE_PROCESS=etcd\0";
        assert_eq!(mark_in(env, own).as_deref(), Some("etcd"));
        assert_eq!(mark_in(env, Path::new("/c/lathe-2")), None);
        assert_eq!(mark_in(b"XLATHE_CLUSTER=/c/lathe\0LATHE_PROCESS=x\0", own), None);
        assert_eq!(mark_in(b"", own), None);
    }
}
