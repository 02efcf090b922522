//! What is not answered, and how that is said.
use lathe_contract::{Scope, Signer};
use reqwest::Method;
use rstest::rstest;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::model;
use crate::server::{Server, launch_in, start, volume};

#[tokio::test]
async fn every_refusal_has_its_status_param_and_code() {
    let server = start(|_, task| task.context_length = 32).await;
    let chat = |extra: Value| {
        let mut body = json!({"model": "base", "messages": [{"role": "user", "content": "hi"}]});
        for (name, value) in extra.as_object().expect("an object") {
            body[name] = value.clone();
        }
        body
    };
    let table = [
        (
            "/v1/chat/completions",
            chat(json!({"model": "bose"})),
            404,
            json!("model"),
            json!("model_not_found"),
        ),
        (
            "/v1/chat/completions",
            chat(json!({"temperature": "x"})),
            400,
            json!("temperature"),
            json!("invalid_type"),
        ),
        ("/v1/chat/completions", chat(json!({"n": 3})), 400, json!("n"), json!("unsupported_value")),
        (
            "/v1/chat/completions",
            chat(json!({"logprobs": true})),
            400,
            json!("logprobs"),
            json!("unsupported_parameter"),
        ),
        (
            "/v1/chat/completions",
            chat(json!({"messages": [{"role": "user", "content": "x".repeat(40)}]})),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
        (
            "/v1/chat/completions",
            chat(json!({"messages": [{"role": "user", "content": "refuse"}]})),
            400,
            json!("messages"),
            json!("invalid_value"),
        ),
        (
            "/v1/completions",
            json!({"model": "base", "prompt": "x".repeat(32)}),
            400,
            json!("prompt"),
            json!("context_length_exceeded"),
        ),
        (
            "/v1/completions",
            json!({"model": "base", "prompt": "x".repeat(30), "max_tokens": 3}),
            400,
            json!("prompt"),
            json!("context_length_exceeded"),
        ),
        (
            "/v1/completions",
            json!({"model": "base", "prompt": [1, 258]}),
            400,
            json!("prompt[1]"),
            json!("invalid_value"),
        ),
        (
            "/v1/completions",
            json!({"model": "base"}),
            400,
            json!("prompt"),
            json!("missing_required_parameter"),
        ),
        (
            "/v1/embeddings",
            json!({"model": "bose", "input": "x"}),
            404,
            json!("model"),
            json!("model_not_found"),
        ),
        ("/v1/images/generations", json!({}), 404, Value::Null, json!("unknown_url")),
        ("/v1/models", json!({}), 405, Value::Null, json!("method_not_supported")),
    ];
    for (path, body, status, param, code) in table {
        let (found, answer) = server.post(path, &body).await;
        let error = &answer["error"];
        assert_eq!(
            (found, &error["param"], &error["code"]),
            (status, &param, &code),
            "{path} {body}: {answer}"
        );
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{answer}");
    }
    let (_, answer) = server.post("/v1/chat/completions", &chat(json!({"model": "bose"}))).await;
    assert!(answer["error"]["message"].as_str().expect("text").contains("`base`"), "{answer}");
    let long = json!({"model": "base", "prompt": "x".repeat(30), "max_tokens": 3});
    let (_, answer) = server.post("/v1/completions", &long).await;
    let message = answer["error"]["message"].as_str().expect("text");
    for number in ["32", "33", "30", "3 in"] {
        assert!(message.contains(number), "{message}");
    }
    // Nothing of this has touched the engine.
    assert_eq!(
        server.metric("vllm:request_success_total{model_name=\"base\",finished_reason=\"error\"}").await,
        0.0
    );
    assert_eq!(server.greedy("base", "hi", 4).await.len(), 4);
}

/// Bytes sent as they are, and the status line that comes back.
async fn raw(server: &Server, bytes: &[u8]) -> String {
    let address = server.base.strip_prefix("http://").expect("a URL");
    let mut socket = tokio::net::TcpStream::connect(address).await.expect("connects");
    // The server may answer and close before all is sent.
    let _ = socket.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

fn with_body(headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

const JSON: &str = "content-type: application/json\r\n";

#[rstest]
#[case::no_json(with_body(JSON, b"{"), "400")]
#[case::a_list(with_body(JSON, b"[]"), "400")]
#[case::no_utf8(with_body(JSON, b"{\"model\": \"base\", \"prompt\": \"\xff\xfe\"}"), "400")]
#[case::half_a_pair(with_body(JSON, b"{\"model\": \"base\", \"prompt\": \"\\ud800\"}"), "400")]
#[case::nul(with_body(JSON, b"{\"model\": \"base\", \"prompt\": \"\\u0000\", \"max_tokens\": 1}"), "200")]
#[case::huge_number(
    with_body(JSON, b"{\"model\": \"base\", \"prompt\": \"x\", \"max_tokens\": 1e999}"),
    "400"
)]
#[case::deep(with_body(JSON, &[b"{\"model\":".as_slice(), &[b'['; 200_000]].concat()), "400")]
#[case::deep_and_closed(with_body(JSON, format!("{{\"model\": \"base\", \"prompt\": {}{}}}", "[".repeat(99_999), "]".repeat(99_999)).as_bytes()), "400")]
#[case::unknown_fields(
    with_body(JSON, b"{\"model\": \"base\", \"prompt\": \"x\", \"max_tokens\": 1, \"x\": [[{}]]}"),
    "200"
)]
#[case::twice(with_body(JSON, b"{\"model\": \"base\", \"model\": \"base\", \"prompt\": \"x\"}"), "400")]
#[case::other_type(with_body("content-type: text/plain\r\n", b"{}"), "415")]
#[case::no_type(with_body("", b"{}"), "415")]
#[case::too_long(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n".to_vec(), "413")]
#[case::too_long_in_chunks([b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n200000\r\n".to_vec(), vec![b' '; 0x20_0000], b"\r\n0\r\n\r\n".to_vec()].concat(), "413")]
#[case::many_headers([b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n".to_vec(), b"a: b\r\n".repeat(200), b"\r\n".to_vec()].concat(), "431")]
#[case::a_long_header([b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\na: ".to_vec(), vec![b'a'; 200_000], b"\r\n\r\n".to_vec()].concat(), "431")]
#[case::another_name(b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n".to_vec(), "401")]
#[case::no_http(b"hello\r\n\r\n".to_vec(), "400")]
#[tokio::test]
async fn malformed_requests_are_refused_and_the_server_goes_on(#[case] bytes: Vec<u8>, #[case] status: &str) {
    let server = start(|_, _| {}).await;
    let line = raw(&server, &bytes).await;
    assert_eq!(line.split(' ').nth(1), Some(status), "{line}");
    assert_eq!(server.greedy("base", "hi", 4).await.len(), 4);
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let server = start(|_, task| task.model_id = "team/base".into()).await;
    let get = async |path: &str| {
        let answer = server.client.get(format!("{}{path}", server.base)).send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    };
    let (_, list) = get("/v1/models").await;
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("team/base")));
    let (status, one) = get("/v1/models/team/base").await;
    assert_eq!((status, &one), (200, &list["data"][0]));
    assert_eq!(get("/v1/models/team%2Fbase").await.0, 200);
    assert_eq!(get("/v1/models/other").await.0, 404);
    let (status, error) = get("/v1/models/%ff").await;
    assert_eq!((status, error["error"]["code"].is_string()), (404, true), "{error}");
}

