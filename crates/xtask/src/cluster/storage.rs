//! The storage class `lathe-local`: a folder of this machine for each claim.
//!
//! A loop of this program, started as one of the cluster's processes, gives each waiting claim a
//! hostPath volume that every node sees and every user may write, and removes both with the claim.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Deserializer, Value, json};

use super::layout::Layout;
use super::processes::Process;
use crate::command::{run, run_with};

const CLASS: &str = "lathe-local";
/// Of the process and its program.
const NAME: &str = "provisioner";
const PROVISIONER: &str = "lathe.dev/local";

/// Makes the storage class and starts the loop.
///
/// # Errors
/// The API server refuses the class, or the loop cannot be started.
pub fn ensure(layout: &Layout) -> Result<()> {
    super::apply(
        layout,
        &json!({
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": CLASS,
                "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
            },
            "provisioner": PROVISIONER,
            "reclaimPolicy": "Delete",
            "volumeBindingMode": "Immediate",
        }),
    )?;
    let process = Process {
        name: NAME.to_owned(),
        program: own_program(layout)?,
        args: ["cluster", "provision", "--name", &layout.name].map(str::to_owned).into(),
        inside: None,
    };
    process.ensure(layout).map(drop)
}

/// A copy of this program, since cargo may replace the one that runs while tests are built.
fn own_program(layout: &Layout) -> Result<PathBuf> {
    let (copy, unfinished) = (layout.at(NAME), layout.at(format!("{NAME}.part")));
    fs::copy("/proc/self/exe", &unfinished).context("cannot copy this program")?;
    // A rename, since a running copy cannot be written to.
    fs::rename(&unfinished, &copy)?;
    Ok(copy)
}

/// The loop: never returns.
pub fn provision(layout: &Layout) {
    let kubectl = super::kubectl;
    thread::scope(|scope| {
        scope.spawn(|| watch(|| kubectl(layout), "persistentvolumeclaims", |claim| serve(layout, claim)));
        scope.spawn(|| watch(|| kubectl(layout), "persistentvolumes", |volume| reclaim(layout, volume)));
    });
}

/// Follows all objects of a kind for ever, beginning again when the API server goes away.
fn watch(kubectl: impl Fn() -> Command, kind: &str, handle: impl Fn(&Value) -> Result<()>) {
    loop {
        if let Err(error) = watch_once(kubectl(), kind, &handle) {
            eprintln!("watching {kind}: {error:#}");
        }
        thread::sleep(Duration::from_secs(1));
    }
}

fn watch_once(mut kubectl: Command, kind: &str, handle: &impl Fn(&Value) -> Result<()>) -> Result<()> {
    let mut child = kubectl
        .args(["get", kind, "--all-namespaces", "--watch", "-o", "json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("kubectl has no stdout")?;
    for object in Deserializer::from_reader(stdout).into_iter::<Value>() {
        let object = object?;
        if let Err(error) = handle(&object) {
            eprintln!("{kind} {}: {error:#}", object["metadata"]["name"]);
        }
    }
    child.wait()?;
    Ok(())
}

fn serve(layout: &Layout, claim: &Value) -> Result<()> {
    let volumes = layout.at("volumes");
    let Some(volume) = volume_for(claim, &volumes) else {
        return Ok(());
    };
    let folder = volumes.join(volume["metadata"]["name"].as_str().unwrap_or_default());
    fs::create_dir_all(&folder)?;
    // Pods run as any user.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    super::apply(layout, &volume)
}

/// The volume a claim waits for, if it waits for one of ours.
fn volume_for(claim: &Value, volumes: &Path) -> Option<Value> {
    let (metadata, spec) = (&claim["metadata"], &claim["spec"]);
    let waits = spec["storageClassName"] == CLASS
        && spec["volumeName"].is_null()
        && metadata["deletionTimestamp"].is_null();
    if !waits {
        return None;
    }
    let name = format!("pvc-{}", metadata["uid"].as_str()?);
    Some(json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": name,
            "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER},
        },
        "spec": {
            "storageClassName": CLASS,
            "persistentVolumeReclaimPolicy": "Delete",
            "accessModes": spec["accessModes"],
            "volumeMode": spec["volumeMode"],
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "hostPath": {"path": volumes.join(&name), "type": "Directory"},
        },
    }))
}

