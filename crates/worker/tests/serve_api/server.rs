//! A server of this crate on real sockets, and what tests ask it.
use std::path::{Path, PathBuf};
use std::time::Duration;

use lathe_contract::{
    AdapterRoom, CONTRACT_VERSION, Contract, ModelInput, Mounts, ObjectRef, Precision, Report, ServeTask,
    ServedAdapter, SourceRef, Task, Trust,
};
use lathe_worker::serve::{self, Settings};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::model;

/// Long enough for the slowest machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(120);

pub struct Server {
    pub base: String,
    pub control: String,
    pub stop: CancellationToken,
    pub abort: CancellationToken,
    pub folder: tempfile::TempDir,
    pub client: reqwest::Client,
    pub ended: JoinHandle<i32>,
}

/// The claim `models` of the contract.
pub fn volume(folder: &Path) -> PathBuf {
    folder.join("volume")
}

pub fn source(path: &str) -> SourceRef {
    SourceRef { uri: format!("pvc://models/{path}"), revision: None, digest: None, secret_dir: None }
}

pub fn adapter(id: &str, path: &str) -> ServedAdapter {
    ServedAdapter {
        model_id: id.into(),
        model: ModelInput { name: id.into(), source: source(path), inspected: None },
    }
}

/// A contract to serve the model `base`, at most 4 sequences at a time and 4 waiting.
pub fn contract(folder: &Path) -> Contract {
    let claims = [("models".to_owned(), volume(folder).display().to_string())].into();
    Contract {
        version: CONTRACT_VERSION,
        object: ObjectRef {
            kind: "InferenceService".into(),
            namespace: "n".into(),
            name: "s".into(),
            uid: "uid-1".into(),
        },
        trust: Trust::default(),
        mounts: Mounts { claims, cache: folder.join("cache").display().to_string(), cache_bytes: None },
        task: Task::Serve(ServeTask {
            model_id: "base".into(),
            model: ModelInput { name: "base".into(), source: source("base"), inspected: None },
            adapters: vec![],
            // The spare ones alone.
            adapter_room: AdapterRoom { slots: 0, rank: 32 },
            weights: Precision::Float32,
            context_length: model::CONTEXT as i64,
            max_sequences: 4,
            max_waiting: 4,
            cache_tokens: 4 * model::CONTEXT as i64,
            direct: true,
            drain_seconds: 60,
        }),
    }
}

/// Starts a server on free ports; `change` is made to the usual contract, in whose folder the model `base` lies.
pub async fn start(change: impl FnOnce(&mut Contract, &mut ServeTask)) -> Server {
    let server = launch(change).await;
    server.until_ready().await;
    server
}

/// As [`start`], without waiting for readiness.
pub async fn launch(change: impl FnOnce(&mut Contract, &mut ServeTask)) -> Server {
    let folder = tempfile::tempdir().expect("a folder");
    model::write_model(&volume(folder.path()).join("base"), 1, &[]);
    launch_in(folder, change).await
}

/// As [`launch`], in a folder that is prepared.
pub async fn launch_in(
    folder: tempfile::TempDir,
    change: impl FnOnce(&mut Contract, &mut ServeTask),
) -> Server {
    let mut contract = contract(folder.path());
    let Task::Serve(mut task) = contract.task.clone() else { unreachable!() };
    change(&mut contract, &mut task);
    contract.task = Task::Serve(task);
    let addr_file = folder.path().join("addresses");
    let loopback = "127.0.0.1:0".parse().expect("an address");
    let settings = Settings {
        serve_addr: Some(loopback),
        control_addr: Some(loopback),
        control_port: 0,
        addr_file: Some(addr_file.clone()),
        summary: folder.path().join("summary"),
        collector: None,
    };
    let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
    let ended = tokio::spawn(serve::run(contract, settings, stop.clone(), abort.clone()));
    let told: Value = until("the addresses are told", async || {
        serde_json::from_slice(&std::fs::read(&addr_file).ok()?).ok()
    })
    .await;
    let url = |field: &str| format!("http://{}", told[field].as_str().expect("an address"));
    let (base, control) = (url("serveAddr"), url("controlAddr"));
    Server { base, control, stop, abort, folder, client: client(), ended }
}

