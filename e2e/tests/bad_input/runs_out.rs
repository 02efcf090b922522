//! A cluster that runs out of disk and memory.
use std::path::Path;

use anyhow::{Result, ensure};
use k8s_openapi::api::{batch::v1::Job, core::v1::PersistentVolume};
use kube::{Api, api::DeleteParams};
use lathe_e2e::{
    Session, install, machine, poll,
    tune::{job, prepare},
};
use serde_json::{Value, json};

use crate::{Bad, files, merged, nothing_half_written, told};

/// Name of the small disk and its volume, which no namespace takes with it.
const FULL: &str = "lathe-e2e-full";
const ENDS: &[(&str, &str)] = &[("Training", "False"), ("Succeeded", "False"), ("Stalled", "True")];

#[tokio::test]
async fn what_runs_out_is_named_and_leaves_nothing_half_written() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-runs-out").await?;
    // Room for folders and notes, not for a checkpoint or an adapter.
    let disk = machine::SmallDisk::mount(FULL, 128)?;
    session.run(runs_out(&session, &disk)).await?;
    session.end().await?;
    forget_volume(&session).await
}

async fn runs_out(session: &Session, disk: &machine::SmallDisk) -> Result<()> {
    prepare(session).await?;
    forget_volume(session).await?;
    for object in volume(FULL, &session.namespace, disk.path()) {
        session.apply(&object).await?;
    }
    files::write_many_rows(&machine::folder(session, "quickstart").await?)?;
    let hungry = json!({"spec": {
        // The plan allows it; many rows to measure with, which no plan counts, do not fit into it.
        "pod": {"memory": "360Mi"},
        "dataset": {"evaluation": {"uri": "pvc://quickstart/many.jsonl"}, "format": null},
        "accelerator": {"count": 1},
    }});
    let to = |field: &str, path: &str| json!({"spec": {field: {"destination": {"uri": format!("pvc://full/{path}")}}}});
    let all = [
        ends(
            "hungry",
            &hungry,
            "OutOfMemory",
            "the worker was killed at its memory limit of 360Mi*; planned *. Next: make a new FineTuneJob with more `spec.pod.memory`, a smaller `spec.training.sequenceLength`, or `spec.trainable.lora`.",
        )?,
        ends(
            "no-room-to-save",
            &to("checkpoint", "checkpoints"),
            "DiskFull",
            "`checkpoint.destination`: /lathe/volumes/full/checkpoints/run-*/.step-*.partial/state: the training state cannot be read or written: No space left on device (os error 28). Next: enlarge the volume, or free space on it.",
        )?,
        ends(
            "no-room-for-the-result",
            &to("output", "models"),
            "DiskFull",
            "`output.destination`: cannot * /lathe/volumes/full/models/no-room-for-the-result-model/.draft.*.partial*: No space left on device (os error 28). Next: enlarge the volume, or free space on it.",
        )?,
    ];
    for bad in &all {
        session.apply(&bad.object).await?;
    }
    told(session, &all).await?;
    // Memory is tried again three times, a full disk not at all.
    for (name, pods) in [("hungry-1", 4), ("no-room-to-save-1", 1), ("no-room-for-the-result-1", 1)] {
        let jobs: Api<Job> = Api::namespaced(session.client.clone(), &session.namespace);
        let failed = jobs.get(name).await?.status.and_then(|status| status.failed);
        ensure!(failed == Some(pods), "{name}: {failed:?} pods have failed, not {pods}");
    }
    nothing_half_written(&disk.seen())
}

fn ends(name: &str, change: &Value, reason: &'static str, message: &'static str) -> Result<Bad> {
    Ok(Bad { object: merged(job(name, 1)?, change), conditions: ENDS, reason, message })
}

async fn forget_volume(session: &Session) -> Result<()> {
    let volumes: Api<PersistentVolume> = Api::all(session.client.clone());
    match volumes.delete(FULL, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
        other => drop(other?),
    }
    poll("the volume to be gone", || async { Ok(volumes.get_opt(FULL).await?.is_none().then_some(())) }).await
}

/// A claim `full` whose volume is a folder of the node.
fn volume(name: &str, namespace: &str, folder: &Path) -> [Value; 2] {
    let size = json!({"storage": "1Gi"});
    [
        json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": {
            "accessModes": ["ReadWriteMany"], "capacity": size, "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": "", "claimRef": {"namespace": namespace, "name": "full"},
            "hostPath": {"path": folder, "type": "Directory"},
        }}),
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "full"}, "spec": {
            "accessModes": ["ReadWriteMany"], "resources": {"requests": size}, "storageClassName": "",
            "volumeName": name,
        }}),
    ]
}