fn reclaim(layout: &Layout, volume: &Value) -> Result<()> {
    let Some(name) = released(volume) else {
        return Ok(());
    };
    let folder = layout.at("volumes").join(name);
    if folder.is_dir() {
        fs::remove_dir_all(folder)?;
    }
    let mut delete = super::kubectl(layout);
    run(delete.args(["delete", "persistentvolume", name, "--ignore-not-found", "--wait=false"])).map(drop)
}

/// The name of one of our volumes whose claim is gone.
fn released(volume: &Value) -> Option<&str> {
    let metadata = &volume["metadata"];
    let ours = metadata["annotations"]["pv.kubernetes.io/provisioned-by"] == PROVISIONER
        && volume["spec"]["persistentVolumeReclaimPolicy"] == "Delete"
        && volume["status"]["phase"] == "Released";
    let name = metadata["name"].as_str().filter(|_| ours)?;
    // Anyone may write a name into a volume: only one that we could have made is a folder of ours.
    let uid = name.strip_prefix("pvc-")?;
    uid.chars().all(|c| c.is_ascii_hexdigit() || c == '-').then_some(name)
}

/// Applies `object` with the cluster's own kubectl.
pub(super) fn apply(mut kubectl: Command, object: &Value) -> Result<()> {
    let args = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
    run_with(kubectl.args(args), object.to_string().as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim() -> Value {
        json!({
            "metadata": {"name": "data", "namespace": "team", "uid": "0a-1b"},
            "spec": {
                "storageClassName": "lathe-local",
                "accessModes": ["ReadWriteMany"],
                "volumeMode": "Filesystem",
                "resources": {"requests": {"storage": "1Gi"}},
            },
        })
    }

    #[test]
    fn a_waiting_claim_gets_a_volume_bound_to_it() -> Result<()> {
        let volume = volume_for(&claim(), Path::new("/v")).context("no volume")?;
        assert_eq!(volume["metadata"]["name"], "pvc-0a-1b");
        assert_eq!(volume["spec"]["hostPath"]["path"], "/v/pvc-0a-1b");
        assert_eq!(volume["spec"]["claimRef"]["uid"], "0a-1b");
        assert_eq!(volume["spec"]["accessModes"], json!(["ReadWriteMany"]));
        Ok(())
    }

    #[test]
    fn bound_deleted_and_foreign_claims_get_none() {
        let with = |path: &str, value: Value| {
            let mut claim = claim();
            let (object, field) = path.split_once('.').unwrap_or((path, ""));
            claim[object][field] = value;
            volume_for(&claim, Path::new("/v"))
        };
        assert!(with("spec.volumeName", json!("pvc-0a-1b")).is_none());
        assert!(with("metadata.deletionTimestamp", json!("2026-01-01T00:00:00Z")).is_none());
        assert!(with("spec.storageClassName", json!("other")).is_none());
    }

    #[test]
    fn only_released_volumes_with_names_of_ours_are_removed() {
        let volume = |name: &str, phase: &str| {
            json!({
                "metadata": {
                    "name": name,
                    "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER},
                },
                "spec": {"persistentVolumeReclaimPolicy": "Delete"},
                "status": {"phase": phase},
            })
        };
        assert_eq!(released(&volume("pvc-0a-1b", "Released")), Some("pvc-0a-1b"));
        assert_eq!(released(&volume("pvc-0a-1b", "Bound")), None);
        assert_eq!(released(&volume("pvc-../x", "Released")), None);
        assert_eq!(released(&volume("other", "Released")), None);
    }
}
