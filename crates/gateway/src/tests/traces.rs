//! One request is one trace, from its client to the engine.
use std::collections::BTreeMap;

use lathe_telemetry::Traces;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use rstest::rstest;
use serde_json::{Value, json};

use super::collector::{Collector, Span};
use super::replica::{Act, Replica, completion, error, events};
use super::rig::{Rig, Setup, soon, start, start_with};
use super::worker::Worker;
use crate::hold::HoldBounds;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn traceparent(sampled: bool) -> String {
    format!("00-{TRACE}-{PARENT}-0{}", u8::from(sampled))
}

async fn traced(replica: &Replica) -> (Rig, Collector, Traces) {
    let collector = Collector::start().await;
    let traces = Traces::start("lathe-gateway", &collector.url).unwrap();
    let setup = Setup { tracer: Some(traces.tracer()), ..Setup::default() };
    (start_with(&[replica.address], setup).await, collector, traces)
}

fn question() -> Value {
    json!({"model": "support", "prompt": "a confession", "max_tokens": 10})
}

fn named<'a>(spans: &'a [Span], program: &str, name: &str) -> &'a Span {
    let found: Vec<_> = spans.iter().filter(|span| span.program == program && span.name == name).collect();
    assert_eq!(found.len(), 1, "{program} {name} in {spans:#?}");
    found[0]
}

