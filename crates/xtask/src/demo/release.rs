//! The Helm release of the demo: made, marked as the demo's own, and never taken for somebody else's.

use std::path::Path;

use anyhow::{Result, bail};

use super::gateway;
use super::target::Target;
use crate::{paths, toolchain, ui};

const RELEASE: &str = "lathe";
/// Where Lathe runs.
pub const NAMESPACE: &str = "lathe-system";
/// Label of the release, by which the demo knows what it made.
const MARK: &str = "lathe.dev/demo=true";

/// Whose Lathe runs in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Nobody,
    Demo,
    Somebody,
}

/// Installs the chart, or upgrades it to what this checkout holds. Returns a key of the gateway for the demo's namespace.
///
/// # Errors
/// Helm's words; in a user's cluster also where a release is there that the demo did not make.
pub fn install(target: &Target, registry: &str) -> Result<String> {
    let helm = toolchain::go_program(&toolchain::HELM)?;
    if target.is_users() && whose(target, &helm)? == Whose::Somebody {
        bail!(
            "there is a Helm release `{RELEASE}` in namespace {NAMESPACE} that the demo did not make, and the demo would \
             replace its values. Next: use another cluster, or run examples/quickstart with the Lathe that is there: \
             `kubectl create namespace {demo}` and `kubectl --namespace {demo} apply -f examples/quickstart`.",
            demo = super::NAMESPACE
        );
    }
    // Before the gateway's pods: a running one hears of a key within a minute only.
    target.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n"), None)?;
    let key = gateway::make_key(target)?;
    let chart = paths::repository().join("charts/lathe");
    let step = ui::step("helm upgrade --install lathe charts/lathe --namespace lathe-system");
    let (chart, registry) = (chart.to_string_lossy(), format!("image.registry={registry}"));
    let upgrade = ["upgrade", "--install", RELEASE, &chart, "--namespace", NAMESPACE, "--create-namespace"];
    let settings = ["--labels", MARK, "--set", &registry, "--wait", "--timeout", "3m"];
    target.helm(&helm, &[&upgrade[..], &settings].concat())?;
    // An image of the same tag may have been built anew.
    let rollout = ["--namespace", NAMESPACE, "rollout"];
    for deployment in ["deployment/lathe-operator", "deployment/lathe-gateway"] {
        target.kubectl(&[&rollout[..], &["restart", deployment]].concat())?;
        target.kubectl(&[&rollout[..], &["status", deployment, "--timeout=180s"]].concat())?;
    }
    step.done("");
    Ok(key)
}

/// Uninstalls the release where the demo made it; says what became of it.
///
/// # Errors
/// Helm's words.
pub fn uninstall(target: &Target) -> Result<&'static str> {
    let helm = toolchain::go_program(&toolchain::HELM)?;
    gateway::forget_key(target)?;
    match whose(target, &helm)? {
        Whose::Nobody => Ok("there was no Lathe"),
        Whose::Somebody => Ok("Lathe itself stays: the demo did not install it"),
        Whose::Demo => {
            target.helm(&helm, &["uninstall", RELEASE, "--namespace", NAMESPACE, "--wait"])?;
            Ok("the CRDs stay")
        }
    }
}

fn whose(target: &Target, helm: &Path) -> Result<Whose> {
    let filter = format!("^{RELEASE}$");
    let list = ["list", "--namespace", NAMESPACE, "--filter", &filter, "--short"];
    let all = target.helm(helm, &list)?;
    let ours = target.helm(helm, &[&list[..], &["--selector", MARK]].concat())?;
    Ok(told(&all, &ours))
}

/// From the names of all releases, and of those with the mark.
fn told(all: &str, ours: &str) -> Whose {
    let named = |list: &str| list.lines().any(|name| name.trim() == RELEASE);
    match (named(all), named(ours)) {
        (_, true) => Whose::Demo,
        (true, false) => Whose::Somebody,
        (false, false) => Whose::Nobody,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_without_the_mark_is_somebody_elses() {
        assert_eq!(told("lathe\n", ""), Whose::Somebody);
        assert_eq!(told("lathe\n", "lathe\n"), Whose::Demo);
        assert_eq!(told("", ""), Whose::Nobody);
    }
}
