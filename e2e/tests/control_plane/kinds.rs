//! Every kind, as far as it goes without nodes: the operator runs on this machine with the rights of its own account, the
//! cluster's controllers do their part, and what nodes would say is said for them.
use std::{fs::File, path::PathBuf, process::Stdio};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{apps::v1::Deployment, batch::v1::Job, core::v1::Pod};
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
};
use lathe_contract::{
    CheckDataReport, Failure, InspectReport, Metric, ModelShapeReport, Outcome, Score, TrainProgress,
    WeightBytes,
};
use lathe_e2e::{RELEASE_NAMESPACE, Session, kubectl, node, poll, programs};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::autoscaler;

const NAMESPACE: &str = "lathe-kinds";
const DIGEST: &str = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

#[tokio::test]
async fn every_kind_goes_as_far_as_it_can_without_nodes() -> Result<()> {
    let session = Session::begin(NAMESPACE).await?;
    kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "deploy/lathe.yaml"])?;
    let operator = Operator::start()?;
    let ended = session.run(story(&session)).await;
    if ended.is_err() {
        operator.explain();
    }
    ended?;
    session.end().await?;
    kubectl(&["delete", "-f", "deploy/lathe.yaml"]).map(drop)
}

/// The operator of this checkout, which ends with this.
struct Operator {
    _process: Child,
    log: PathBuf,
}

impl Operator {
    fn start() -> Result<Self> {
        let folder = programs::folder()?;
        let (config, log) = (folder.join("operator.kubeconfig"), folder.join("operator.log"));
        std::fs::write(&config, own_account()?.to_string())?;
        let output = File::create(&log)?;
        let process = Command::new(programs::program("lathe-operator")?)
            .args(["--worker-image", "worker", "--listen", "127.0.0.1:0"])
            .args(["--release-namespace", RELEASE_NAMESPACE])
            .env("KUBECONFIG", config)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { _process: process, log })
    }

    fn explain(&self) {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        eprintln!("---- operator: {}\n{text}", self.log.display());
    }
}

/// The tests' kubeconfig with the rights of the operator's ServiceAccount, so that a right which it lacks is missed.
fn own_account() -> Result<Value> {
    let path = std::env::var("KUBECONFIG").context("set KUBECONFIG")?;
    let mut config: Value = serde_saphyr::from_str(&std::fs::read_to_string(path)?)?;
    let token = kubectl(&["create", "token", "lathe-operator", "--namespace", RELEASE_NAMESPACE])?;
    let users = config["users"].as_array_mut().context("no users")?;
    users.iter_mut().for_each(|user| user["user"] = json!({"token": token.trim()}));
    Ok(config)
}

async fn story(session: &Session) -> Result<()> {
    a_model_is_inspected(session).await?;
    a_job_trains(session).await?;
    a_service_is_made_and_scaled(session).await?;
    columns_and_descriptions_answer_what_people_ask()
}

fn columns_and_descriptions_answer_what_people_ask() -> Result<()> {
    for (kind, columns) in [
        ("models.lathe.dev", "NAME ARCHITECTURE PARAMETERS SIZE READY REASON AGE"),
        ("finetunejobs", "NAME MODEL METHOD PROGRESS LOSS TOKENS/S SUCCEEDED REASON AGE"),
        ("inferenceservices.lathe.dev", "NAME MODEL REPLICAS TOKENS/S READY REASON URL AGE"),
    ] {
        let table = kubectl(&["get", kind, "--namespace", NAMESPACE])?;
        let header: Vec<&str> = table.lines().next().unwrap_or_default().split_whitespace().collect();
        ensure!(header.join(" ") == columns && table.lines().count() > 1, "{table}");
    }
    let jobs = kubectl(&["get", "finetunejobs", "--namespace", NAMESPACE])?;
    ensure!(jobs.contains("lora") && jobs.contains("True") && jobs.contains("Tuned"), "{jobs}");
    for (field, words) in [
        ("finetunejobs.spec.training.learningRate", "Peak learning rate"),
        ("finetunejobs.status.plan", "memory"),
        ("inferenceservices.lathe.dev.status.replicas", "autoscalers"),
    ] {
        let explained = kubectl(&["explain", field])?;
        ensure!(explained.contains(words), "{explained}");
    }
    Ok(())
}

