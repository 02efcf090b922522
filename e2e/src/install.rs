//! Lathe's own life in a cluster: installed, brought to what this checkout holds, removed.
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::repository;

/// Namespace of the release in tests.
pub const RELEASE_NAMESPACE: &str = "lathe-system";

/// Runs Helm (`LATHE_HELM`, or the one on `PATH`) in the checkout and returns what it printed.
///
/// # Errors
/// It cannot be started, or fails; the text has what it said.
pub fn helm(args: &[&str]) -> Result<String> {
    run("LATHE_HELM", "helm", args)
}

/// Installs the chart as the tests need it, or brings the release to what this checkout holds; `more` are further flags
/// of `helm upgrade`.
///
/// # Errors
/// Helm fails, or the operator is not ready in time.
pub fn install(more: &[&str]) -> Result<()> {
    let mut args = vec!["upgrade", "--install", "lathe", "charts/lathe"];
    args.extend(["--namespace", RELEASE_NAMESPACE, "--create-namespace"]);
    // Many pods share one small volume of the local cluster.
    args.extend(["--set", "artifacts.accessMode=ReadWriteMany", "--set", "artifacts.size=1Gi"]);
    args.extend(["--wait", "--timeout", "3m"]);
    args.extend(more);
    helm(&args).map(drop)
}

fn run(variable: &str, program: &str, args: &[&str]) -> Result<String> {
    let path = std::env::var(variable).unwrap_or_else(|_| program.to_owned());
    let mut command = Command::new(path);
    command.args(args).current_dir(repository());
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
