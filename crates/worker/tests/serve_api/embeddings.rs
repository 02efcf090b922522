//! `POST /v1/embeddings`.
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lathe_contract::Totals;
use rstest::rstest;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::model::{self, BOS};
use crate::server::{Server, adapter, launch_in, start, until, volume};

const PATH: &str = "/v1/embeddings";

impl Server {
    /// An answer that must succeed.
    async fn embed(&self, body: Value) -> Value {
        let (status, answer) = self.post(PATH, &body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Waits until so many requests have arrived and are over.
    async fn until_counted(&self, requests: (i64, i64)) -> Totals {
        until("the report counts them", async || {
            let totals = self.report().await.load?.totals;
            ((totals.arrived, totals.finished) == requests).then_some(totals)
        })
        .await
    }
}

fn ask(input: Value) -> Value {
    json!({"model": "base", "input": input})
}

fn items(answer: &Value) -> &[Value] {
    answer["data"].as_array().expect("a list")
}

fn vector(item: &Value) -> Vec<f32> {
    serde_json::from_value(item["embedding"].clone()).expect("numbers")
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let server = start(|_, _| {}).await;
    let response = server.request(PATH, &ask(json!("hello"))).send().await.expect("an answer");
    let header = |name: &str| response.headers()[name].to_str().expect("text").to_owned();
    assert_eq!(header("content-type"), "application/json");
    assert_eq!(header("lathe-usage"), "prompt=5,completion=0,cached=0");
    assert!(header("x-request-id").starts_with("embd-"), "{}", header("x-request-id"));
    assert!(header("endpoint-load-metrics").starts_with("TEXT "), "{}", header("endpoint-load-metrics"));
    let answer: Value = response.json().await.expect("JSON");
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("base")));
    // The text's bytes, one token each, and nothing before or behind them.
    assert_eq!(answer["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}));
    let [item] = items(&answer) else { panic!("{answer}") };
    assert_eq!((&item["object"], &item["index"]), (&json!("embedding"), &json!(0)));
    let vector = vector(item);
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    assert!(vector.len() == 32 && (length - 1.0).abs() < 1e-6, "{length}");
}

#[tokio::test]
async fn text_or_tokens_one_or_many_have_the_same_vectors_in_their_order() {
    let server = start(|_, _| {}).await;
    let texts = ["ab", "b", "a longer text than the others, of more than one block", "ab"];
    let mut alone = Vec::new();
    for text in texts {
        alone.push(server.embed(ask(json!(text))).await["data"][0]["embedding"].clone());
    }
    assert_ne!(alone[0], alone[1]);
    let tokens = texts.map(|text| text.bytes().collect::<Vec<u8>>());
    assert_eq!(server.embed(ask(json!(tokens[0]))).await["data"][0]["embedding"], alone[0]);
    let mixed = json!([texts[0], tokens[1], texts[2], tokens[3]]);
    for many in [json!(texts), json!(tokens), mixed] {
        let answer = server.embed(ask(many)).await;
        let data = items(&answer);
        assert_eq!(
            data.iter().map(|item| item["index"].as_u64()).collect::<Vec<_>>(),
            [0, 1, 2, 3].map(Some)
        );
        assert_eq!(data.iter().map(|item| item["embedding"].clone()).collect::<Vec<_>>(), alone);
        let total = texts.concat().len();
        assert_eq!(answer["usage"], json!({"prompt_tokens": total, "total_tokens": total}));
    }
}

#[tokio::test]
async fn base64_holds_the_bytes_of_the_same_numbers() {
    let server = start(|_, _| {}).await;
    let mut body = ask(json!(["one", "another"]));
    body["encoding_format"] = json!("float");
    let floats = server.embed(body.clone()).await;
    body["encoding_format"] = json!("base64");
    let packed = server.embed(body).await;
    for (float, packed) in std::iter::zip(items(&floats), items(&packed)) {
        let bytes = STANDARD.decode(packed["embedding"].as_str().expect("base64")).expect("base64");
        let numbers: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(numbers, vector(float));
    }
    assert_eq!(floats["usage"], packed["usage"]);
}

#[tokio::test]
async fn many_inputs_are_the_same_beside_answers_as_alone() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (3, 40)).await;
    let inputs: Vec<String> = (0..30).map(|n| "p".repeat(1 + n * 7 % 90)).collect();
    let mut alone = Vec::new();
    for input in &inputs {
        alone.push(server.embed(ask(json!(input))).await["data"][0]["embedding"].clone());
    }
    let answer =
        |n: usize| json!({"model": "base", "prompt": "q".repeat(n + 1), "max_tokens": 40, "seed": n});
    let answers = futures::future::join_all((0..8).map(|n| server.complete(answer(n))));
    let (together, _) = tokio::join!(server.embed(ask(json!(inputs))), answers);
    let together: Vec<Value> = items(&together).iter().map(|item| item["embedding"].clone()).collect();
    assert_eq!(together, alone);
}

#[tokio::test]
async fn an_adapter_is_asked_by_its_name() {
    let folder = tempfile::tempdir().expect("a folder");
    model::write_model(&volume(folder.path()).join("base"), 1, &[]);
    model::write_adapter(&volume(folder.path()).join("a"), 1, 32);
    let server = launch_in(folder, |_, task| task.adapters = vec![adapter("team/tuned", "a")]).await;
    server.until_ready().await;
    let base = server.embed(ask(json!("hello"))).await;
    let mut body = ask(json!("hello"));
    body["model"] = json!("team/tuned");
    let tuned = server.embed(body).await;
    assert_eq!(tuned["model"], "team/tuned");
    assert_ne!(tuned["data"][0]["embedding"], base["data"][0]["embedding"]);
}

