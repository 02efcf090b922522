//! What users give by mistake and what their cluster runs out of: each is named in status with what to do next, nothing
//! half-written lies under a final name, and what was put right goes on by itself.
//!
//! Only what needs a cluster is here; docs/failures.md says where the rest is tested.
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::{Api, api::DeleteParams};
use lathe_e2e::{
    Session, install, machine, poll, repository,
    tune::{job, prepare},
};
use serde_json::{Value, json};

/// An object that cannot work, and what its status must say.
struct Bad {
    kind: &'static str,
    name: String,
    reason: &'static str,
    /// Parts of the message.
    says: &'static [&'static str],
    object: Value,
}

#[tokio::test]
async fn every_mistake_is_named_with_the_next_step() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-bad-input").await?;
    session.run(mistakes(&session)).await?;
    session.end().await
}

async fn mistakes(session: &Session) -> Result<()> {
    prepare(session).await?;
    let folder = machine::folder(session, "quickstart").await?;
    bad_models(&folder)?;
    bad_data(&folder)?;
    let all: Vec<Bad> = models().into_iter().chain(jobs()?).collect();
    for bad in &all {
        session.apply(&bad.object).await?;
    }
    let mut wrong = Vec::new();
    for Bad { kind, name, reason, says, .. } in &all {
        // A claim may come any moment; all else waits for a person.
        let (type_, status) =
            if *reason == "VolumeNotFound" { ("Ready", "Unknown") } else { ("Stalled", "True") };
        let message = session.reason(kind, name, type_, status, reason).await?;
        let lacks: Vec<_> = says.iter().chain(&["Next: "]).filter(|part| !message.contains(**part)).collect();
        if !lacks.is_empty() {
            wrong.push(format!("{kind} {name}: {message:?} lacks {lacks:?}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The next step helps: with the row put right the job goes on, without a new object.
    write(&folder.join("bad/row.jsonl"), &good_rows()?)?;
    session.wait("FineTuneJob", "row", "DatasetValid", "True").await?;
    session.wait("FineTuneJob", "row", "Succeeded", "True").await?;
    Ok(())
}

fn models() -> Vec<Bad> {
    let model = |name: &str, source: Value, reason, says| Bad {
        kind: "Model",
        name: name.to_owned(),
        reason,
        says,
        object: json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": name},
            "spec": {"source": source}}),
    };
    let at = |path: &str| json!({"uri": format!("pvc://quickstart/{path}")});
    let pinned = json!({"uri": "pvc://quickstart/model", "digest": format!("sha256:{}", "0".repeat(64))});
    vec![
        model("missing", at("nowhere"), "NotFound", &["nowhere"]),
        model("no-claim", json!({"uri": "pvc://nobody/model"}), "VolumeNotFound", &["nobody"]),
        model("pickle", at("bad/pickle"), "PickleRefused", &["pytorch_model.bin", "safetensors"]),
        model("disguised", at("bad/disguised"), "PickleRefused", &["model.safetensors"]),
        model("mamba", at("bad/mamba"), "UnsupportedArchitecture", &["MambaForCausalLM", "LlamaForCausalLM"]),
        model("cut", at("bad/cut"), "Malformed", &["model.safetensors"]),
        model("pinned", pinned, "DigestMismatch", &["0000000000"]),
        model("locked", at("bad/locked"), "Unauthorized", &["locked was refused. Next: let the pod's user"]),
    ]
}

fn jobs() -> Result<Vec<Bad>> {
    let tune = |name: &str, change: Value, reason, says| -> Result<Bad> {
        let mut object = job(name, 1)?;
        merge(&mut object, change);
        Ok(Bad { kind: "FineTuneJob", name: name.to_owned(), reason, says, object })
    };
    let data = |file: &str| {
        let uri = format!("pvc://quickstart/{file}");
        json!({"spec": {"dataset": {"train": {"uri": uri}}}})
    };
    Ok(vec![
        tune("no-data", data("data/nothing.jsonl"), "NotFound", &["nothing.jsonl"])?,
        tune(
            "row",
            data("bad/row.jsonl"),
            "MalformedRow",
            &["row.jsonl line 3", "messages[1].content", "a number"],
        )?,
        tune("empty", data("bad/empty.jsonl"), "EmptyDataset", &["empty.jsonl"])?,
        tune("latin", data("bad/latin.jsonl"), "NotUtf8", &["latin.jsonl line 1"])?,
        tune(
            "packed",
            data("bad/packed.jsonl"),
            "MalformedDataset",
            &["packed.jsonl", "JSON Lines", "gzip"],
        )?,
        tune(
            "cut-rows",
            json!({"spec": {"training": {"sequenceLength": 8}}}),
            "NothingToLearn",
            &["train.jsonl", "sequenceLength"],
        )?,
        tune(
            "taken",
            json!({"spec": {"output": {"modelName": "shop-base"}}}),
            "OutputExists",
            &["Model shop-base", "output.modelName"],
        )?,
        tune("tight", json!({"spec": {"pod": {"memory": "64Mi"}}}), "DoesNotFit", &["64Mi"])?,
    ])
}

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

/// Name of the small disk and its volume, which no namespace takes with it.
const FULL: &str = "lathe-e2e-full";

async fn forget_volume(session: &Session) -> Result<()> {
    let volumes: Api<PersistentVolume> = Api::all(session.client.clone());
    match volumes.delete(FULL, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
        other => drop(other?),
    }
    poll("the volume to be gone", || async { Ok(volumes.get_opt(FULL).await?.is_none().then_some(())) }).await
}

/// Memory that the plan allows, and that many rows do not fit into.
const HUNGRY: &str = "360Mi";

async fn runs_out(session: &Session, disk: &machine::SmallDisk) -> Result<()> {
    prepare(session).await?;
    forget_volume(session).await?;
    for object in volume(FULL, &session.namespace, disk.path()) {
        session.apply(&object).await?;
    }
    let folder = machine::folder(session, "quickstart").await?;
    many_rows(&folder)?;
    let on_disk = |field: &str, path: &str| {
        let mut spec = json!({});
        spec[field]["destination"]["uri"] = format!("pvc://full/{path}").into();
        json!({"spec": spec})
    };
    let changes = [
        ("no-room-to-save", on_disk("checkpoint", "checkpoints")),
        ("no-room-for-the-result", on_disk("output", "models")),
        ("hungry", json!({"spec": {"pod": {"memory": HUNGRY}}})),
    ];
    for (name, change) in changes {
        let mut object = job(name, 1)?;
        merge(&mut object, change);
        if name == "hungry" {
            object["spec"]["dataset"] = json!({"train": {"uri": "pvc://quickstart/many.jsonl"}});
            object["spec"]["accelerator"]["count"] = 1.into();
        }
        session.apply(&object).await?;
    }
    let ends = [
        ("hungry", "OutOfMemory", HUNGRY),
        ("no-room-to-save", "DiskFull", "`checkpoint.destination`"),
        ("no-room-for-the-result", "DiskFull", "`output.destination`"),
    ];
    let mut wrong = Vec::new();
    for (name, reason, names) in ends {
        let cause = session.reason("FineTuneJob", name, "Training", "False", reason).await?;
        if !cause.contains(names) || !cause.contains("Next: ") {
            wrong.push(format!("{name}: {cause}"));
        }
        session.reason("FineTuneJob", name, "Succeeded", "False", reason).await?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    let left = machine::files(&disk.seen())?;
    let whole = |file: &&String| file.contains("/step-") || file.contains("safetensors");
    let half: Vec<_> = left.iter().filter(whole).collect();
    ensure!(half.is_empty(), "under a final name: {half:?} of {left:?}");
    Ok(())
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

/// Models in the volume `folder`, each with one thing wrong.
fn bad_models(folder: &Path) -> Result<()> {
    let good = quickstart_files().join("model");
    let bad = folder.join("bad");
    let copy = |name: &str| -> Result<PathBuf> {
        let to = bad.join(name);
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(&good).context("the quick-start's model")? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(to)
    };
    const PICKLE: &[u8] = b"\x80\x02}q\x00.";
    let weights = "model.safetensors";

    let pickle = copy("pickle")?;
    fs::remove_file(pickle.join(weights))?;
    write(&pickle.join("pytorch_model.bin"), PICKLE)?;
    write(&copy("disguised")?.join(weights), PICKLE)?;

    let mamba = copy("mamba")?.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&mamba)?)?;
    config["architectures"] = json!(["MambaForCausalLM"]);
    write(&mamba, config.to_string().as_bytes())?;

    let cut = copy("cut")?.join(weights);
    let whole = fs::read(&cut)?;
    write(&cut, &whole[..whole.len() / 2])?;

    fs::set_permissions(copy("locked")?, fs::Permissions::from_mode(0o700))?;
    Ok(())
}

/// Datasets in the volume `folder`, each with one thing wrong.
fn bad_data(folder: &Path) -> Result<()> {
    let bad = folder.join("bad");
    let rows = String::from_utf8(good_rows()?)?;
    let mut lines: Vec<&str> = rows.lines().collect();
    lines[2] = r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]}"#;
    write(&bad.join("row.jsonl"), lines.join("\n").as_bytes())?;
    write(&bad.join("empty.jsonl"), b"\n")?;
    write(&bad.join("latin.jsonl"), b"{\"text\": \"caf\xe9\"}\n")?;
    write(&bad.join("packed.jsonl"), b"\x1f\x8b\x08\0")
}

/// More rows than a small pod holds: short ones, since each takes room beside its text.
fn many_rows(folder: &Path) -> Result<()> {
    const ROWS: usize = 2_500_000;
    write(&folder.join("many.jsonl"), "{\"text\": \"a\"}\n".repeat(ROWS).as_bytes())
}

fn good_rows() -> Result<Vec<u8>> {
    fs::read(quickstart_files().join("data/train.jsonl")).context("the quick-start's rows")
}

fn quickstart_files() -> PathBuf {
    repository().join("examples/quickstart/volumes/quickstart")
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Objects are merged, everything else is replaced.
fn merge(into: &mut Value, over: Value) {
    match (into, over) {
        (Value::Object(into), Value::Object(over)) => {
            for (key, value) in over {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, over) => *into = over,
    }
}
