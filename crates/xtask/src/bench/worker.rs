//! The real worker, as a process, with the contract that a pod would be given.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::ask;
use super::models::Model;
use super::process::Watched;

const START: Duration = Duration::from_secs(180);

/// A worker that runs.
pub struct Worker {
    /// Its process.
    pub process: Watched,
    addresses: PathBuf,
}

impl Worker {
    /// Starts `program NAME` in an empty `folder`, which is the claim `work`; the model's is the claim `model`.
    ///
    /// # Errors
    /// The folder cannot be written, or the program does not start.
    pub fn start(program: &Path, folder: &Path, model: &Model, name: &str, task: &Value) -> Result<Self> {
        let contract = json!({
            "version": 1,
            "object": {"kind": "Bench", "namespace": "local", "name": "bench", "uid": "bench"},
            "trust": {},
            "mounts": {"claims": {"work": folder, "model": model.folder}, "cache": folder.join("cache")},
            "task": {name: task},
        });
        fs::write(folder.join("contract.json"), serde_json::to_vec_pretty(&contract)?)?;
        let addresses = folder.join("addresses.json");
        let mut command = Command::new(program);
        command.arg(name).arg("--contract").arg(folder.join("contract.json"));
        command.args(["--control-addr", "127.0.0.1:0"]).arg("--addr-file").arg(&addresses);
        command.arg("--summary").arg(folder.join("summary.json")).env("RUST_LOG", "warn");
        if name == "serve" {
            command.args(["--serve-addr", "127.0.0.1:0"]);
        }
        Ok(Self { process: Watched::start(&mut command, &folder.join("log"))?, addresses })
    }

    /// Where it listens: `controlAddr` or `serveAddr`.
    ///
    /// # Errors
    /// It ends before it has said so.
    pub fn address(&mut self, which: &str) -> Result<String> {
        let file = self.addresses.clone();
        self.process.wait_for("the worker's address", START, || {
            let told: Value = serde_json::from_slice(&fs::read(&file).ok()?).ok()?;
            Some(told[which].as_str()?.to_owned())
        })
    }

    /// Waits until the report's progress says so many steps. Returns the tokens until then, and when that was seen.
    ///
    /// # Errors
    /// It ends before.
    pub fn steps(&mut self, report: &str, steps: i64, patience: Duration) -> Result<(i64, Instant)> {
        let agent = ask::agent(Duration::from_secs(10));
        self.process.wait_for("training", patience, || {
            let progress = ask::get(&agent, report).ok()?["progress"].take();
            let tokens = progress["tokens"].as_i64()?;
            (progress["step"].as_i64()? >= steps).then(|| (tokens, Instant::now()))
        })
    }

    /// Waits until it is ready. Returns the seconds since `started`.
    ///
    /// # Errors
    /// It ends before.
    pub fn ready(&mut self, started: Instant) -> Result<f64> {
        let control = self.address("controlAddr")?;
        let agent = ask::agent(Duration::from_secs(10));
        let url = format!("http://{control}/readyz");
        self.process.wait_for("readiness", START, || agent.get(&url).call().ok().map(drop))?;
        Ok(started.elapsed().as_secs_f64())
    }
}

/// What a pod that serves is told of the model's inspection: it need not hash the files again. `folder` is empty.
///
/// # Errors
/// The worker does not inspect the model; the text has its last words.
pub fn inspected(program: &Path, folder: &Path, model: &Model) -> Result<Value> {
    let task = json!({"source": {"uri": "pvc://model/"}});
    let mut worker = Worker::start(program, folder, model, "inspect", &task)?;
    while worker.process.ended()?.is_none() {
        thread::sleep(Duration::from_millis(50));
    }
    let summary = fs::read(folder.join("summary.json")).with_context(|| worker.process.last_words())?;
    let told = &serde_json::from_slice::<Value>(&summary)?["outcome"]["inspected"];
    ensure!(told.is_object(), "the model cannot be inspected:\n{}", worker.process.last_words());
    Ok(json!({"fingerprint": told["fingerprint"], "weightsDigest": told["weightsDigest"]}))
}

/// An empty folder of that name below `parent`.
///
/// # Errors
/// It cannot be emptied or made.
pub fn empty_folder(parent: &Path, name: &str) -> Result<PathBuf> {
    let folder = parent.join(name);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot empty {}", folder.display()))
        }
        _ => {
            fs::create_dir_all(&folder)?;
            Ok(folder)
        }
    }
}
