//! What a node would say: the last words of pods whose work is short.

use anyhow::Result;
use serde_json::{Value, json};

use super::api::Api;
use crate::bench::models::q05;

/// Ends every pod that inspects or checks and has not ended. Returns how many.
///
/// # Errors
/// The API server refuses it.
pub fn end_short_pods(api: &Api) -> Result<usize> {
    let selector = "lathe.dev/task%20in%20(inspect,check-data)";
    let list = api.get(&format!("/api/v1/pods?resourceVersion=0&labelSelector={selector}"))?;
    let mut ended = 0;
    for pod in list["items"].as_array().into_iter().flatten() {
        if pod["status"]["phase"] != "Pending" {
            continue;
        }
        let path = ["namespace", "name"].map(|key| pod["metadata"][key].as_str().unwrap_or_default());
        let task = &pod["metadata"]["labels"]["lathe.dev/task"];
        let summary = json!({"outcome": if task == "inspect" { inspected() } else { checked() }});
        let path = format!("/api/v1/namespaces/{}/pods/{}/status", path[0], path[1]);
        // One that is gone or has just been changed is met again in the next round, or never.
        if api.merge(&path, &status(&pod["spec"]["containers"][0], &summary)).is_ok() {
            ended += 1;
        }
    }
    Ok(ended)
}

fn status(container: &Value, summary: &Value) -> Value {
    let time = "2026-01-01T00:00:00Z";
    json!({"status": {
        "phase": "Succeeded",
        "containerStatuses": [{
            "name": container["name"], "image": container["image"], "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {
                "exitCode": 0, "reason": "Completed", "message": summary.to_string(), "startedAt": time, "finishedAt": time,
            }},
        }],
    }})
}

fn inspected() -> Value {
    let shape = q05();
    let digest = format!("sha256:{}", "5".repeat(64));
    json!({"inspected": {
        "architecture": "Qwen2ForCausalLM", "parameters": shape.parameters(), "contextLength": shape.max_position,
        "weights": [{"precision": "BF16", "bytes": shape.parameters() * 2}], "digest": digest,
        "license": "", "licenseNeedsAcceptance": false,
        "shape": {
            "vocab": shape.vocab, "hidden": shape.hidden, "layers": shape.layers, "heads": shape.heads,
            "kvHeads": shape.kv_heads, "headDim": shape.head_dim, "intermediate": shape.intermediate,
            "tieEmbeddings": shape.tie_embeddings, "qkvBias": shape.qkv_bias,
        },
    }})
}

fn checked() -> Value {
    json!({"dataChecked": {
        "format": "Chat", "rows": 1000, "tokens": 200_000, "learnedTokens": 100_000, "longestRow": 400,
        "evaluationRows": 50, "digest": format!("sha256:{}", "d".repeat(64)),
    }})
}