#[tokio::test]
async fn only_the_gateway_may_ask_where_access_is_not_direct() {
    let (gateway, operator) = (Signer::from_seed(&[2; 32]), Signer::from_seed(&[1; 32]));
    let server = start(|contract, task| {
        contract.trust.gateway_key = gateway.public_pem().ok();
        contract.trust.operator_key = operator.public_pem().ok();
        task.direct = false;
    })
    .await;
    let now = jiff::Timestamp::now().as_second();
    let cases = [
        (None, 401),
        (Some("nonsense".to_owned()), 401),
        (Some(gateway.sign("uid-1", Scope::Inference, now)), 200),
        (Some(gateway.sign("uid-2", Scope::Inference, now)), 401),
        (Some(gateway.sign("uid-1", Scope::Report, now)), 401),
        (Some(gateway.sign("uid-1", Scope::Inference, now - 3600)), 401),
        (Some(operator.sign("uid-1", Scope::Inference, now)), 401),
    ];
    for (token, status) in cases {
        for path in ["/v1/models", "/metrics", "/v1/nothing"] {
            let mut request = server.client.get(format!("{}{path}", server.base));
            if let Some(token) = &token {
                request = request.bearer_auth(token);
            }
            let found = request.send().await.expect("an answer").status().as_u16();
            let expected = if (status, path) == (200, "/v1/nothing") { 404 } else { status };
            assert_eq!(found, expected, "{path} with {token:?}");
        }
    }
    let refused = server.client.get(format!("{}/v1/models", server.base)).send().await.expect("an answer");
    let body: Value = refused.json().await.expect("JSON");
    assert_eq!(body["error"]["code"], "invalid_api_key");
    // The operator's scope, with the operator's key.
    let put = |token: String| {
        let body = json!({"adapters": []});
        server
            .client
            .request(Method::PUT, format!("{}/v1/adapters", server.control))
            .bearer_auth(token)
            .json(&body)
    };
    let status = async |token: String| put(token).send().await.expect("an answer").status().as_u16();
    assert_eq!(status(operator.sign("uid-1", Scope::Adapters, now)).await, 202);
    assert_eq!(status(operator.sign("uid-1", Scope::Report, now)).await, 403);
    assert_eq!(status(gateway.sign("uid-1", Scope::Adapters, now)).await, 401);
    // A body that is too large is told so only to whoever may send one, and in the same form.
    let large = async |token: String| {
        let url = format!("{}/v1/adapters", server.control);
        let request = server.client.put(url).bearer_auth(token).body(vec![b' '; (1 << 20) + 1]);
        request.send().await.map(|answer| (answer.status().as_u16(), answer))
    };
    let (code, answer) = large(operator.sign("uid-1", Scope::Adapters, now)).await.expect("an answer");
    let body: Value = answer.json().await.expect("JSON");
    assert_eq!((code, body["error"]["code"].as_str()), (400, Some("invalid_body")));
    // The answer may come before all is sent, and the connection end then.
    let refused = large(gateway.sign("uid-1", Scope::Adapters, now)).await;
    assert!(refused.is_err() || refused.is_ok_and(|(code, _)| code == 401));
}

