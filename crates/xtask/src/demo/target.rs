//! The cluster that the demo runs on: the local one, or a context of the user's.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::command;

/// How to talk to it.
pub struct Target {
    program: PathBuf,
    kubeconfig: Option<PathBuf>,
    context: Option<String>,
}

impl Target {
    /// The local cluster.
    pub fn local(cluster: &Cluster) -> Self {
        let program = PathBuf::from(cluster.kubectl().get_program());
        Self { program, kubeconfig: Some(cluster.kubeconfig()), context: None }
    }

    /// A context of the user's kubeconfig, with the user's kubectl.
    pub fn context(name: &str) -> Self {
        Self { program: PathBuf::from("kubectl"), kubeconfig: None, context: Some(name.to_owned()) }
    }

    /// True for a cluster that is not the demo's own.
    pub fn is_users(&self) -> bool {
        self.context.is_some()
    }

    /// Runs kubectl and returns what it printed.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        command::run(self.base().args(args))
    }

    /// An object as JSON; none where it is not there.
    pub fn get(&self, namespace: &str, what: &str) -> Result<Option<Value>> {
        let text =
            self.kubectl(&["--namespace", namespace, "get", what, "--ignore-not-found", "--output", "json"])?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&text).context("kubectl printed no JSON")?))
    }

    /// Applies an object under a field manager of its own.
    pub fn apply_as(&self, manager: &str, manifest: &str) -> Result<()> {
        let mut kubectl = self.base();
        kubectl.args(["apply", "--server-side", "--field-manager", manager, "--filename", "-"]);
        command::run_with(&mut kubectl, manifest.as_bytes()).map(drop)
    }

    /// Applies manifests.
    pub fn apply(&self, manifests: &str, namespace: Option<&str>) -> Result<()> {
        let mut kubectl = self.base();
        if let Some(namespace) = namespace {
            kubectl.args(["--namespace", namespace]);
        }
        command::run_with(kubectl.args(["apply", "--server-side", "--filename", "-"]), manifests.as_bytes())?;
        Ok(())
    }

    /// Runs Helm against the same cluster.
    pub fn helm(&self, helm: &Path, args: &[&str]) -> Result<String> {
        let mut run = Command::new(helm);
        if let Some(kubeconfig) = &self.kubeconfig {
            run.arg("--kubeconfig").arg(kubeconfig);
        }
        if let Some(context) = &self.context {
            run.args(["--kube-context", context]);
        }
        command::run(run.args(args))
    }

    /// Starts a port-forward to a port of a Service; the child prints the local port first.
    pub fn forward(&self, namespace: &str, service: &str, port: u16) -> Result<Child> {
        let mut kubectl = self.base();
        let (service, port) = (format!("service/{service}"), format!(":{port}"));
        kubectl.args(["--namespace", namespace, "port-forward", &service, &port]);
        kubectl.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        kubectl.spawn().context("cannot start kubectl")
    }

    /// For people: the beginning of a kubectl command.
    pub fn shown(&self) -> String {
        let program = self.program.display();
        match (&self.kubeconfig, &self.context) {
            (Some(kubeconfig), _) => format!("{program} --kubeconfig {}", kubeconfig.display()),
            (None, Some(context)) => format!("{program} --context {context}"),
            (None, None) => program.to_string(),
        }
    }

    fn base(&self) -> Command {
        let mut kubectl = Command::new(&self.program);
        if let Some(kubeconfig) = &self.kubeconfig {
            kubectl.arg("--kubeconfig").arg(kubeconfig);
        }
        if let Some(context) = &self.context {
            kubectl.args(["--context", context]);
        }
        kubectl
    }
}
