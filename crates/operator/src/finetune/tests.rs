mod recorded;
mod rounds;
mod stages;

use kube::core::DeserializeGuard;
use serde_json::{Value, json};

use super::*;
use crate::testing::{Call, Server, context, filled, object};

const STATUS: &str = "PATCH /apis/lathe.dev/v1alpha1/namespaces/ns/finetunejobs/t/status";

const LIST: &str = "GET /apis/lathe.dev/v1alpha1/namespaces/ns/finetunejobs";

/// What surrounds a job.
#[derive(Default)]
struct World {
    jobs: Vec<Job>,
    pods: Vec<Pod>,
    models: Vec<Model>,
    contracts: Vec<ConfigMap>,
    /// Nobody guards its pods.
    unguarded: bool,
}

/// One round against a scripted API server: its calls, and how it ended.
async fn reconcile(
    job: &FineTuneJob,
    world: World,
    answers: &[(&str, u16, Value)],
) -> (Vec<Call>, Result<Action, Error>) {
    let none = [(LIST, 200, tunes(&[]))];
    let (client, server) = Server::start(&[&none, answers].concat());
    let context = context(client);
    let policy = build::policy(job, &context).expect("a policy");
    let controller = FineTuneJobs {
        policies: filled(if world.unguarded { Vec::new() } else { vec![policy] }),
        contracts: filled(world.contracts),
        context,
        tunes: filled(Vec::new()),
        jobs: filled(world.jobs),
        pods: filled(world.pods),
        models: filled(world.models.into_iter().map(|m| DeserializeGuard(Ok(m))).collect()),
        profiles: filled(profiles().into_iter().map(|p| DeserializeGuard(Ok(p))).collect()),
        claims: filled(Vec::new()),
        written: Memory::default(),
    };
    let done = controller.reconcile(job).await;
    drop(controller);
    (server.calls().await, done)
}

/// The API server's list of jobs.
fn tunes(items: &[FineTuneJob]) -> Value {
    json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJobList", "metadata": {}, "items": items})
}

fn digest(letter: char) -> String {
    format!("sha256:{}", letter.to_string().repeat(64))
}

fn tune(spec: Value, status: Value) -> FineTuneJob {
    let mut job = json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": "t", "namespace": "ns", "uid": "uid-t", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "baseModelRef": {"name": "base"},
            "dataset": {"train": {"uri": "pvc://data/train.jsonl"}, "holdout": "0.1"},
            "accelerator": {"profiles": ["cpu"], "count": 1},
            "output": {"modelName": "out"},
        },
        "status": status,
    });
    json_patch::merge(&mut job["spec"], &spec);
    object(job)
}

fn model(name: &str, over: Value) -> Model {
    let mut model = json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}")},
        "spec": {"source": {"uri": format!("pvc://models/{name}")}},
        "status": {
            "observedGeneration": 1, "architecture": "LlamaForCausalLM", "contextLength": 2048, "digest": digest('b'),
            "weights": [{"precision": "BF16", "bytes": 20_000_000}],
            "shape": {"vocab": 1000, "hidden": 256, "layers": 4, "heads": 4, "kvHeads": 2, "headDim": 64, "intermediate": 512},
            "conditions": [{"type": "Ready", "status": "True", "reason": "Inspected", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        },
    });
    json_patch::merge(&mut model, &over);
    object(model)
}

fn profile(name: &str, spec: Value) -> AcceleratorProfile {
    object(
        json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": name}, "spec": spec}),
    )
}

fn profiles() -> Vec<AcceleratorProfile> {
    vec![
        profile(
            "cpu",
            json!({"resource": "cpu", "runtime": "CPU", "devicesPerNode": 4, "price": {"perHour": "3.6"}}),
        ),
        profile(
            "gpu",
            json!({"resource": "nvidia.com/gpu", "runtime": "CUDA", "memory": "24Gi", "image": "cuda:1"}),
        ),
    ]
}

/// A Job of ours; `over` goes over the whole object.
fn job(name: &str, task: &str, over: Value) -> Job {
    let mut job = json!({
        "metadata": {
            "name": name, "namespace": "ns", "uid": format!("uid-{name}"),
            "labels": {"lathe.dev/kind": "finetunejob", "lathe.dev/name": "t", "lathe.dev/task": task},
            "annotations": {"lathe.dev/profile": "cpu", "lathe.dev/inputs-hash": "aaaabbbbccccdddd"},
            "ownerReferences": [{"apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob", "name": "t", "uid": "uid-t", "controller": true}],
        },
        "spec": {"suspend": false, "template": {}},
    });
    json_patch::merge(&mut job, &over);
    object(job)
}

fn ended(type_: &str) -> Value {
    json!({"status": {"conditions": [{"type": type_, "status": "True", "lastTransitionTime": Timestamp::now().to_string()}]}})
}

fn ended_at(type_: &str, time: &str) -> Value {
    json!({"status": {"conditions": [{"type": type_, "status": "True", "lastTransitionTime": time}]}})
}

fn pod(job: &str, status: Value) -> Pod {
    object(json!({
        "metadata": {"name": format!("{job}-x"), "namespace": "ns", "creationTimestamp": "2026-01-01T00:00:00Z",
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": format!("uid-{job}"), "controller": true}]},
        "spec": {"nodeName": "n", "containers": [{"name": "worker", "resources": {"limits": {"memory": "1Gi"}}}]},
        "status": status,
    }))
}

/// A pod that has said its last words.
fn said(job: &str, code: i32, outcome: Value) -> Pod {
    pod(
        job,
        json!({
            "phase": if code == 0 { "Succeeded" } else { "Failed" }, "startTime": "2026-01-01T00:00:00Z",
            "containerStatuses": [{"name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:01:00Z", "message": json!({"outcome": outcome}).to_string()}}}],
        }),
    )
}

fn checked() -> Value {
    json!({"dataChecked": {"format": "Chat", "rows": 500, "tokens": 20_000, "evaluationRows": 50, "digest": digest('d')}})
}

fn trained(over: Value) -> Value {
    let mut trained = json!({
        "uri": format!("pvc://lathe-artifacts/models/out/{}", "e".repeat(64)), "digest": digest('e'), "datasetDigest": digest('d'),
        "scores": [{"metric": "Perplexity", "before": 20.0, "after": 5.0}],
        "progress": {"step": 30, "steps": 30, "tokens": 60_000, "tokensPerSecond": 1000.0, "loss": 1.25},
        "model": {"architecture": "LoRA", "parameters": 1000},
    });
    json_patch::merge(&mut trained, &over);
    json!({"trained": trained})
}

fn failed(reason: &str) -> Value {
    json!({"failed": {"reason": reason, "message": "what it was. Next: what to do.", "userError": true}})
}

fn failed_for_now(reason: &str) -> Value {
    json!({"failed": {"reason": reason, "message": "what it was. Next: nothing.", "userError": false}})
}

fn condition(status: &lathe_api::FineTuneJobStatus, type_: &str) -> (String, String, String) {
    let c = conditions::find(&status.conditions, type_).expect("a condition");
    (c.status.clone(), c.reason.clone(), c.message.clone())
}
