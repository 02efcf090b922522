//! deploy/ beside the chart: the same objects, but for what is named here.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::objects::{Helm, key, kinds, named, parse};
use crate::{command, paths, toolchain};

/// Labels and annotations that only Helm's own objects carry.
const OF_HELM: [&str; 3] = ["helm.sh/chart", "app.kubernetes.io/managed-by", "helm.sh/resource-policy"];
/// Helm makes the namespace itself, by --create-namespace.
const PLAIN_ALONE: &str = "Namespace /lathe-system";

/// deploy/lathe.yaml, and what Kustomize makes of deploy/, hold the chart's objects with its default values.
pub fn same_objects(helm: &Helm) -> Result<()> {
    let chart = by_key(parse(&helm.template(&[])?)?);
    let deploy = paths::repository().join("deploy");
    let text = fs::read_to_string(deploy.join("lathe.yaml")).context("cannot read deploy/lathe.yaml")?;
    for (what, text) in [("deploy/lathe.yaml", text), ("kubectl kustomize deploy", kustomize(&deploy)?)] {
        let mut plain = by_key(parse(&text)?);
        ensure!(plain.remove(PLAIN_ALONE).is_some(), "{what} has no {PLAIN_ALONE}");
        let differs = differences(&chart, &plain);
        ensure!(differs.is_empty(), "{what}: {}. Next: cargo xtask generate", differs.join("; "));
    }
    Ok(())
}

/// An overlay in another namespace with another registry leaves no trace of ours.
pub fn overlay(_: &Helm) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("lathe-overlay-{}", std::process::id()));
    let made = rendered_overlay(&folder);
    // Whatever came of it, nothing stays behind.
    let _ = fs::remove_dir_all(&folder);
    let all = parse(&made?)?;
    for object in &all {
        let text = object.to_string();
        let crd = object["kind"] == "CustomResourceDefinition";
        ensure!(!text.contains("lathe-system"), "{} is still of lathe-system", key(object));
        ensure!(crd || !text.contains("ghcr.io"), "{} still has our registry: {text}", key(object));
    }
    for program in ["lathe-operator", "lathe-gateway"] {
        let deployment =
            named(&all, "Deployment", program).with_context(|| format!("no Deployment {program}"))?;
        let image = &deployment["spec"]["template"]["spec"]["containers"][0]["image"];
        ensure!(*image == *format!("registry.example/{program}:2"), "image of {program}: {image}");
    }
    let operator = named(&all, "Deployment", "lathe-operator").context("no Deployment")?;
    let container = &operator["spec"]["template"]["spec"]["containers"][0];
    let worker =
        container["env"].as_array().into_iter().flatten().find(|e| e["name"] == "LATHE_WORKER_IMAGE");
    ensure!(
        worker.is_some_and(|e| e["value"] == "registry.example/lathe-worker:2"),
        "worker's image: {worker:?}"
    );
    for binding in kinds(&all, "ClusterRoleBinding").chain(kinds(&all, "RoleBinding")) {
        let namespace = &binding["subjects"][0]["namespace"];
        ensure!(namespace == "ml-platform", "{} is for {namespace}", key(binding));
    }
    Ok(())
}

fn rendered_overlay(folder: &Path) -> Result<String> {
    let (base, overlay) = (folder.join("deploy"), folder.join("overlay"));
    fs::create_dir_all(&base)?;
    fs::create_dir_all(&overlay)?;
    for entry in fs::read_dir(paths::repository().join("deploy"))? {
        let file = entry?;
        fs::copy(file.path(), base.join(file.file_name()))?;
    }
    let image = |name: &str| {
        format!("  - {{name: ghcr.io/lathe-dev/{name}, newName: registry.example/{name}, newTag: \"2\"}}\n")
    };
    let images = ["lathe-operator", "lathe-gateway", "lathe-worker"].map(image).concat();
    let text = format!("resources: [../deploy]\nnamespace: ml-platform\nimages:\n{images}");
    fs::write(overlay.join("kustomization.yaml"), text)?;
    kustomize(&overlay)
}

fn kustomize(folder: &Path) -> Result<String> {
    let mut kubectl = Command::new(toolchain::go_program(&toolchain::KUBERNETES)?);
    command::run(kubectl.arg0("kubectl").arg("kustomize").arg(folder))
}

/// Objects without what only Helm's own carry; its hooks are no objects of the release.
fn by_key(all: Vec<Value>) -> BTreeMap<String, Value> {
    let mut kept = BTreeMap::new();
    for mut object in all {
        if !object["metadata"]["annotations"]["helm.sh/hook"].is_null() {
            continue;
        }
        for part in ["labels", "annotations"] {
            let empty = object["metadata"][part].as_object_mut().is_none_or(|pairs| {
                OF_HELM.iter().for_each(|of_helm| drop(pairs.remove(*of_helm)));
                pairs.is_empty()
            });
            if let Some(meta) = object["metadata"].as_object_mut().filter(|_| empty) {
                meta.remove(part);
            }
        }
        whole(&mut object);
        kept.insert(key(&object), object);
    }
    kept
}

/// Kustomize writes 1.0 as 1, which is the same bound of a schema.
fn whole(value: &mut Value) {
    match value {
        Value::Object(fields) => fields.values_mut().for_each(whole),
        Value::Array(items) => items.iter_mut().for_each(whole),
        // Up to 2^53, where every whole number is exact.
        Value::Number(number) => {
            let exact = number.as_f64().filter(|n| n.fract() == 0.0 && n.abs() <= 2f64.powi(53));
            if let Some(exact) = exact.filter(|_| number.is_f64()) {
                *value = (exact as i64).into();
            }
        }
        _ => {}
    }
}

fn differences(chart: &BTreeMap<String, Value>, plain: &BTreeMap<String, Value>) -> Vec<String> {
    let lacking = chart.keys().filter(|key| !plain.contains_key(*key)).map(|key| format!("{key} is missing"));
    let surplus =
        plain.keys().filter(|key| !chart.contains_key(*key)).map(|key| format!("{key} is not the chart's"));
    let other = chart.iter().filter(|(key, object)| plain.get(*key).is_some_and(|other| other != *object));
    lacking.chain(surplus).chain(other.map(|(key, _)| format!("{key} differs"))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_helm_adds_is_no_difference_and_everything_else_is() {
        let object = |labels: Value, data: &str| json!({"kind": "A", "metadata": {"name": "a", "labels": labels}, "data": data});
        let chart = by_key(vec![
            object(json!({"helm.sh/chart": "l-1", "app.kubernetes.io/managed-by": "Helm"}), "x"),
            json!({"kind": "Hook", "metadata": {"annotations": {"helm.sh/hook": "post-delete"}}}),
        ]);
        let bare = json!({"kind": "A", "metadata": {"name": "a"}, "data": "x"});
        let bound = |least: Value| by_key(vec![json!({"kind": "A", "minimum": least})]);
        assert_eq!(bound(json!(1.0)), bound(json!(1)));
        assert_ne!(bound(json!(1.5)), bound(json!(1)));
        assert_eq!(differences(&chart, &by_key(vec![bare])), Vec::<String>::new());
        assert_eq!(differences(&chart, &by_key(vec![object(json!({}), "y")])), ["A /a differs"]);
        assert_eq!(differences(&chart, &by_key(vec![object(json!({"own": "1"}), "x")])), ["A /a differs"]);
        assert_eq!(differences(&chart, &BTreeMap::new()), ["A /a is missing"]);
        assert_eq!(differences(&BTreeMap::new(), &chart), ["A /a is not the chart's"]);
    }
}
