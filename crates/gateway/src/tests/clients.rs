//! What clients and replicas see of each other.
use lathe_contract::Scope;
use rstest::rstest;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::replica::{Act, LAST_CHUNK, Replica, completion, error, events};
use super::rig::{Setup, soon, start, start_with, verifier};

#[tokio::test]
async fn a_worker_gets_its_own_name_of_the_model_and_a_token_instead_of_the_key() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let rig = start(&[replica.address]).await;
    let body = json!({"model": "team-a/tone", "prompt": "x", "temperature": 0.5});
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let answer = rig.post(&body).header("traceparent", trace).header("cookie", "a=b").send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    for hidden in ["lathe-usage", "endpoint-load-metrics"] {
        assert!(!answer.headers().contains_key(hidden), "{hidden}");
    }
    assert_eq!(answer.json::<Value>().await.unwrap(), json!({"choices": [{"text": "hi"}]}));

    let [asked] = replica.asked().try_into().unwrap();
    assert_eq!(asked.path, "/v1/completions");
    assert_eq!(asked.body, json!({"model": "tone", "prompt": "x", "temperature": 0.5}));
    assert_eq!(
        (&asked.headers["traceparent"], &asked.headers["te"]),
        (&trace.parse().unwrap(), &"trailers".parse().unwrap())
    );
    assert!(!asked.headers.contains_key("cookie"));
    let token = asked.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    let now = jiff::Timestamp::now().as_second();
    assert_eq!(verifier().verify(token, "uid-team-a-support", Scope::Inference, now), Ok(()));
    for line in [
        r#"lathe_gateway_requests_total{key="k",namespace="team-a",model="support",adapter="tone",code="200",by="replica"} 1"#,
        r#"lathe_gateway_prompt_tokens_total{key="k",namespace="team-a",model="support",adapter="tone"} 7"#,
        r#"lathe_gateway_generation_tokens_total{key="k",namespace="team-a",model="support",adapter="tone"} 3"#,
        "lathe_gateway_requests_in_flight 0",
    ] {
        rig.until_metric(line).await;
    }
}

#[tokio::test]
async fn a_stream_comes_as_it_is_made_and_its_trailer_is_the_gateways() {
    let replica = Replica::start(Act::SaysAndStalls(events(&["data: 1\n\n"]))).await;
    let rig = start(&[replica.address]).await;
    let body = json!({"model": "support", "prompt": "x", "stream": true});
    // The first event is here although the replica writes no other.
    let mut answer = soon(rig.post(&body).send()).await.unwrap();
    assert_eq!(soon(answer.chunk()).await.unwrap().unwrap(), "data: 1\n\n");
    drop(answer);
    // A client that left is a connection less at the replica, and pays for what it got.
    soon(replica.left()).await;
    rig.until_metric(r#"lathe_gateway_streams_broken_total{by="client"} 1"#).await;
    rig.until_metric(
        r#"lathe_gateway_generation_tokens_total{key="k",namespace="team-a",model="support",adapter=""} 1"#,
    )
    .await;

    replica.now(Act::Says(events(&["data: 1\n\n", "data: [DONE]\n\n"]) + LAST_CHUNK));
    let answer = rig.post(&body).send().await.unwrap();
    assert!(!answer.headers().contains_key("trailer"));
    assert_eq!(answer.text().await.unwrap(), "data: 1\n\ndata: [DONE]\n\n");
    let tokens =
        r#"lathe_gateway_generation_tokens_total{key="k",namespace="team-a",model="support",adapter=""} 6"#;
    rig.until_metric(tokens).await;
    // This one reached its end.
    rig.until_metric(r#"lathe_gateway_streams_broken_total{by="client"} 1"#).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_is_left_by_the_gateway_too() {
    let replica = Replica::start(Act::SaysAndStalls(String::new())).await;
    let rig = start(&[replica.address]).await;
    let asking = tokio::spawn(rig.post(&json!({"model": "support", "prompt": "x"})).send());
    rig.until_metric("lathe_gateway_requests_in_flight 1").await;
    while replica.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    asking.abort();
    soon(replica.left()).await;
    rig.until_idle().await;
    rig.until_metric(
        r#"lathe_gateway_requests_total{key="k",namespace="team-a",model="support",adapter="",code="499",by="client"} 1"#,
    )
    .await;
}

#[rstest]
#[case::exact("team-b/support")]
#[case::encoded("team-b%2Fsupport")]
#[case::twice_encoded("team-b%252Fsupport")]
#[case::upper_case("TEAM-B/support")]
#[case::up("team-a/../team-b/support")]
#[case::nested("team-a/team-b/support")]
#[case::unicode("team-b\u{ff0f}support")]
#[tokio::test]
async fn no_spelling_reaches_another_tenant(#[case] name: &str) {
    let rig = start(&[]).await;
    let answer = rig.post(&json!({"model": name, "prompt": "x"})).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 404);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(
        (&body["error"]["code"], &body["error"]["param"]),
        (&json!("model_not_found"), &json!("model"))
    );
    let answer = rig.get(&format!("/v1/models/{name}")).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 404);
}