async fn a_model_is_inspected(session: &Session) -> Result<()> {
    session.apply(&claim("data")).await?;
    session.apply(&model("base")).await?;
    session.apply(&model("pickle")).await?;
    node::waiting(session, "base-inspect").await?;
    let waits = session.reason("Model", "base", "Ready", "Unknown", "Unschedulable").await?;
    ensure!(waits.starts_with("no node takes the pod: no nodes available"), "{waits}");
    node::end(session, "base-inspect", Outcome::Inspected(base())).await?;
    let ready = session.wait("Model", "base", "Ready", "True").await?;
    ensure!(ready["status"]["architecture"] == "LlamaForCausalLM", "{:#}", ready["status"]);

    let failure = Failure {
        reason: "PickleRefused".to_owned(),
        message: "model.bin is a pickle. Next: convert it.".to_owned(),
        user_error: true,
    };
    node::end(session, "pickle-inspect", Outcome::Failed(failure)).await?;
    let said = session.reason("Model", "pickle", "Stalled", "True", "PickleRefused").await?;
    ensure!(said == "model.bin is a pickle. Next: convert it.", "{said}");
    Ok(())
}

async fn a_job_trains(session: &Session) -> Result<()> {
    session.apply(&tuning()).await?;
    let checked = CheckDataReport {
        format: "Chat".to_owned(),
        rows: 400,
        tokens: 12_000,
        digest: DIGEST.to_owned(),
        ..CheckDataReport::default()
    };
    node::end(session, "tune-check-data", Outcome::DataChecked(checked)).await?;
    session.reason("FineTuneJob", "tune", "DatasetValid", "True", "Checked").await?;
    let first = node::waiting(session, "tune-1").await?;
    let waits = session.reason("FineTuneJob", "tune", "Scheduled", "False", "AcceleratorUnavailable").await?;
    ensure!(waits.contains("no nodes available") && waits.contains("Next: "), "{waits}");

    // Held back: the Job's controller takes the pod away, and makes another one afterwards.
    let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
    let suspend = |value: bool| Patch::Merge(json!({"spec": {"suspend": value}}));
    jobs.patch("tune", &PatchParams::default(), &suspend(true)).await?;
    session.reason("FineTuneJob", "tune", "Training", "False", "Suspended").await?;
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    poll("the pod to be gone", || async { Ok(pods.get_opt(&first).await?.is_none().then_some(())) }).await?;
    jobs.patch("tune", &PatchParams::default(), &suspend(false)).await?;

    // Stopped by SIGTERM: made again, and no failure.
    let stopped = node::end(session, "tune-1", Outcome::Stopped { progress: None }).await?;
    let next = node::waiting(session, "tune-1").await?;
    ensure!(next != stopped, "the pod that was stopped is not replaced");
    node::end(session, "tune-1", trained()).await?;
    let children: Api<Job> = Api::namespaced(session.client.clone(), &session.namespace);
    let status = children.get("tune-1").await?.status.unwrap_or_default();
    ensure!(status.failed.unwrap_or(0) == 0, "a stop counts as a failure: {status:?}");

    let done = session.wait("FineTuneJob", "tune", "Succeeded", "True").await?;
    ensure!(done["status"]["attempt"] == 1, "{:#}", done["status"]);
    ensure!(done["status"]["scores"][0]["after"].is_string(), "{:#}", done["status"]);
    node::end(session, "tuned-inspect", Outcome::Inspected(adapter())).await?;
    let tuned = session.wait("Model", "tuned", "Ready", "True").await?;
    ensure!(tuned["spec"]["derivedFrom"]["job"] == "tune", "{:#}", tuned["spec"]);
    Ok(())
}

