//! Static programs for images: no library of the base system is needed, so there is no base.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::command::{self, run};
use crate::paths;

/// Compiles one file of `crates/xtask/programs` without dependencies.
///
/// # Errors
/// The compiler refuses it.
pub fn small(name: &str) -> Result<PathBuf> {
    let source = paths::repository().join(format!("crates/xtask/programs/{name}.rs"));
    let folder = paths::cache()?.join("programs");
    fs::create_dir_all(&folder)?;
    let program = folder.join(name);
    // A place of its own: two commands, and two threads of one, may compile at once.
    let unfinished = tempfile::tempdir_in(&folder)?;
    let compiled = unfinished.path().join(name);
    let mut rustc = Command::new("rustc");
    rustc.current_dir(paths::repository()).args(["--edition=2024", "--crate-name", name]);
    rustc.args(["-C", "opt-level=s", "-C", "panic=abort", "-C", "strip=symbols"]);
    rustc.args(["-C", "target-feature=+crt-static"]).args(remapped()?);
    run(rustc.arg(&source).arg("-o").arg(&compiled))?;
    fs::rename(&compiled, &program)?;
    Ok(program)
}

/// Compiles a program of measurements, without dependencies: not by size as those of images, since its loops must stay in
/// registers.
///
/// # Errors
/// The compiler refuses it.
pub fn fast(name: &str, source: &Path) -> Result<PathBuf> {
    let folder = paths::cache()?.join("programs");
    fs::create_dir_all(&folder)?;
    let program = folder.join(name);
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition=2024", "--crate-name", name, "-C", "opt-level=3"]);
    run(rustc.arg(source).arg("-o").arg(&program))?;
    Ok(program)
}

/// Builds packages of this workspace, in release mode. Returns one program for each, in order.
///
/// # Errors
/// The build fails; cargo has said why.
pub fn workspace(packages: &[&str]) -> Result<Vec<PathBuf>> {
    let target = host_triple()?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(remapped()?);
    let mut cargo = command::cargo();
    cargo
        // With --target the flags reach our programs alone: build scripts and proc macros cannot be static.
        .args(["build", "--release", "--target", &target])
        .args(["--message-format", "json-render-diagnostics"])
        .args(packages.iter().flat_map(|package| ["--package", *package]))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = cargo.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "cargo build failed: see above");
    let messages = String::from_utf8_lossy(&output.stdout);
    packages
        .iter()
        .map(|package| {
            executable(&messages, package).with_context(|| format!("cargo built no program of {package}"))
        })
        .collect()
}

fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// No path of this machine shows in a program: so two machines build the same. Our own sources are named relative to
/// the checkout already; its path must not be a flag, or each checkout would compile every dependency anew.
fn remapped() -> Result<Vec<String>> {
    let home = std::env::home_dir().context("HOME is not set")?;
    let cargo = std::env::var_os("CARGO_HOME").map_or(home.join(".cargo"), PathBuf::from);
    Ok(vec![format!("--remap-path-prefix={}=/cargo", cargo.display())])
}

fn host_triple() -> Result<String> {
    let about = run(Command::new("rustc").arg("-vV"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_taken_from_its_own_message() {
        let messages = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"lathe-worker\"},\
                        \"executable\":null}\nnoise\n\
                        {\"target\":{\"name\":\"lathe-worker\"},\"executable\":\"/t/lathe-worker\"}\n";
        let found = executable(messages, "lathe-worker");
        assert_eq!(found, Some(PathBuf::from("/t/lathe-worker")));
        assert_eq!(executable(messages, "lathe"), None);
    }
}