#[tokio::test]
async fn what_is_read_is_counted_once_and_what_is_known_is_not_read_again() {
    let server = start(|_, _| {}).await;
    let text = "x".repeat(40);
    server.embed(ask(json!([text, "abc"]))).await;
    let answer = server.request(PATH, &ask(json!(text))).send().await.expect("an answer");
    assert_eq!(answer.headers()["lathe-usage"], "prompt=40,completion=0,cached=32");
    // And by an answer to the same text.
    let body = json!({"model": "base", "prompt": text, "max_tokens": 1});
    assert_eq!(server.complete(body).await["usage"]["prompt_tokens_details"]["cached_tokens"], 32);
    for (metric, expected) in [
        ("vllm:prompt_tokens_total", 40.0 + 3.0 + 40.0 + 40.0),
        ("vllm:prefix_cache_hits_total", 64.0),
        ("vllm:generation_tokens_total", 1.0),
        ("vllm:request_success_total{model_name=\"base\",finished_reason=\"stop\"}", 3.0),
        ("vllm:request_prefill_time_seconds_count", 4.0),
        ("vllm:time_to_first_token_seconds_count", 1.0),
    ] {
        assert_eq!(server.metric(metric).await, expected, "{metric}");
    }
    let totals = server.until_counted((3, 3)).await;
    assert_eq!((totals.prompt, totals.generation), (40 + 3 + 8 + 8, 1));
}

#[rstest]
#[case::context(json!("x".repeat(33)), "input", "context_length_exceeded")]
#[case::context_of_one(json!(["a", "x".repeat(33)]), "input[1]", "context_length_exceeded")]
#[case::no_such_token(json!([[1], [2, 258]]), "input[1][1]", "invalid_value")]
#[case::empty(json!(["a", ""]), "input[1]", "empty_string")]
#[tokio::test]
async fn what_does_not_fit_is_refused(#[case] input: Value, #[case] param: &str, #[case] code: &str) {
    let server = start(|_, task| task.context_length = 32).await;
    let (status, answer) = server.post(PATH, &ask(input)).await;
    assert_eq!(
        (status, &answer["error"]["param"], &answer["error"]["code"]),
        (400, &json!(param), &json!(code))
    );
    // The whole context may be filled: nothing follows.
    server.embed(ask(json!("x".repeat(32)))).await;
    let answer = server.embed(ask(json!([BOS]))).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 1);
}

#[tokio::test]
async fn all_inputs_together_are_bounded() {
    let server = start(|_, _| {}).await;
    let (status, answer) = server.post(PATH, &ask(json!(vec!["x".repeat(3001); 100]))).await;
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("max_tokens_per_request")));
    assert_eq!(answer["error"]["param"], "input");
}

/// A request of 200 inputs, most of which wait.
async fn of_many_inputs(server: &Server) -> JoinHandle<reqwest::Result<reqwest::Response>> {
    let inputs: Vec<String> = (0..200).map(|n| format!("{n:03}").repeat(300)).collect();
    let body = ask(json!(inputs));
    let asking = tokio::spawn(server.request(PATH, &body).send());
    until("it is in the engine", async || {
        (server.metric("vllm:num_requests_waiting").await > 100.0).then_some(())
    })
    .await;
    asking
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_inputs_with_it() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (1, 1)).await;
    let asking = of_many_inputs(&server).await;
    asking.abort();
    // Its place is free again, and nobody waits for the rest of it.
    until("it is out of the engine", async || {
        (server.metric("vllm:num_requests_waiting").await == 0.0).then_some(())
    })
    .await;
    server.embed(ask(json!("a"))).await;
    assert!(
        server.metric("vllm:request_success_total{model_name=\"base\",finished_reason=\"abort\"}").await
            > 100.0
    );
    server.until_counted((2, 2)).await;
}

#[tokio::test]
async fn an_answer_does_not_wait_for_all_inputs_of_another_request() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (1, 4)).await;
    let asking = of_many_inputs(&server).await;
    server.greedy("base", "a", 1).await;
    assert!(server.metric("vllm:num_requests_waiting").await > 10.0, "it was answered after all the others");
    asking.abort();
}

#[tokio::test]
async fn numbers_that_are_not_finite_are_an_error_of_those_alone_who_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    model::write_model(&volume(folder.path()).join("base"), 1, &[]);
    let broken = volume(folder.path()).join("a");
    model::write_adapter(&broken, 1, 32);
    let weights = broken.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("a file");
    let header = u64::from_le_bytes(*bytes.first_chunk().expect("its length")) as usize;
    bytes[8 + header..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).expect("a file");
    let server = launch_in(folder, |_, task| task.adapters = vec![adapter("team/broken", "a")]).await;
    server.until_ready().await;
    let mut body = ask(json!(["a", "b"]));
    body["model"] = json!("team/broken");
    let (refused, whole) = tokio::join!(server.post(PATH, &body), server.embed(ask(json!(["a", "b"]))));
    assert_eq!((refused.0, &refused.1["error"]["code"]), (500, &json!("internal_error")));
    assert_eq!(items(&whole).len(), 2);
}