async fn a_service_is_made_and_scaled(session: &Session) -> Result<()> {
    let service = json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "shop"},
        "spec": {"modelRef": {"name": "base"}, "adapterRefs": [{"name": "tuned"}], "access": "Direct"},
    });
    session.apply(&service).await?;
    let waits =
        session.reason("InferenceService", "shop", "Available", "False", "AcceleratorUnavailable").await?;
    ensure!(waits.contains("no nodes available") && waits.contains("Next: add a node"), "{waits}");
    for (api_version, kind, name) in [
        ("apps/v1", "Deployment", "shop-serve"),
        ("v1", "Service", "shop"),
        ("policy/v1", "PodDisruptionBudget", "shop-serve"),
        ("networking.k8s.io/v1", "NetworkPolicy", "shop-serve"),
    ] {
        let api = session.api(api_version, kind).await?;
        api.get(name).await.with_context(|| format!("{kind} {name}"))?;
    }

    // As `kubectl scale` and autoscalers do.
    let services = session.api("lathe.dev/v1alpha1", "InferenceService").await?;
    let before = services.get_scale("shop").await?;
    let (spec, status) = (before.spec.unwrap_or_default(), before.status.unwrap_or_default());
    ensure!(spec.replicas == Some(1) && status.replicas == 1, "{spec:?} {status:?}");
    let scaled = Patch::Merge(json!({"spec": {"replicas": 3}}));
    services.patch_scale("shop", &PatchParams::default(), &scaled).await?;
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), &session.namespace);
    let selected = ListParams::default().labels(&status.selector.context("no selector")?);
    poll("three pods under the selector of the scale", || async {
        let found = pods.list(&selected).await?.items;
        Ok((found.len() == 3).then_some(()))
    })
    .await?;
    kubectl(&["scale", "inferenceservices.lathe.dev/shop", "--replicas=1", "--namespace", NAMESPACE])?;
    autoscaler::scales(session, &service).await?;
    kubectl(&["delete", "horizontalpodautoscaler", "shop", "--namespace", NAMESPACE])?;
    kubectl(&["scale", "inferenceservices.lathe.dev/shop", "--replicas=0", "--namespace", NAMESPACE])?;
    session.reason("InferenceService", "shop", "Ready", "True", "Stopped").await?;
    let deployments: Api<Deployment> = Api::namespaced(session.client.clone(), &session.namespace);
    let replicas = deployments.get("shop-serve").await?.spec.and_then(|spec| spec.replicas);
    ensure!(replicas == Some(0), "{replicas:?}");
    Ok(())
}

fn claim(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": {
        "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}},
    }})
}

fn model(name: &str) -> Value {
    json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": name},
        "spec": {"source": {"uri": format!("pvc://data/{name}")}}})
}

fn tuning() -> Value {
    json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tune"}, "spec": {
        "baseModelRef": {"name": "base"},
        "dataset": {"train": {"uri": "pvc://data/train.jsonl"}, "holdout": "0.1"},
        "evaluation": {"metrics": ["Perplexity"]},
        "training": {"sequenceLength": 128, "batchTokens": 1024},
        "accelerator": {"profiles": ["cpu"]},
        "output": {"modelName": "tuned"},
    }})
}

/// A small Llama.
fn base() -> InspectReport {
    InspectReport {
        architecture: "LlamaForCausalLM".to_owned(),
        parameters: 1_900_000,
        context_length: 512,
        weights: vec![WeightBytes { precision: "F32".to_owned(), bytes: 7_600_000 }],
        digest: DIGEST.to_owned(),
        shape: ModelShapeReport {
            vocab: 768,
            hidden: 192,
            layers: 4,
            heads: 6,
            kv_heads: 2,
            head_dim: 32,
            intermediate: 512,
            tie_embeddings: true,
            qkv_bias: false,
        },
        ..InspectReport::default()
    }
}

fn adapter() -> InspectReport {
    InspectReport {
        architecture: "LoRA".to_owned(),
        parameters: 100_000,
        rank: 16,
        weights: vec![WeightBytes { precision: "F32".to_owned(), bytes: 400_000 }],
        digest: DIGEST.to_owned(),
        ..InspectReport::default()
    }
}

fn trained() -> Outcome {
    let folder = DIGEST.trim_start_matches("sha256:");
    Outcome::Trained {
        uri: format!("pvc://lathe-artifacts/models/tuned/{folder}"),
        digest: DIGEST.to_owned(),
        dataset_digest: DIGEST.to_owned(),
        scores: vec![Score { metric: Metric::Perplexity, before: Some(9.0), after: Some(3.0) }],
        measured: lathe_contract::Measured::default(),
        progress: TrainProgress { step: 10, steps: 10, tokens: 12_000, ..TrainProgress::default() },
        model: adapter(),
    }
}