#[tokio::test]
async fn the_list_has_what_the_key_may_use_and_answers() {
    let rig = start(&[]).await;
    let list: Value = rig.get("/v1/models").send().await.unwrap().json().await.unwrap();
    let support = json!({"id": "team-a/support", "object": "model", "created": 1_767_225_600, "owned_by": "team-a", "parent": null});
    let tone = json!({"id": "team-a/tone", "object": "model", "created": 1_767_225_600, "owned_by": "team-a", "parent": "team-a/support"});
    assert_eq!(list, json!({"object": "list", "data": [support, tone]}));
    for path in ["/v1/models/tone", "/v1/models/team-a/tone", "/v1/models/team-a%2Ftone"] {
        assert_eq!(rig.get(path).send().await.unwrap().json::<Value>().await.unwrap(), tone, "{path}");
    }
}

#[rstest]
#[case::unknown_path("GET", "/v1/engines", 404, "unknown_url", None)]
#[case::other_method("DELETE", "/v1/models", 405, "method_not_supported", Some("GET,HEAD"))]
#[case::of_an_endpoint("GET", "/v1/chat/completions", 405, "method_not_supported", Some("POST"))]
#[tokio::test]
async fn other_urls_are_refused_in_openais_form(
    #[case] method: &str,
    #[case] path: &str,
    #[case] status: u16,
    #[case] code: &str,
    #[case] allowed: Option<&str>,
) {
    let rig = start(&[]).await;
    let request = rig.client.request(method.parse().unwrap(), format!("{}{path}", rig.url));
    let unknown = request.try_clone().unwrap().send().await.unwrap();
    assert_eq!(unknown.status().as_u16(), 401, "nothing is told without a key");
    assert_eq!(unknown.headers()["www-authenticate"], "Bearer");
    let answer = request.bearer_auth(lathe_contract::new_key([1; 32]).0).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), status);
    assert_eq!(answer.headers().get("allow").map(|methods| methods.to_str().unwrap()), allowed);
    assert!(answer.headers().contains_key("x-request-id"));
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], code);
}

#[rstest]
#[case::adapter_that_does_not_answer_yet("late", "model_not_ready")]
#[case::no_pod("support", "no_replica")]
#[tokio::test]
async fn what_is_known_and_cannot_answer_is_503_and_costs_the_key_nothing(
    #[case] model: &str,
    #[case] code: &str,
) {
    let setup = Setup { key: json!({"requestsPerMinute": 1}), ..Setup::default() };
    let rig = start_with(&[], setup).await;
    for _ in 0..2 {
        let answer = rig.post(&json!({"model": model, "prompt": "x"})).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["retry-after"]),
            (503, &"1".parse().unwrap())
        );
        assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], code);
    }
}

#[tokio::test]
async fn limits_are_told_and_settled_by_what_was_used() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let key = json!({"requestsPerMinute": 600, "tokensPerMinute": 1000});
    let rig = start_with(&[replica.address], Setup { key, ..Setup::default() }).await;
    let ask = async |max_tokens: u64| {
        rig.post(&json!({"model": "support", "prompt": "x", "max_tokens": max_tokens})).send().await.unwrap()
    };
    let answer = ask(900).await;
    assert_eq!(answer.headers()["x-ratelimit-limit-tokens"], "1000");
    assert_eq!(answer.headers()["x-ratelimit-remaining-tokens"], "100");
    assert_eq!(answer.headers()["x-ratelimit-remaining-requests"], "599");
    drop(answer.bytes().await.unwrap());
    rig.until_idle().await;
    // It took 10 of them: the next one fits, and then none of its size.
    let answer = ask(900).await;
    assert_eq!(answer.status().as_u16(), 200);
    replica.now(Act::Says(error(400, "invalid_value", "")));
    drop(answer.bytes().await.unwrap());
    rig.until_idle().await;
    assert_eq!(ask(900).await.status().as_u16(), 400);
    rig.until_idle().await;
    replica.now(Act::SaysAndStalls(String::new()));
    let open = tokio::spawn(rig.post(&json!({"model": "support", "prompt": "x", "max_tokens": 900})).send());
    rig.until_metric("lathe_gateway_requests_in_flight 1").await;
    let refused = ask(900).await;
    assert_eq!(refused.status().as_u16(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.headers()["x-ratelimit-limit-requests"], "600");
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "rate_limit_exceeded");
    open.abort();
}

/// Who reads a long answer and leaves before its end pays for what was read, and not for an estimate that was less.
#[tokio::test]
async fn who_leaves_before_the_end_of_a_stream_pays_for_what_was_read() {
    let pieces = vec!["data: x\n\n"; 5000];
    let replica = Replica::start(Act::SaysAndStalls(events(&pieces))).await;
    let key = json!({"tokensPerMinute": 1000});
    let rig = start_with(&[replica.address], Setup { key, ..Setup::default() }).await;
    let body = json!({"model": "support", "prompt": "x", "stream": true});
    let mut answer = rig.post(&body).send().await.unwrap();
    let (mut seen, all) = (0, pieces.concat().len());
    while seen < all {
        seen += soon(answer.chunk()).await.unwrap().unwrap().len();
    }
    drop(answer);
    rig.until_idle().await;
    // 256 were estimated, which would leave enough.
    assert_eq!(rig.complete("x").await.0, 429);
}

