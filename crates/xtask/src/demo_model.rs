//! `cargo xtask demo-model`: makes the model and the data of the quick-start, from nothing.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{command, paths, ui};

/// The committed model may weigh this much.
const MOST_BYTES: u64 = 8_000_000;

/// Train the demo model from random weights with our own worker, and write both into the
/// quick-start's volume.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the command.
///
/// # Errors
/// The worker does not build, or training fails.
pub fn run(_: &Args) -> Result<()> {
    let folder = empty_folder(&paths::cache()?.join("demo-model"))?;
    let step = ui::step("corpus, tokenizer and random weights");
    let mut make = command::cargo();
    make.args(["run", "--quiet", "--package", "lathe-worker", "--example", "demo_model", "--"]);
    command::run(make.arg(&folder))?;
    step.done("");

    let step = ui::step("train from scratch");
    step.expect("about 5 minutes on 2 cores");
    let contract = folder.join("contract.json");
    fs::write(&contract, serde_json::to_vec_pretty(&task(&folder))?)?;
    let mut train = command::cargo();
    train.args(["run", "--quiet", "--package", "lathe-worker", "--", "train", "--contract"]);
    train.arg(&contract).args(["--control-port", "0", "--summary"]).arg(folder.join("summary.json"));
    let ran = train.status().context("cannot start cargo")?;
    ensure!(ran.success(), "training ended with {ran}");
    step.done("");

    let summary: Value = serde_json::from_slice(&fs::read(folder.join("summary.json"))?)?;
    let uri = summary["outcome"]["trained"]["uri"].as_str().context("the summary names no artefact")?;
    let model = folder.join(uri.trim_start_matches("pvc://work/"));
    let wanted = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let volume = paths::quickstart_volume();
    let target = volume.join("model");
    fs::create_dir_all(&target)?;
    let mut bytes = 0;
    for name in wanted {
        bytes += fs::copy(model.join(name), target.join(name))
            .with_context(|| format!("the trained model has no {name}"))?;
    }
    ensure!(bytes <= MOST_BYTES, "the demo model must be at most {MOST_BYTES} bytes (it is {bytes})");
    let data = volume.join("data");
    fs::create_dir_all(&data)?;
    for name in ["train.jsonl", "test.jsonl"] {
        fs::copy(folder.join("data").join(name), data.join(name))?;
    }
    ui::note(&format!("{}: {:.1} MB", target.display(), bytes as f64 / 1e6));
    Ok(())
}

/// What the worker is told: all weights, from random ones, until it knows every answer.
fn task(folder: &Path) -> Value {
    let at = |name: &str| json!({"uri": format!("pvc://work/{name}")});
    json!({
        "version": 1,
        "object": {"kind": "FineTuneJob", "namespace": "local", "name": "demo-model", "uid": "demo-model"},
        "trust": {},
        "mounts": {"claims": {"work": folder}, "cache": folder.join("cache")},
        "task": {"train": {
            "attempt": 1,
            "base": {"name": "random", "source": at("random")},
            "dataset": {"train": at("corpus.jsonl"), "holdout": 0.02, "format": "Chat"},
            "method": {"full": {}},
            "training": {
                "epochs": 60.0, "learningRate": 2e-3, "schedule": "Cosine", "warmup": 0.05,
                "batchTokens": 1024, "microBatchTokens": 1024, "sequenceLength": 128,
                "weightDecay": 0.01, "maxGradNorm": 1.0, "seed": 1,
            },
            "checkpoint": {"intervalSeconds": 600, "keep": 1, "destination": at("checkpoints")},
            "evaluation": {"metrics": ["Perplexity", "ROUGEL"]},
            "output": {"modelName": "shop-base", "destination": at("out")},
        }},
    })
}

/// An empty folder of this name.
fn empty_folder(folder: &Path) -> Result<std::path::PathBuf> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("cannot empty {}: {error}", folder.display())
        }
        _ => fs::create_dir_all(folder)?,
    }
    Ok(folder.to_path_buf())
}
