//! deploy/: the chart's objects, with its default values, for `kubectl apply` and Kustomize.
//!
//! They are the chart's own text, so that the two cannot drift and every rule keeps its comment. What only Helm understands
//! stays out: its labels (whoever applies plain manifests is another manager, and an upgrade of the chart's version alone
//! changes nothing), its hooks (nobody would run them), and `helm.sh/resource-policy` of the CRDs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::yaml;
use crate::{command, toolchain};

/// Namespace and name of the release that the manifests are.
const NAMESPACE: &str = "lathe-system";
const RELEASE: &str = "lathe";

/// Lines of the chart's metadata that speak of Helm.
const OF_HELM: [&str; 2] = ["helm.sh/chart:", "app.kubernetes.io/managed-by: Helm"];

const HEADER: &str = "# Made from charts/lathe by `cargo xtask generate`; change the chart.\n";

const NAMESPACE_OBJECT: &str = "---
apiVersion: v1
kind: Namespace
metadata:
  name: lathe-system
  labels:
    app.kubernetes.io/part-of: lathe
    pod-security.kubernetes.io/enforce: restricted
";

const KUSTOMIZATION: &str = "# kubectl apply --server-side -k deploy/
# An overlay may set `namespace` and `images`, the worker's image included.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - crds.yaml
  - operator.yaml
configurations:
  - kustomizeconfig.yaml
";

const KUSTOMIZE_CONFIG: &str = "# The worker's image is told to the operator in its environment.
images:
  - kind: Deployment
    path: spec/template/spec/containers[]/env[]/value
";

/// Path and content of every file of deploy/.
///
/// # Errors
/// Helm cannot be had or does not render the chart; the catalogue of profiles cannot be read.
pub fn files(root: &Path, crds: &[Value]) -> Result<Vec<(PathBuf, String)>> {
    let crds: String = crds.iter().map(|crd| format!("---\n{}", yaml::document(crd))).collect();
    let operator = format!("{NAMESPACE_OBJECT}{}", plain(&render(root)?));
    let profiles = profiles(&root.join("crates/resolve/src/catalogue/catalogue.yaml"))?;
    let file = |name: &str, content: String| (root.join("deploy").join(name), content);
    Ok(vec![
        file("lathe.yaml", format!("{HEADER}{crds}{operator}")),
        file("crds.yaml", format!("{HEADER}{crds}")),
        file("operator.yaml", format!("{HEADER}{operator}")),
        file("profiles.yaml", profiles),
        file("kustomization.yaml", KUSTOMIZATION.to_owned()),
        file("kustomizeconfig.yaml", KUSTOMIZE_CONFIG.to_owned()),
    ])
}

/// What Helm would apply, but for the CRDs.
fn render(root: &Path) -> Result<String> {
    let mut helm = Command::new(toolchain::go_program(&toolchain::HELM)?);
    helm.args(["template", RELEASE]).arg(root.join("charts/lathe"));
    helm.args(["--namespace", NAMESPACE, "--no-hooks", "--set", "crds.enabled=false"]);
    let text = command::run(&mut helm)?;
    ensure!(text.contains("kind: Deployment"), "helm rendered no Deployment:\n{text}");
    Ok(text)
}

/// Helm's text without what only Helm understands.
fn plain(rendered: &str) -> String {
    let ours = |line: &&str| {
        let word = line.trim_start();
        !OF_HELM.iter().any(|of_helm| word.starts_with(of_helm)) && !word.starts_with("# Source: ")
    };
    let lines: Vec<&str> = rendered.lines().filter(ours).collect();
    // An empty line before a separator comes from the end of a template.
    let kept = lines.iter().enumerate().filter(|(at, line)| {
        !line.is_empty() || lines.get(at + 1).is_some_and(|next| !next.is_empty() && *next != "---")
    });
    kept.map(|(_, line)| format!("{line}\n")).collect()
}

/// The embedded catalogue as objects, for whoever rules a cluster where Lathe looks after some namespaces alone.
fn profiles(catalogue: &Path) -> Result<String> {
    let text =
        std::fs::read_to_string(catalogue).with_context(|| format!("cannot read {}", catalogue.display()))?;
    let entries: Vec<Value> = serde_saphyr::from_multiple(&text).context("reading the catalogue")?;
    let mut out = "# Made from the operator's embedded catalogue by `cargo xtask generate`.\n\
                   # kubectl apply --server-side --field-manager=lathe-catalogue -f deploy/profiles.yaml\n"
        .to_owned();
    for entry in entries {
        let object = json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "AcceleratorProfile",
            "metadata": {"name": entry["metadata"]["name"], "labels": {"app.kubernetes.io/managed-by": "lathe"}},
            "spec": entry["spec"],
        });
        out.push_str("---\n");
        out.push_str(&yaml::document(&object));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn what_only_helm_understands_is_left_out_and_comments_stay() {
        let rendered = "---\n# Source: lathe/templates/a.yaml\n# Why.\nkind: A\nmetadata:\n  labels:\n    \
                        app.kubernetes.io/instance: lathe\n    app.kubernetes.io/managed-by: Helm\n    \
                        helm.sh/chart: lathe-0.1.0\n\n---\nkind: B\n\n";
        let expected = "---\n# Why.\nkind: A\nmetadata:\n  labels:\n    app.kubernetes.io/instance: lathe\n---\nkind: B\n";
        assert_eq!(plain(rendered), expected);
    }
}
