//! Models that cannot be read.
use serde_json::{Value, json};

use crate::Bad;

/// A person must act.
const REFUSED: &[(&str, &str)] = &[("Ready", "False"), ("Stalled", "True")];
/// It may pass by itself.
const WAITS: &[(&str, &str)] = &[("Ready", "Unknown"), ("Reconciling", "True")];

/// All of them.
pub fn bad() -> Vec<Bad> {
    let at = |path: &str| json!({"uri": format!("pvc://quickstart/{path}")});
    let pinned = json!({"uri": "pvc://quickstart/model", "digest": format!("sha256:{}", "0".repeat(64))});
    vec![
        model(
            "missing",
            at("nowhere"),
            REFUSED,
            "NotFound",
            "model: pvc://quickstart/nowhere does not exist; check the path below the claim and that its writer has finished. Next: correct `uri` or put the files there.",
        ),
        model(
            "no-claim",
            json!({"uri": "pvc://nobody/model"}),
            WAITS,
            "VolumeNotFound",
            "0/1 nodes are available: persistentvolumeclaim \"nobody\" not found. Next: make the PersistentVolumeClaim, or correct the `pvc://` address.",
        ),
        model(
            "locked",
            at("bad/locked"),
            REFUSED,
            "Unauthorized",
            "model: access to /lathe/volumes/quickstart/bad/locked was refused. Next: let the pod's user or fsGroup read and write it.",
        ),
        model(
            "no-model",
            at("bad/no-model"),
            REFUSED,
            "NothingToFetch",
            "model: pvc://quickstart/bad/no-model holds no file that Lathe reads; it reads config.json, * and *.jsonl. Next: correct `uri` or put the files there.",
        ),
        model(
            "garbled",
            at("bad/garbled"),
            REFUSED,
            "MalformedModel",
            "config.json: is not valid JSON: EOF while parsing an object at line 1 column 1. Next: replace the model's files.",
        ),
        model(
            "mamba",
            at("bad/mamba"),
            REFUSED,
            "UnsupportedArchitecture",
            "config.json: architecture MambaForCausalLM is not supported; supported architectures are LlamaForCausalLM, Qwen2ForCausalLM and MistralForCausalLM. Next: choose a model of a supported architecture.",
        ),
        model(
            "cut",
            at("bad/cut"),
            REFUSED,
            "Malformed",
            "model: model.safetensors is malformed: its tensors end at byte 6888192 of 3442076. Next: replace the damaged file.",
        ),
        model(
            "swollen",
            at("bad/swollen"),
            REFUSED,
            "Malformed",
            "model: model.safetensors is malformed: it does not begin with a safetensors header that fits the file's size. Next: replace the damaged file.",
        ),
        model(
            "lying",
            at("bad/lying"),
            REFUSED,
            "Malformed",
            "model: model.safetensors is malformed: tensor model.embed_tokens.weight: offsets 0..589824 do not fit shape [769, 192] of F32. Next: replace the damaged file.",
        ),
        model(
            "misshapen",
            at("bad/misshapen"),
            REFUSED,
            "MalformedModel",
            "tensor `model.layers.4.input_layernorm.weight` is missing. Next: replace the model's files.",
        ),
        model(
            "pickle",
            at("bad/pickle"),
            REFUSED,
            "PickleRefused",
            "model: pvc://quickstart/bad/pickle holds weights only as pickle (pytorch_model.bin), which can run code when read and is never opened; use safetensors (convert with `safetensors.torch.save_file`). Next: convert the weights to safetensors.",
        ),
        model(
            "disguised",
            at("bad/disguised"),
            REFUSED,
            "PickleRefused",
            "model: the source holds weights only as pickle (model.safetensors), which can run code when read and is never opened; use safetensors (convert with `safetensors.torch.save_file`). Next: convert the weights to safetensors.",
        ),
        model(
            "pinned",
            pinned,
            REFUSED,
            "DigestMismatch",
            "model: digest mismatch: `digest` pins sha256:0000000000000000000000000000000000000000000000000000000000000000, the content has sha256:*; the source has changed, or the pin is of another one. Next: restore the files, or make the Model again where the change is meant (or correct its `digest`).",
        ),
    ]
}

/// One whose headers are right and whose numbers are not: only a training finds that.
pub fn poisoned() -> Value {
    object("poisoned", json!({"uri": "pvc://quickstart/bad/poisoned"}))
}

fn model(
    name: &str,
    source: Value,
    conditions: &'static [(&'static str, &'static str)],
    reason: &'static str,
    message: &'static str,
) -> Bad {
    Bad { object: object(name, source), conditions, reason, message }
}

fn object(name: &str, source: Value) -> Value {
    json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": name},
        "spec": {"source": source}})
}
