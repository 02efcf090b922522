//! The API server through `kubectl proxy`: plain HTTP on loopback, with the administrator's rights.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::bench::ask;
use crate::bench::process::Watched;
use crate::cluster::Cluster;

/// Who the operator is here, so that its calls are told from everybody else's.
const USER: &str = "lathe-bench-operator";
/// The flow of that user's calls in the API server's own metrics.
pub const FLOW: &str = "lathe-bench";

/// A client.
pub struct Api {
    agent: ureq::Agent,
    url: String,
    _proxy: Watched,
}

impl Api {
    /// Opens the proxy.
    ///
    /// # Errors
    /// It does not start.
    pub fn open(cluster: &Cluster, folder: &Path) -> Result<Self> {
        let log = folder.join("proxy.log");
        let mut proxy = Watched::start(cluster.kubectl().args(["proxy", "--port=0"]), &log)?;
        let address = proxy.wait_for("kubectl proxy", Duration::from_secs(30), || {
            let said = fs::read_to_string(&log).ok()?;
            Some(said.lines().find_map(|line| line.strip_prefix("Starting to serve on "))?.trim().to_owned())
        })?;
        Ok(Self {
            agent: ask::agent(Duration::from_secs(60)),
            url: format!("http://{address}"),
            _proxy: proxy,
        })
    }

    /// Reads a path.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn get(&self, path: &str) -> Result<Value> {
        ask::get(&self.agent, &format!("{}{path}", self.url))
    }

    /// Reads a path that is no JSON.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn text(&self, path: &str) -> Result<String> {
        let response =
            self.agent.get(format!("{}{path}", self.url)).call().with_context(|| path.to_owned())?;
        Ok(response.into_body().with_config().limit(256 << 20).read_to_string()?)
    }

    /// Makes an object.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn create(&self, path: &str, object: &Value) -> Result<()> {
        let url = format!("{}{path}", self.url);
        let sent = self.agent.post(&url).content_type("application/json").send(object.to_string());
        sent.map(drop).with_context(|| format!("{path}: {object}"))
    }

    /// Changes an object.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn merge(&self, path: &str, change: &Value) -> Result<()> {
        let url = format!("{}{path}", self.url);
        let sent =
            self.agent.patch(&url).content_type("application/merge-patch+json").send(change.to_string());
        sent.map(drop).with_context(|| path.to_owned())
    }

    /// How many of a kind there are in the cluster, that bear the label.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn count(&self, path: &str, selector: &str) -> Result<usize> {
        let list = self.get(&format!("{path}?resourceVersion=0&labelSelector={selector}"))?;
        Ok(list["items"].as_array().map_or(0, Vec::len))
    }
}

/// Makes the operator a user with every right and a flow of its own, and writes its kubeconfig.
///
/// # Errors
/// The cluster refuses it.
pub fn user(cluster: &Cluster, folder: &Path) -> Result<std::path::PathBuf> {
    let everything = json!([{
        "subjects": [{"kind": "User", "user": {"name": USER}}],
        "resourceRules": [{
            "apiGroups": ["*"], "resources": ["*"], "verbs": ["*"], "clusterScope": true, "namespaces": ["*"],
        }],
        "nonResourceRules": [{"nonResourceURLs": ["*"], "verbs": ["*"]}],
    }]);
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": FLOW},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
        },
        {
            "apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema",
            "metadata": {"name": FLOW},
            // As the flows of service accounts, and found before those of everybody.
            "spec": {
                "matchingPrecedence": 500, "priorityLevelConfiguration": {"name": "workload-low"},
                "distinguisherMethod": {"type": "ByUser"}, "rules": everything,
            },
        },
    ]}))?;
    let shown = crate::command::run(cluster.kubectl().args(["config", "view", "--raw", "--output=json"]))?;
    let mut config: Value = serde_json::from_str(&shown)?;
    let admin = config["users"][0]["user"].as_object_mut().context("the kubeconfig has no user")?;
    admin.insert("as".to_owned(), USER.into());
    let path = folder.join("kubeconfig.json");
    fs::write(&path, config.to_string())?;
    Ok(path)
}