#[rstest]
#[case::no_model("config.json", None, "NotFound")]
#[case::another_family(
    "config.json",
    Some("{\"architectures\": [\"GPT2LMHeadModel\"]}"),
    "UnsupportedArchitecture"
)]
#[case::half_a_file("model.safetensors", Some("{\"a\""), "Malformed")]
#[case::no_tokenizer("tokenizer.json", Some("{}"), "TokenizerFailed")]
#[tokio::test]
async fn a_model_that_cannot_be_served_ends_the_worker_with_the_reason(
    #[case] file: &str,
    #[case] text: Option<&str>,
    #[case] reason: &str,
) {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = volume(folder.path()).join("base");
    model::write_model(&dir, 1, &[]);
    match text {
        Some(text) => std::fs::write(dir.join(file), text).expect("a file"),
        None => std::fs::remove_file(dir.join(file)).expect("a file"),
    }
    let server = launch_in(folder, |_, _| {}).await;
    let code = server.ended.await.expect("no panic");
    let summary = std::fs::read(server.folder.path().join("summary")).expect("a summary");
    let summary = lathe_contract::Summary::parse(&summary).expect("a summary");
    let lathe_contract::Outcome::Failed(failure) = summary.outcome else { panic!("{summary:?}") };
    assert_eq!((failure.reason.as_str(), code), (reason, lathe_contract::exit::USER), "{}", failure.message);
}

#[tokio::test]
async fn weights_that_are_no_numbers_are_found_before_the_first_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = volume(folder.path()).join("base");
    model::write_model(&dir, 1, &[]);
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("the weights");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    bytes[8 + header..].fill(0xff);
    std::fs::write(&path, bytes).expect("the weights");
    let server = launch_in(folder, |_, _| {}).await;
    let code = server.ended.await.expect("no panic");
    let summary = std::fs::read(server.folder.path().join("summary")).expect("a summary");
    let summary = lathe_contract::Summary::parse(&summary).expect("a summary");
    let lathe_contract::Outcome::Failed(failure) = summary.outcome else { panic!("{summary:?}") };
    assert_eq!((failure.reason.as_str(), code), ("MalformedModel", lathe_contract::exit::USER));
    assert!(failure.message.contains("not a finite number"), "{}", failure.message);
}

#[tokio::test]
async fn a_context_longer_than_the_models_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().expect("a folder");
    model::write_model(&volume(folder.path()).join("base"), 1, &[]);
    let too_long = model::LONGEST as i64 + 1;
    let server = launch_in(folder, |_, task| task.context_length = too_long).await;
    assert_eq!(server.ended.await.expect("no panic"), lathe_contract::exit::USER);
    let summary = std::fs::read_to_string(server.folder.path().join("summary")).expect("a summary");
    assert!(
        summary.contains("InvalidSettings")
            && summary.contains(&model::LONGEST.to_string())
            && summary.contains(&too_long.to_string()),
        "{summary}"
    );
}
