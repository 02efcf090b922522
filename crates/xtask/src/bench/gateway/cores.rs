//! Which core is whose.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

/// The first core that this process may use for the proxies, the others for stub and clients; where there is one alone, it is
/// everybody's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cores {
    /// Of the proxy that is measured.
    pub proxy: usize,
    /// Of the stub and the clients.
    pub others: Vec<usize>,
}

impl Cores {
    /// Of what this process may use.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn of_this_process() -> Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Self::of(allowed.unwrap_or_default()).context("the kernel does not say which cores may be used")
    }

    /// Of a list as the kernel writes it, `0-3,8`.
    fn of(list: &str) -> Option<Self> {
        let mut all = Vec::new();
        for part in list.trim().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            all.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
        }
        let (&proxy, others) = all.split_first()?;
        let others = if others.is_empty() { vec![proxy] } else { others.to_vec() };
        Some(Self { proxy, others })
    }

    /// The program, on the proxy's core.
    pub fn proxy(&self, program: &Path) -> Command {
        pinned(&[self.proxy], program)
    }

    /// The program, on the others.
    pub fn other(&self, program: &Path) -> Command {
        pinned(&self.others, program)
    }

    /// Who shares what.
    pub fn words(&self) -> String {
        let list = |cores: &[usize]| cores.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        match self.others.as_slice() {
            [only] if *only == self.proxy => format!("Core {only} is shared by proxies, stub and clients."),
            [only] => format!("Proxies have core {}; stub and clients share core {only}.", self.proxy),
            more => format!("Proxies have core {}; stub and clients have cores {}.", self.proxy, list(more)),
        }
    }
}

/// `taskset` becomes the program, so the process is the program's own.
fn pinned(cores: &[usize], program: &Path) -> Command {
    let list: Vec<String> = cores.iter().map(usize::to_string).collect();
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &list.join(",")]).arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_core_is_the_proxys() {
        let of = |list| Cores::of(list).map(|cores| (cores.proxy, cores.others.clone(), cores.words()));
        let (proxy, others, words) = of("\t0-1\n").unwrap_or_default();
        assert_eq!((proxy, others.as_slice()), (0, &[1][..]));
        assert_eq!(words, "Proxies have core 0; stub and clients share core 1.");
        assert_eq!(of("3,6-8").map(|(proxy, others, _)| (proxy, others)), Some((3, vec![6, 7, 8])));
        assert_eq!(
            of("2").map(|(_, _, words)| words),
            Some("Core 2 is shared by proxies, stub and clients.".into())
        );
        assert_eq!(of(""), None);
    }
}