fn attributes(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[rstest]
#[case::whole(false)]
#[case::stream(true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_one_trace_over_gateway_worker_and_engine(#[case] stream: bool) {
    let collector = Collector::start().await;
    let traces = Traces::start("lathe-gateway", &collector.url).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start_with(folder.path(), Some(collector.url.clone())).await;
    let setup = Setup { tracer: Some(traces.tracer()), ..Setup::default() };
    let rig = start_with(&[worker.address], setup).await;
    let body = json!({
        "model": "support", "messages": [{"role": "user", "content": "a confession"}], "max_tokens": 20,
        "ignore_eos": true, "stream": stream,
    });
    let request = rig.client.post(format!("{}/v1/chat/completions", rig.url));
    let request = request.bearer_auth(lathe_contract::new_key([1; 32]).0).json(&body);
    let request = request.header("traceparent", traceparent(true)).header("tracestate", "vendor=1");
    let answer = soon(request.send()).await.unwrap();
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert!(id.starts_with(&format!("req_{TRACE}-")) && id.len() <= 64, "{id}");
    let answer = answer.text().await.unwrap();
    rig.until_idle().await;
    worker.stop.cancel();
    assert_eq!(soon(worker.ended).await.unwrap(), 0);
    traces.end().await;

    let spans = collector.spans();
    let server = named(&spans, "lathe-gateway", "chat team-a/support");
    let asked = named(&spans, "lathe-gateway", "chat support");
    let answered = named(&spans, "lathe-worker", "chat support");
    let parts = ["queue", "prompt", "generation"].map(|part| named(&spans, "lathe-worker", part));
    assert_eq!(spans.len(), 6, "{spans:#?}");
    assert!(spans.iter().all(|span| span.trace == TRACE && !span.failed && span.start <= span.end));
    let chain: Vec<_> =
        [server, asked, answered].iter().map(|span| (span.parent.as_str(), span.kind)).collect();
    assert_eq!(
        chain,
        [
            (PARENT, SpanKind::Server),
            (server.id.as_str(), SpanKind::Client),
            (asked.id.as_str(), SpanKind::Server)
        ]
    );
    assert!([server, answered].iter().all(|span| span.state == "vendor=1"));
    for part in parts {
        assert_eq!((part.parent.as_str(), part.kind), (answered.id.as_str(), SpanKind::Internal));
    }
    // Each begins where the one before it ends; clocks of one machine, read at different moments, differ by microseconds.
    for pair in parts.windows(2) {
        assert!(pair[0].end.abs_diff(pair[1].start) < 5_000_000, "{parts:#?}");
    }

    let tokens =
        ["gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "gen_ai.usage.cache_read.input_tokens"];
    let used = tokens.map(|name| answered.attributes[name].clone());
    assert_eq!((used[1].as_str(), used[2].as_str()), ("20", "0"));
    if !stream {
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(used[0], answer["usage"]["prompt_tokens"].to_string());
        assert_eq!(json!(answered.attributes["gen_ai.response.id"]), answer["id"]);
    }
    let common = [
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.provider.name", "lathe"),
        ("http.response.status_code", "200"),
        (tokens[0], &used[0]),
        (tokens[1], &used[1]),
        (tokens[2], &used[2]),
    ];
    let with = |more: &[(&str, &str)]| attributes(&[&common[..], more].concat());
    let id = answered.attributes["gen_ai.response.id"].as_str();
    let route = ("http.route", "/v1/chat/completions");
    let model = [("gen_ai.request.model", "support"), ("gen_ai.response.model", "support")];
    let full = [("gen_ai.request.model", "team-a/support"), ("gen_ai.response.model", "team-a/support")];
    let (ip, port) = (worker.address.ip().to_string(), worker.address.port().to_string());
    assert_eq!(server.attributes, with(&[route, full[0], full[1]]));
    assert_eq!(asked.attributes, with(&[model[0], ("server.address", &ip), ("server.port", &port)]));
    let end = [("gen_ai.response.id", id), ("gen_ai.response.finish_reasons", "1 of a list")];
    assert_eq!(answered.attributes, with(&[route, model[0], model[1], end[0], end[1]]));

    let everything = String::from_utf8_lossy(&collector.bytes.lock().unwrap()).into_owned();
    let key = lathe_contract::new_key([1; 32]).0;
    for secret in ["confession", key.as_str()] {
        assert!(!everything.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn a_replica_that_is_lost_and_the_one_that_is_asked_next_are_both_in_the_trace() {
    let lost = Replica::start(Act::SaysAndCloses(String::new())).await;
    let collector = Collector::start().await;
    let traces = Traces::start("lathe-gateway", &collector.url).unwrap();
    let setup = Setup { tracer: Some(traces.tracer()), ..Setup::default() };
    let rig = start_with(&[lost.address], setup).await;
    assert_eq!(rig.complete("x").await.0, 502);
    rig.until_idle().await;
    // One that was lost is left alone for a while.
    let drains = Replica::start(Act::Says(error(503, "shutting_down", ""))).await;
    let other = Replica::start(Act::Says(completion("hi"))).await;
    // Which of the two is asked first is chance: the drain is seen where it was the one that drains.
    rig.scale(&[drains.address, other.address], &[]);
    for turn in 0..32 {
        assert_eq!(rig.complete(&format!("{turn}")).await.0, 200);
        if !drains.asked().is_empty() {
            break;
        }
    }
    rig.until_idle().await;
    traces.end().await;
    let spans = collector.spans();
    let failed = &spans[0];
    assert_eq!((failed.name.as_str(), failed.failed), ("text_completion team-a/support", true));
    assert_eq!((failed.attributes["error.type"].as_str(), failed.parent.as_str()), ("502", ""));
    assert_eq!(
        (spans[1].parent.as_str(), spans[1].attributes["error.type"].as_str()),
        (failed.id.as_str(), "reset")
    );
    let drained =
        spans.iter().find(|span| span.attributes.get("error.type").is_some_and(|kind| kind == "503"));
    let drained = drained.unwrap();
    let siblings: Vec<_> = spans.iter().filter(|span| span.parent == drained.parent).collect();
    assert_eq!(siblings.len(), 2);
    assert_eq!(siblings[1].attributes["http.response.status_code"], "200");
    assert_ne!(spans[0].trace, drained.trace);
}

#[tokio::test]
async fn what_is_refused_is_a_span_of_those_alone_who_may_ask() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let (rig, collector, traces) = traced(&replica).await;
    let asked = |key: &str, body: &Value| {
        rig.client.post(format!("{}/v1/completions", rig.url)).bearer_auth(key.to_owned()).json(body).send()
    };
    assert_eq!(asked("nobody", &question()).await.unwrap().status().as_u16(), 401);
    let key = lathe_contract::new_key([1; 32]).0;
    let unknown = json!({"model": "a name that a client made up", "prompt": "x"});
    assert_eq!(asked(&key, &unknown).await.unwrap().status().as_u16(), 404);
    assert_eq!(rig.get("/v1/models").send().await.unwrap().status().as_u16(), 200);
    assert_eq!(rig.get("/v1/completions").send().await.unwrap().status().as_u16(), 405);
    traces.end().await;
    let spans = collector.spans();
    assert_eq!(spans.len(), 1, "{spans:#?}");
    assert_eq!(spans[0].name, "text_completion");
    assert_eq!(
        spans[0].attributes,
        attributes(&[
            ("gen_ai.operation.name", "text_completion"),
            ("gen_ai.provider.name", "lathe"),
            ("http.route", "/v1/completions"),
            ("http.response.status_code", "404"),
            ("error.type", "model_not_found"),
        ])
    );
}

#[tokio::test]
async fn a_client_that_is_not_sampled_is_not_sampled_here_either() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let (rig, collector, traces) = traced(&replica).await;
    let asked = rig.post(&question()).header("traceparent", traceparent(false)).send().await.unwrap();
    assert_eq!(asked.status().as_u16(), 200);
    drop(asked.bytes().await);
    rig.until_idle().await;
    traces.end().await;
    assert!(collector.spans().is_empty());
    let told = replica.asked()[0].headers["traceparent"].to_str().unwrap().to_owned();
    assert!(told.starts_with(&format!("00-{TRACE}-")) && told.ends_with("-00"), "{told}");
}

#[tokio::test]
async fn a_wait_for_a_replica_is_told_in_the_span() {
    let collector = Collector::start().await;
    let traces = Traces::start("lathe-gateway", &collector.url).unwrap();
    let setup = Setup { tracer: Some(traces.tracer()), autoscaled: true, ..Setup::default() };
    let rig = start_with(&[], setup).await;
    let asking = tokio::spawn(rig.post(&question()).send());
    rig.until_metric("lathe_gateway_requests_held 1").await;
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    rig.scale(&[replica.address], &[]);
    let answer = soon(asking).await.unwrap().unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    drop(answer.bytes().await);
    rig.until_idle().await;
    traces.end().await;
    let spans = collector.spans();
    assert_eq!(spans[0].events, ["held"]);
    assert!(spans[1].events.is_empty() && spans[1].parent == spans[0].id);
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_a_stream_is_told_in_the_span() {
    let replica = Replica::start(Act::SaysAndStalls(events(&["data: 1\n\n"]))).await;
    let (rig, collector, traces) = traced(&replica).await;
    let body = json!({"model": "support", "prompt": "x", "stream": true});
    let mut answer = soon(rig.post(&body).send()).await.unwrap();
    assert_eq!(soon(answer.chunk()).await.unwrap().unwrap(), "data: 1\n\n");
    drop(answer);
    rig.until_idle().await;
    traces.end().await;
    let span = &collector.spans()[0];
    let said = ["http.response.status_code", "error.type"].map(|name| span.attributes[name].as_str());
    assert_eq!((said, span.failed), (["200", "client_left"], true));
}

#[tokio::test]
async fn one_more_than_may_wait_is_told_in_the_span() {
    let collector = Collector::start().await;
    let traces = Traces::start("lathe-gateway", &collector.url).unwrap();
    let holds = HoldBounds { requests: 0, ..Setup::default().holds };
    let setup = Setup { tracer: Some(traces.tracer()), autoscaled: true, holds, ..Setup::default() };
    let rig = start_with(&[], setup).await;
    assert_eq!(rig.post(&question()).send().await.unwrap().status().as_u16(), 429);
    rig.until_idle().await;
    traces.end().await;
    let span = &collector.spans()[0];
    assert_eq!((span.attributes["error.type"].as_str(), span.failed), ("429", true));
}

/// Without a collector the gateway makes no span, and passes on what is one.
#[rstest]
#[case::whole(&traceparent(true), Some(traceparent(true)))]
#[case::broken("00-1-2-01", None)]
#[tokio::test]
async fn a_clients_trace_goes_through(#[case] sent: &str, #[case] expected: Option<String>) {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let rig = start(&[replica.address]).await;
    let asked = rig.post(&question()).header("traceparent", sent).header("tracestate", "a=1").send();
    let asked = asked.await.unwrap();
    let id = asked.headers()["x-request-id"].to_str().unwrap();
    assert_eq!(id.starts_with(&format!("req_{TRACE}-")), expected.is_some(), "{id}");
    let told = &replica.asked()[0].headers;
    assert_eq!(told.get("traceparent").map(|told| told.to_str().unwrap().to_owned()), expected);
    assert_eq!(told.contains_key("tracestate"), expected.is_some());
    assert_eq!(told["x-request-id"], id);
}