#[tokio::test]
async fn a_request_that_is_refused_was_a_request() {
    let setup = Setup { key: json!({"requestsPerMinute": 2}), ..Setup::default() };
    let rig = start_with(&[], setup).await;
    let ask = async || {
        rig.post(&json!({"model": "no-such", "prompt": "x"})).send().await.unwrap().status().as_u16()
    };
    assert_eq!([ask().await, ask().await, ask().await], [404, 404, 429]);
}

#[tokio::test]
async fn one_request_more_than_the_limit_is_sent_away_at_once() {
    let replica = Replica::start(Act::SaysAndStalls(String::new())).await;
    let rig = start_with(&[replica.address], Setup { max_in_flight: 1, ..Setup::default() }).await;
    let open = tokio::spawn(rig.post(&json!({"model": "support", "prompt": "x"})).send());
    rig.until_metric("lathe_gateway_requests_in_flight 1").await;
    let (status, body) = rig.complete("x").await;
    assert_eq!((status, &body["error"]["code"]), (429, &json!("overloaded")));
    rig.until_metric(r#"lathe_gateway_requests_refused_total{reason="overloaded"} 1"#).await;
    open.abort();
}

#[tokio::test]
async fn one_key_has_its_share_and_another_is_served() {
    let replica = Replica::start(Act::SaysAndStalls(String::new())).await;
    let rig = start_with(&[replica.address], Setup { per_key: 1, ..Setup::default() }).await;
    let open = tokio::spawn(rig.post(&json!({"model": "support", "prompt": "x"})).send());
    rig.until_metric("lathe_gateway_requests_in_flight 1").await;
    let (status, body) = soon(rig.complete("x")).await;
    assert_eq!((status, &body["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    assert!(body["error"]["message"].as_str().unwrap().contains("its share: 1 requests at a time"));
    open.abort();
    rig.until_free().await;
}

/// Whoever promises bodies and sends none holds nothing of what others need.
#[tokio::test]
async fn a_body_holds_what_has_come_of_it() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let rig = start(&[replica.address]).await;
    let address = rig.url.strip_prefix("http://").unwrap();
    let key = lathe_contract::new_key([1; 32]).0;
    let mut open = Vec::new();
    for at in 0..32 {
        let told = if at % 2 == 0 { "transfer-encoding: chunked" } else { "content-length: 16777216" };
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n{told}\r\n\r\n"
        );
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        open.push(stream);
    }
    for _ in 0..10 {
        assert_eq!(rig.complete("x").await.0, 200);
    }
    drop(open);
    rig.until_free().await;
}

/// A body that was read holds its length, however long it could have been.
#[tokio::test]
async fn requests_in_work_do_not_keep_others_bodies_out() {
    let replica = Replica::start(Act::SaysAndStalls(String::new())).await;
    let rig = start(&[replica.address]).await;
    let body = json!({"model": "support", "prompt": "x".repeat(20 << 10)}).to_string();
    let mut open = Vec::new();
    for _ in 0..20 {
        let pieces = futures::stream::iter([Ok::<_, std::io::Error>(body.clone())]);
        let request = rig.post(&json!({})).body(reqwest::Body::wrap_stream(pieces));
        open.push(tokio::spawn(request.send()));
    }
    rig.until_metric("lathe_gateway_requests_in_flight 20").await;
    assert_eq!(rig.places.held_kib(), 20 * body.len().div_ceil(1 << 10));
    for request in open {
        request.abort();
    }
    rig.until_free().await;
}

#[tokio::test]
async fn a_body_that_is_too_long_is_refused_before_it_is_read() {
    let rig = start(&[]).await;
    let body = json!({"model": "support", "prompt": "x".repeat(16 << 20)});
    // A client that goes on writing may find its connection closed.
    if let Ok(answer) = rig.post(&body).send().await {
        assert_eq!(answer.status().as_u16(), 413);
    }
    rig.until_metric(r#"lathe_gateway_requests_refused_total{reason="request_too_large"} 1"#).await;
}

#[tokio::test]
async fn a_stop_lets_an_open_stream_end() {
    let replica = Replica::start(Act::SaysAndStalls(events(&["data: 1\n\n"]))).await;
    let rig = start(&[replica.address]).await;
    let mut answer =
        rig.post(&json!({"model": "support", "prompt": "x", "stream": true})).send().await.unwrap();
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "data: 1\n\n");
    rig.stop.cancel();
    let probe = rig.client.get(format!("{}/v1/models", rig.url));
    while probe.try_clone().unwrap().send().await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!rig.ended.is_finished(), "the open stream keeps it");
    drop(answer);
    soon(rig.ended).await.unwrap();
}
