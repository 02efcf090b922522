//! Lathe's own life in a cluster: installed, brought to what this checkout holds, removed.
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, ListParams},
    core::ObjectMeta,
    discovery::{Discovery, verbs},
};

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
    // One test wants it, and says so in `more`; the others ask workers directly and leave the node's cores to them.
    args.extend(["--set", "gateway.enabled=false"]);
    args.extend(["--wait", "--timeout", "3m"]);
    args.extend(more);
    helm(&args).map(drop)
}

/// Removes the release, where there is one, and waits until its objects are gone.
///
/// # Errors
/// Helm fails, or the hook that cleans up after the operator does.
pub fn uninstall() -> Result<()> {
    let release = ["uninstall", "lathe", "--namespace", RELEASE_NAMESPACE];
    helm(&[&release[..], &["--ignore-not-found", "--wait", "--timeout", "3m"]].concat()).map(drop)
}

/// Runs kubectl (`LATHE_KUBECTL`, or the one on `PATH`) in the checkout and returns what it printed.
///
/// # Errors
/// As [`helm`].
pub fn kubectl(args: &[&str]) -> Result<String> {
    run("LATHE_KUBECTL", "kubectl", args)
}

/// Every object of the cluster that belongs to the release and to no user, as `Kind namespace/name`: what lies in its
/// namespace, what bears its label or its name, and profiles. Namespaces, and what each of them has by itself, do not count.
///
/// # Errors
/// The API server does not answer.
pub async fn belongings(client: &Client) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for group in Discovery::new(client.clone()).run().await?.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if !capabilities.supports_operation(verbs::LIST) {
                continue;
            }
            let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
            let objects = api.list_metadata(&ListParams::default()).await?;
            let ours = objects.iter().filter(|object| is_ours(&resource.kind, &object.metadata));
            found.extend(ours.map(|object| {
                let namespace = object.namespace().unwrap_or_default();
                format!("{} {namespace}/{}", resource.kind, object.name_any())
            }));
        }
    }
    found.sort();
    // Some kinds are served by two groups.
    found.dedup();
    Ok(found)
}

fn is_ours(kind: &str, meta: &ObjectMeta) -> bool {
    let name = meta.name.as_deref().unwrap_or_default();
    let label = |key: &str| meta.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
    let by_itself = matches!((kind, name), ("ConfigMap", "kube-root-ca.crt") | ("ServiceAccount", "default"));
    // The local cluster's, not Lathe's.
    let by_itself = by_itself || (kind, name) == ("StorageClass", "lathe-local");
    // An APIService stands for the CRDs of a group.
    if by_itself || matches!(kind, "Namespace" | "Event" | "APIService") {
        return false;
    }
    match meta.namespace.as_deref() {
        Some(RELEASE_NAMESPACE) => true,
        // Users' own, and what the operator made for them.
        Some(_) => label("app.kubernetes.io/part-of") == Some("lathe") && label("lathe.dev/kind").is_none(),
        None => name.contains("lathe") || kind == "AcceleratorProfile",
    }
}

fn run(variable: &str, program: &str, args: &[&str]) -> Result<String> {
    let path = std::env::var(variable).unwrap_or_else(|_| program.to_owned());
    let mut command = Command::new(path);
    command.args(args).current_dir(repository());
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
