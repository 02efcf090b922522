//! What we write is what Python's `peft` reads: it starts from our adapter, trains as we do, and ends where we end.
//! Needs Python with torch: `cargo test -p lathe-engine --test hf_peft -- --ignored`.
#![allow(clippy::unwrap_used)]

mod hf;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use hf::{BASE, folder, hyper, json, load, lora, numbers, rows, trainer};
use lathe_engine::files::{read_adapter, write_adapter};
use lathe_engine::plan::{Precision, TrainMethod};
use serde_json::{Value, json};

const STEPS: usize = 5;

/// The interpreter of the reference environment, made on first use.
fn python() -> PathBuf {
    let setup = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/python/setup.py");
    let made = Command::new("python3").arg(setup).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    PathBuf::from(String::from_utf8(made.stdout).unwrap().trim())
}

#[test]
#[ignore = "needs Python with torch, see tests/python/setup.py"]
fn peft_loads_what_we_write_and_trains_as_we_do() {
    let dir = tempfile::tempdir().unwrap();
    let (model, shape) = load(BASE, Precision::F32);
    let mut settings = json(BASE, "training-lora.json");
    let rows = rows(&settings);
    let changes = [
        ("steps", json!(STEPS)),
        ("total_steps", json!(6)),
        ("warmup_steps", json!(2)),
        ("schedule", json!("cosine")),
    ];
    for (name, value) in changes {
        settings[name] = value;
    }
    let lora = lora();
    let mut trainer = trainer(model, TrainMethod::Lora(lora.clone()), hyper(&settings));
    let mut losses = Vec::new();
    for (name, steps) in [("start", 0), ("end", STEPS)] {
        for _ in 0..steps {
            losses.push(trainer.step(&rows).unwrap().loss);
        }
        let adapter = trainer.adapter().unwrap().unwrap();
        let out = dir.path().join(name);
        std::fs::create_dir(&out).unwrap();
        write_adapter(&out, &adapter, Some(BASE), &BTreeMap::new()).unwrap();
        let (config, read) = read_adapter(&out, &shape).unwrap();
        assert_eq!((config.lora, read), (lora.clone(), adapter));
    }
    let ours = trainer.log_probs(&rows).unwrap();

    let task = json!({
        "base": folder(BASE), "start": dir.path().join("start"), "end": dir.path().join("end"),
        "rows": rows.iter().map(|row| &row.tokens).collect::<Vec<_>>(),
        "weights": rows.iter().map(|row| &row.weights).collect::<Vec<_>>(),
        "settings": settings,
    });
    let script = folder("..").join("check_peft.py");
    let done = Command::new(python()).arg(script).arg(task.to_string()).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let theirs: Value = serde_json::from_slice(&done.stdout).unwrap();

    for (step, (ours, theirs)) in losses.iter().zip(numbers(&theirs, "losses")).enumerate() {
        assert!((ours - theirs).abs() < 1e-4 * theirs, "step {step}: loss {ours} instead of {theirs}");
    }
    let log_probs: Vec<Vec<f64>> = serde_json::from_value(theirs["log_probs"].clone()).unwrap();
    for ((row, ours), theirs) in rows.iter().zip(&ours).zip(&log_probs) {
        // `theirs` has no value for the first token.
        for ((weight, ours), theirs) in row.weights.iter().zip(ours).skip(1).zip(theirs) {
            let close = *weight == 0.0 || (f64::from(*ours) - theirs).abs() < 1e-3;
            assert!(close, "log-probability {ours} instead of {theirs}");
        }
    }
    let apart = theirs["apart"].as_f64().unwrap();
    assert!(apart < 0.02, "after training the adapters are {apart} of their way apart");
}