pub fn client() -> reqwest::Client {
    // Another test may have done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().expect("a client")
}

/// Asks again and again until there is an answer.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("in vain: {what}"))
}

impl Server {
    pub async fn until_ready(&self) {
        until("it is ready", async || (self.ready().await == 200).then_some(())).await;
    }

    pub async fn ready(&self) -> u16 {
        let asked = self.client.get(format!("{}/readyz", self.control)).send().await;
        asked.map_or(0, |answer| answer.status().as_u16())
    }

    pub fn request(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        self.client.post(format!("{}{path}", self.base)).json(body)
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.request(path, body).send().await.expect("an answer");
        let status = answer.status().as_u16();
        (status, answer.json().await.expect("JSON"))
    }

    /// A completion that must succeed.
    pub async fn complete(&self, body: Value) -> Value {
        let (status, answer) = self.post("/v1/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The text of a greedy completion.
    pub async fn greedy(&self, model: &str, prompt: &str, tokens: usize) -> String {
        let body = json!({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": tokens});
        self.complete(body).await["choices"][0]["text"].as_str().expect("text").to_owned()
    }

    /// A stream, whose head has come.
    pub async fn stream(&self, path: &str, mut body: Value) -> Stream {
        body["stream"] = json!(true);
        let response = self.request(path, &body).send().await.expect("an answer");
        assert_eq!(response.status().as_u16(), 200);
        Stream { response, pending: Vec::new() }
    }

    /// A stream that goes on for long, once its first token has come.
    pub async fn long_stream(&self, model: &str) -> Stream {
        let body =
            json!({"model": model, "prompt": "long", "max_tokens": 4000, "ignore_eos": true, "seed": 3});
        let mut stream = self.stream("/v1/completions", body).await;
        stream.next().await.expect("an event");
        stream
    }

    pub async fn report(&self) -> Report {
        let answer = self.client.get(format!("{}/v1/report", self.control)).send().await.expect("an answer");
        Report::parse(&answer.bytes().await.expect("a body")).expect("a report")
    }

    pub async fn put_adapters(&self, adapters: &[ServedAdapter]) -> (u16, Value) {
        let request = self.client.put(format!("{}/v1/adapters", self.control));
        let answer = request.json(&json!({"adapters": adapters})).send().await.expect("an answer");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    /// The value of a metric, by the beginning of its line.
    pub async fn metric(&self, start: &str) -> f64 {
        let answer = self.client.get(format!("{}/metrics", self.base)).send().await.expect("an answer");
        let text = answer.text().await.expect("text");
        let line = text.lines().find(|line| line.starts_with(start));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.unwrap_or_else(|| panic!("no {start} in {text}"))
    }

    pub async fn until_metric(&self, start: &str, wanted: f64) {
        until(start, async || (self.metric(start).await == wanted).then_some(())).await;
    }
}

/// Server-sent events.
pub struct Stream {
    response: reqwest::Response,
    pending: Vec<u8>,
}

impl Stream {
    /// The data of the next event; `None` at the end.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.pending.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.pending.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("UTF-8");
                match event.trim_end().strip_prefix("data: ") {
                    Some(data) => return Some(data.to_owned()),
                    None => continue,
                }
            }
            let chunk = self.response.chunk().await.expect("a whole body")?;
            self.pending.extend_from_slice(&chunk);
        }
    }

    /// All events to the end.
    pub async fn rest(mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// The text of a whole stream that must end well, and its last `finish_reason`.
pub fn joined(events: &[String]) -> (String, String) {
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{events:?}");
    let (mut text, mut finish) = (String::new(), String::new());
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event).expect("JSON");
        let Some(choice) = event["choices"].get(0) else { continue };
        text += choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
        finish += choice["finish_reason"].as_str().unwrap_or_default();
    }
    (text, finish)
}
