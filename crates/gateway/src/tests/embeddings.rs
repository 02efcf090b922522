//! Embeddings go the way of every other request.
use serde_json::{Value, json};

use super::collector::Collector;
use super::replica::{Act, Asked, Replica, answer, error};
use super::rig::{Rig, Setup, soon, start, start_with};
use super::worker::Worker;

const PATH: &str = "/v1/embeddings";

/// A vector for each input, of so many tokens.
fn vectors(asked: &Asked) -> String {
    let inputs = asked.body["input"].as_array().map_or(1, Vec::len);
    let item = |index: usize| json!({"object": "embedding", "index": index, "embedding": [0.6, 0.8]});
    let data: Vec<Value> = (0..inputs).map(item).collect();
    let tokens = 4 * inputs;
    let body = json!({
        "object": "list", "data": data, "model": asked.body["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    });
    answer(200, &format!("lathe-usage: prompt={tokens},completion=0,cached=3\r\n"), &body)
}

async fn embed(rig: &Rig, model: &str, input: Value) -> (u16, Value) {
    let body = json!({"model": model, "input": input, "encoding_format": "float"});
    let answer = rig.post_to(PATH, &body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test]
async fn a_worker_is_asked_by_its_own_name_and_the_key_is_charged_with_what_was_read() {
    let replica = Replica::start(Act::Answers(vectors)).await;
    let rig = start(&[replica.address]).await;
    let (status, said) = embed(&rig, "team-a/tone", json!(["a", "b"])).await;
    assert_eq!((status, said["data"].as_array().map(Vec::len)), (200, Some(2)), "{said}");
    let [asked] = replica.asked().try_into().unwrap();
    assert_eq!(asked.path, PATH);
    assert_eq!(asked.body, json!({"model": "tone", "input": ["a", "b"], "encoding_format": "float"}));
    let labels = r#"key="k",namespace="team-a",model="support",adapter="tone""#;
    for line in [
        format!("lathe_gateway_requests_total{{{labels},code=\"200\",by=\"replica\"}} 1"),
        format!("lathe_gateway_prompt_tokens_total{{{labels}}} 8"),
        format!("lathe_gateway_generation_tokens_total{{{labels}}} 0"),
    ] {
        rig.until_metric(&line).await;
    }
    rig.until_uncharged().await;
}

#[tokio::test]
async fn nobody_reaches_another_tenants_model_or_one_that_is_not_there() {
    let (ours, theirs) =
        (Replica::start(Act::Answers(vectors)).await, Replica::start(Act::Answers(vectors)).await);
    let rig = start(&[ours.address]).await;
    rig.scale(&[ours.address], &[theirs.address]);
    for name in ["team-b/support", "team-b%2Fsupport", "TEAM-B/support", "none"] {
        let (status, said) = embed(&rig, name, json!("a secret")).await;
        let error = &said["error"];
        assert_eq!(
            (status, &error["code"], &error["param"]),
            (404, &json!("model_not_found"), &json!("model"))
        );
    }
    assert!(theirs.asked().is_empty() && ours.asked().is_empty());
    assert_eq!(embed(&rig, "support", json!("a")).await.0, 200);
    assert_eq!((ours.asked().len(), theirs.asked().len()), (1, 0));
    assert_eq!(rig.get(PATH).send().await.unwrap().status().as_u16(), 405);
    let keyless =
        rig.client.post(format!("{}{PATH}", rig.url)).json(&json!({"model": "support", "input": "a"}));
    assert_eq!(keyless.send().await.unwrap().status().as_u16(), 401);
}

#[tokio::test]
async fn a_key_pays_for_what_was_read_and_for_no_answer() {
    let replica = Replica::start(Act::Answers(vectors)).await;
    let setup = Setup { key: json!({"tokensPerMonth": 20}), ..Setup::default() };
    let rig = start_with(&[replica.address], setup).await;
    // An answer that is not spoken of would be estimated far above the budget.
    assert_eq!(embed(&rig, "support", json!(["a", "b"])).await.0, 200);
    rig.until_idle().await;
    let (status, said) = embed(&rig, "support", json!("x".repeat(60))).await;
    assert_eq!((status, &said["error"]["code"]), (429, &json!("insufficient_quota")));
    let message = said["error"]["message"].as_str().unwrap();
    assert!(message.contains("20 tokens a month: 8 are used"), "{message}");
}

#[tokio::test]
async fn one_that_waits_for_a_replica_or_met_one_that_drains_is_answered_once() {
    let rig = start_with(&[], Setup { autoscaled: true, ..Setup::default() }).await;
    let body = json!({"model": "support", "input": "a", "stream": true});
    let asking = tokio::spawn(rig.post_to(PATH, &body).send());
    rig.until_metric("lathe_gateway_requests_held 1").await;
    let drains = Replica::start(Act::Says(error(503, "shutting_down", "retry-after: 1\r\n"))).await;
    rig.scale(&[drains.address], &[]);
    while drains.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    let replica = Replica::start(Act::Answers(vectors)).await;
    rig.scale(&[replica.address], &[]);
    let answer = soon(asking).await.unwrap().unwrap();
    // Whatever is said of a stream: it is none, and no comment stands before it.
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (200, &"application/json".parse().unwrap())
    );
    assert_eq!(answer.json::<Value>().await.unwrap()["data"].as_array().map(Vec::len), Some(1));
    assert_eq!(replica.asked().len(), 1);
    rig.until_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_workers_vectors_come_through_in_one_trace() {
    let collector = Collector::start().await;
    let traces = lathe_telemetry::Traces::start("lathe-gateway", &collector.url).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start_with(folder.path(), Some(collector.url.clone())).await;
    let rig =
        start_with(&[worker.address], Setup { tracer: Some(traces.tracer()), ..Setup::default() }).await;
    let (status, said) = embed(&rig, "team-a/support", json!(["a confession", [1, 2, 3]])).await;
    assert_eq!((status, &said["usage"]), (200, &json!({"prompt_tokens": 15, "total_tokens": 15})), "{said}");
    let lengths =
        said["data"].as_array().unwrap().iter().map(|item| item["embedding"].as_array().unwrap().len());
    assert_eq!(lengths.collect::<Vec<_>>(), [32, 32]);
    let labels = r#"key="k",namespace="team-a",model="support",adapter="""#;
    rig.until_metric(&format!("lathe_gateway_prompt_tokens_total{{{labels}}} 15")).await;
    rig.until_idle().await;
    worker.stop.cancel();
    assert_eq!(soon(worker.ended).await.unwrap(), 0);
    traces.end().await;

    let spans = collector.spans();
    let named = |program: &str, name: &str| {
        spans
            .iter()
            .find(|span| span.program == program && span.name == name)
            .unwrap_or_else(|| panic!("{spans:#?}"))
    };
    let server = named("lathe-gateway", "embeddings team-a/support");
    let answered = named("lathe-worker", "embeddings support");
    assert!(spans.iter().all(|span| span.trace == server.trace && !span.failed), "{spans:#?}");
    for part in ["queue", "prompt"] {
        assert_eq!(named("lathe-worker", part).parent, answered.id);
    }
    for (name, expected) in [
        ("gen_ai.operation.name", "embeddings"),
        ("http.route", PATH),
        ("http.response.status_code", "200"),
        ("gen_ai.usage.input_tokens", "15"),
        ("gen_ai.usage.output_tokens", "0"),
    ] {
        assert_eq!((&*server.attributes[name], &*answered.attributes[name]), (expected, expected), "{name}");
    }
}
