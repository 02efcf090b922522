//! What the figures were measured on.

use std::fs;
use std::process::Command;

use serde::Serialize;

use crate::{command, paths};

/// A machine and the state of the checkout.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// As the kernel calls it.
    pub processor: String,
    /// Those that this process may use.
    pub cores: usize,
    /// In bytes.
    pub memory: u64,
    /// Instruction sets that matter, of those that it has.
    pub features: Vec<&'static str>,
    /// UTC, to the minute.
    pub date: String,
    /// The commit of the checkout, with `+` where files differ from it.
    pub commit: String,
}

const FEATURES: [(&str, &str); 6] = [
    ("avx2", "AVX2"),
    ("fma", "FMA"),
    ("avx512f", "AVX-512"),
    ("avx512_bf16", "AVX512_BF16"),
    ("avx512_vnni", "AVX512_VNNI"),
    ("amx_bf16", "AMX"),
];

impl Machine {
    /// This one, now.
    pub fn here() -> Self {
        let about = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| value_of(&about, name).unwrap_or_default();
        let flags = field("flags");
        let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
        let model = ["cpu family", "model"].map(field).join("/");
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kilobytes =
            value_of(&memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            processor: format!("{} (family/model {model})", field("model name")),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory: kilobytes.unwrap_or(0) * 1024,
            features: FEATURES.into_iter().filter(|(flag, _)| has(flag)).map(|(_, name)| name).collect(),
            date: said(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
            commit: commit(),
        }
    }
}

/// Processes that want to run, over the last minute; 0 where the kernel does not say.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

fn commit() -> String {
    let git = |args: &[&str]| said(Command::new("git").current_dir(paths::repository()).args(args));
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
    format!("{}{}", git(&["rev-parse", "--short=12", "HEAD"]), if changed { "+" } else { "" })
}

fn said(command: &mut Command) -> String {
    command::run(command).unwrap_or_default().trim().to_owned()
}

/// Of lines `name : value`, the first that has this name.
fn value_of(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_told_from_one_that_begins_like_it() {
        let text = "model name\t: EPYC 7\nmodel\t\t: 1\nflags\t: fma avx2\n";
        assert_eq!(value_of(text, "model").as_deref(), Some("1"));
        assert_eq!(value_of(text, "flags").as_deref(), Some("fma avx2"));
        assert_eq!(value_of(text, "cores"), None);
    }
}
