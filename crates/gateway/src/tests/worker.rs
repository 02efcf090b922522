//! The gateway before real workers.
use std::net::SocketAddr;
use std::path::Path;

use lathe_contract::{
    AdapterRoom, CONTRACT_VERSION, Contract, ModelInput, Mounts, ObjectRef, Precision, ServeTask, Signer,
    SourceRef, Task, Trust,
};
use lathe_worker::serve::{self, Settings};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::replica::Replica;
use super::rig::{Rig, soon, start};

#[allow(dead_code, reason = "shared with the worker's own tests")]
#[path = "../../../worker/tests/serve_api/model.rs"]
mod model;

pub struct Worker {
    pub address: SocketAddr,
    pub stop: CancellationToken,
    pub ended: JoinHandle<i32>,
}

fn contract(folder: &Path) -> Contract {
    let claims = [("models".to_owned(), folder.display().to_string())].into();
    let source =
        SourceRef { uri: "pvc://models/base".into(), revision: None, digest: None, secret_dir: None };
    Contract {
        version: CONTRACT_VERSION,
        object: ObjectRef {
            kind: "InferenceService".into(),
            namespace: "team-a".into(),
            name: "support".into(),
            uid: "uid-team-a-support".into(),
        },
        trust: Trust {
            operator_key: None,
            gateway_key: Some(Signer::from_seed(&[3; 32]).public_pem().unwrap()),
        },
        mounts: Mounts { claims, cache: folder.join("cache").display().to_string(), cache_bytes: None },
        task: Task::Serve(ServeTask {
            model_id: "support".into(),
            model: ModelInput { name: "base".into(), source, inspected: None },
            adapters: vec![],
            adapter_room: AdapterRoom { slots: 0, rank: 8 },
            weights: Precision::Float32,
            context_length: model::CONTEXT as i64,
            max_sequences: 4,
            max_waiting: 16,
            cache_tokens: 4 * model::CONTEXT as i64,
            direct: false,
            drain_seconds: 60,
        }),
    }
}

impl Worker {
    /// One that answers those alone who show a token of the rig's gateway.
    async fn start(folder: &Path) -> Self {
        Self::start_with(folder, None).await
    }

    /// As [`Worker::start`], with a collector of its traces.
    pub async fn start_with(folder: &Path, collector: Option<String>) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        model::write_model(&folder.join("base"), 1, &[]);
        let told = folder.join("addresses");
        let settings = Settings {
            serve_addr: Some(Replica::nobody()),
            control_addr: Some("127.0.0.1:0".parse().unwrap()),
            control_port: 0,
            addr_file: Some(told.clone()),
            summary: folder.join("summary"),
            collector,
        };
        let stop = CancellationToken::new();
        let served = serve::run(contract(folder), settings, stop.clone(), CancellationToken::new());
        let ended = tokio::spawn(served);
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let address = soon(async {
            loop {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                let Ok(told) = std::fs::read(&told) else { continue };
                let told: Value = serde_json::from_slice(&told).unwrap();
                let ready = format!("http://{}/readyz", told["controlAddr"].as_str().unwrap());
                if client.get(ready).send().await.is_ok_and(|answer| answer.status().is_success()) {
                    return told["serveAddr"].as_str().unwrap().parse().unwrap();
                }
            }
        })
        .await;
        Self { address, stop, ended }
    }
}

async fn chat(rig: &Rig, stream: bool) -> (u16, String) {
    let body = json!({
        "model": "team-a/support", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20,
        "ignore_eos": true, "stream": stream,
    });
    let request = rig.client.post(format!("{}/v1/chat/completions", rig.url));
    let answer = request.bearer_auth(lathe_contract::new_key([1; 32]).0).json(&body).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_believes_the_gateway_and_nobody_else_and_tells_it_what_answers_took() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start(folder.path()).await;
    let rig = start(&[worker.address]).await;
    let past = rig.client.post(format!("http://{}/v1/completions", worker.address));
    let past = past.json(&json!({"model": "support", "prompt": "x"})).send().await.unwrap();
    assert_eq!(past.status().as_u16(), 401);

    let (status, text) = chat(&rig, false).await;
    assert_eq!(status, 200, "{text}");
    let whole: Value = serde_json::from_str(&text).unwrap();
    let prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    let (status, text) = chat(&rig, true).await;
    assert!(status == 200 && text.ends_with("data: [DONE]\n\n"), "{status} {text}");
    for (counter, tokens) in [("prompt", 2 * prompt), ("generation", 40)] {
        let labels = r#"key="k",namespace="team-a",model="support",adapter="""#;
        rig.until_metric(&format!("lathe_gateway_{counter}_tokens_total{{{labels}}} {tokens}")).await;
    }
    worker.stop.cancel();
    assert_eq!(soon(worker.ended).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_drains_loses_nobodys_request() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().unwrap();
    let workers = [
        Worker::start(&folder.path().join("first")).await,
        Worker::start(&folder.path().join("second")).await,
    ];
    let rig = std::sync::Arc::new(start(&[workers[0].address, workers[1].address]).await);
    let [first, second] = workers;
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let rig = std::sync::Arc::clone(&rig);
            tokio::spawn(async move {
                for turn in 0..15 {
                    let (status, text) = chat(&rig, client % 2 == 0).await;
                    let whole = if client % 2 == 0 { "data: [DONE]\n\n" } else { "}" };
                    assert!(status == 200 && text.ends_with(whole), "{client} {turn}: {status} {text}");
                }
            })
        })
        .collect();
    rig.until_metric("lathe_gateway_requests_in_flight 4").await;
    first.stop.cancel();
    assert_eq!(soon(first.ended).await.unwrap(), 0);
    for client in clients {
        soon(client).await.unwrap();
    }
    second.stop.cancel();
    assert_eq!(soon(second.ended).await.unwrap(), 0);
}
