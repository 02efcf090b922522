//! The page: its files and its API as a client sees them, and the whole of it in a real Chromium.
mod api;
mod chromium;

use lathe_api::{FineTuneJob, InferenceService};
use lathe_contract::{CURVES_PATH, JobCurve, JobCurves, Scope, Signer, TRAFFIC_AUDIENCE};
use serde_json::{Value, json};

use super::replica::{LAST_CHUNK, events};
use super::rig::{Rig, Setup};
use crate::testing::{job, object, service};

/// Two tenants: `k` of team-a, `b` of team-b, and `few`, which may use team-a's `tone` alone.
fn tenants() -> Setup {
    Setup {
        more_keys: vec![("b", json!({"namespace": "team-b"})), ("few", json!({"models": ["tone"]}))],
        services: vec![
            with_status(service("team-a", "support", &["tone"], &["support", "tone"]), working()),
            with_status(service("team-a", "summaries", &[], &[]), waiting()),
            service("team-b", "secret-plans", &[], &["secret-plans"]),
        ],
        jobs: vec![
            job("team-a", "tone", tuned()),
            job(
                "team-a",
                "later",
                json!({"conditions": [condition("Succeeded", "Unknown", "Training", "Training: 120 of 300 steps.")]}),
            ),
            job("team-b", "secret-job", json!({})),
        ],
        ..Setup::default()
    }
}

fn with_status(service: InferenceService, status: Value) -> InferenceService {
    let mut value = serde_json::to_value(service).unwrap();
    for (field, said) in status.as_object().unwrap() {
        value["status"][field] = said.clone();
    }
    object(value)
}

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1})
}

fn working() -> Value {
    json!({
        "conditions": [condition("Ready", "True", "Ready", "2 replicas answer.")],
        "replicas": 3, "readyReplicas": 2,
        "throughput": {"prompt": "1240", "generation": "87.5", "waiting": 4},
        "decisions": [
            {"time": "2026-01-01T10:00:00Z", "from": 0, "to": 1, "reason": "HeldRequest", "message": "1 request is held."},
            {"time": "2026-01-01T10:05:00Z", "from": 1, "to": 3, "reason": "AboveTarget", "message": "190 of 210 tokens/s are used."},
        ],
    })
}

fn waiting() -> Value {
    let why = "Waiting for an accelerator: 0 of 3 nvidia-h200 free; free one, or allow profile nvidia-l40s.";
    json!({"conditions": [condition("Ready", "False", "Unschedulable", why)], "replicas": 1})
}

fn tuned() -> Value {
    json!({
        "conditions": [condition("Succeeded", "True", "Succeeded", "Measured and saved.")],
        "progress": {"summary": "300/300 100%", "step": 300, "steps": 300, "tokens": 90000, "tokensPerSecond": "310", "loss": "0.4120"},
        "scores": [{"metric": "Perplexity", "before": "21.5", "after": "3.25"}, {"metric": "ROUGEL", "before": "0.11", "after": "0.72"}],
    })
}

/// A job as it goes on.
fn at_step(step: i64) -> FineTuneJob {
    let loss = 0.4 + 3.0 * f64::exp(-0.02 * step as f64);
    job(
        "team-a",
        "later",
        json!({
            "conditions": [condition("Succeeded", "Unknown", "Training", &format!("Training: {step} of 300 steps."))],
            "progress": {"summary": "", "step": step, "steps": 300, "tokens": 300 * step, "tokensPerSecond": "310", "loss": format!("{loss:.4}"), "remaining": "9m40s"},
        }),
    )
}

/// The losses of that job after every fifth step.
fn losses_until(step: i64) -> Vec<(i64, f64)> {
    (5..=step).step_by(5).map(|step| (step, 0.4 + 3.0 * f64::exp(-0.02 * step as f64))).collect()
}

/// Hands them over as the operator does.
async fn hand_over(rig: &Rig, token: Option<&str>, body: String) -> u16 {
    let mut request = rig.client.put(format!("{}{CURVES_PATH}", rig.admin)).body(body);
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    request.send().await.unwrap().status().as_u16()
}

async fn plot(rig: &Rig, points: Vec<(i64, f64)>) {
    let uid = at_step(1).metadata.uid.unwrap();
    let curve = JobCurve { namespace: "team-a".to_owned(), name: "later".to_owned(), uid, points };
    let body = serde_json::to_string(&JobCurves { curves: vec![curve] }).unwrap();
    assert_eq!(hand_over(rig, Some(&operators_token(Scope::Curves)), body).await, 204);
}

fn operators_token(scope: Scope) -> String {
    Signer::from_seed(&[4; 32]).sign(TRAFFIC_AUDIENCE, scope, jiff::Timestamp::now().as_second())
}

/// Events of a chat whose answer comes in these pieces.
fn chat(pieces: &[&str]) -> Vec<String> {
    let event = |value: Value| format!("data: {value}\n\n");
    let piece = |text: &&str| {
        event(json!({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}))
    };
    pieces.iter().map(piece).collect()
}

/// A whole streamed answer with its usage.
fn whole_chat(pieces: &[&str]) -> String {
    let mut all = chat(pieces);
    let usage =
        json!({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}});
    all.extend([format!("data: {usage}\n\n"), "data: [DONE]\n\n".to_owned()]);
    events(&all.iter().map(String::as_str).collect::<Vec<_>>()) + LAST_CHUNK
}
