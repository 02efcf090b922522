//! What is written down of a request, and what never is.
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Arc, Mutex};

use prometheus_client::metrics::counter::Counter;
use serde_json::{Value, json};
use tracing_subscriber::layer::SubscriberExt as _;

use super::replica::{Act, LAST_CHUNK, Replica, completion, events};
use super::rig::{Setup, start_with};
use crate::telemetry::{self, UsageLog};
use crate::testing::service;

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_request_is_a_line_of_numbers_without_a_word_of_its_prompt() {
    let written = Written::default();
    let everything = Written::default();
    let lines = UsageLog::start(written.clone(), Counter::default()).unwrap();
    let all = everything.clone();
    // All that the gateway says at any level, beside the usage log.
    let log = tracing_subscriber::fmt::layer().with_writer(move || all.clone());
    let subscriber = tracing_subscriber::registry().with(telemetry::usage(lines.clone())).with(log);
    let _guard = tracing::subscriber::set_default(subscriber);

    let replica = Replica::start(Act::Says(completion("an answer"))).await;
    let tuned = service("team-a", "support", &["tone"], &["support", "tone"]);
    let setup = Setup { usage_log: true, services: vec![tuned], ..Setup::default() };
    let rig = start_with(&[replica.address], setup).await;
    let body = json!({"model": "tone", "prompt": "a confession", "max_tokens": 10});
    let answer = rig.post(&body).send().await.unwrap();
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    drop(answer.bytes().await.unwrap());
    rig.until_idle().await;
    replica.now(Act::Says(events(&["data: an answer\n\n"]) + LAST_CHUNK));
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let traced = rig.post(&body).header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"));
    drop(traced.send().await.unwrap().bytes().await.unwrap());
    rig.until_idle().await;

    lines.finish();
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "{text}");
    let fields: BTreeSet<&str> = lines[0].as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "timestamp",
        "target",
        "key",
        "namespace",
        "model",
        "status",
        "request_id",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "estimated",
        "first_byte_ms",
        "total_ms",
    ];
    assert_eq!(fields, expected.into());
    // By it the line, what the client saw and what the worker logs are joined.
    assert_eq!(
        (&lines[0]["request_id"], &replica.asked()[0].headers["x-request-id"]),
        (&json!(id), &id.parse().unwrap())
    );
    assert!(id.starts_with("req_") && lines[1]["request_id"] != lines[0]["request_id"]);
    let told = |line: &Value| {
        ["key", "namespace", "model", "status", "prompt_tokens", "cached_tokens", "completion_tokens"]
            .map(|field| line[field].clone())
    };
    assert_eq!(json!(told(&lines[0])), json!(["k", "team-a", "tone", 200, 7, 0, 3]));
    assert_eq!(json!(told(&lines[1])), json!(["k", "team-a", "tone", 200, 11, 8, 5]));
    assert_eq!(lines[1]["trace_id"], trace);
    assert!(lines[1]["request_id"].as_str().unwrap().starts_with(&format!("req_{trace}-")));

    let everything = String::from_utf8(everything.0.lock().unwrap().clone()).unwrap();
    let key = lathe_contract::new_key([1; 32]).0;
    for secret in ["confession", "an answer", key.as_str()] {
        assert!(!text.contains(secret) && !everything.contains(secret), "{secret}");
    }
}
