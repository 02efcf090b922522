//! What answers say.
use std::collections::BTreeSet;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::server::{joined, start};

#[tokio::test]
async fn a_chat_completion_has_openais_shape() {
    let server = start(|_, _| {}).await;
    let body =
        json!({"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "seed": 1});
    let response = server.request("/v1/chat/completions", &body).send().await.expect("an answer");
    let load = response.headers()["endpoint-load-metrics"].to_str().expect("text").to_owned();
    assert!(load.starts_with("TEXT named_metrics.kv_cache_usage_perc="), "{load}");
    let id = response.headers()["x-request-id"].to_str().expect("text").to_owned();
    let answer: Value = response.json().await.expect("JSON");
    assert_eq!(answer["id"], json!(id));
    assert!(id.starts_with("chatcmpl-"), "{id}");
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("base")));
    let [choice] = answer["choices"].as_array().expect("a list").as_slice() else { panic!("{answer}") };
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"].as_str().expect("text").len(), 7);
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
    // "<|turn|>user: hi\n<|turn|>assistant:", a token for each turn's mark and one for each byte.
    let prompt = 1 + "user: hi\n".len() + 1 + "assistant:".len();
    let mut usage = json!({"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7,
                           "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(answer["usage"], usage);
    // The first block of 16 need not be read again, and the answer is the same.
    let (_, again) = server.post("/v1/chat/completions", &body).await;
    usage["prompt_tokens_details"]["cached_tokens"] = json!(16);
    assert_eq!((&again["usage"], &again["choices"]), (&usage, &answer["choices"]));
}

#[tokio::test]
async fn a_stream_joined_is_the_whole_answer() {
    let server = start(|_, _| {}).await;
    let body = json!({"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 30, "seed": 4});
    let (_, whole) = server.post("/v1/chat/completions", &body).await;
    let mut streamed = body.clone();
    streamed["stream_options"] = json!({"include_usage": true});
    let events = server.stream("/v1/chat/completions", streamed).await.rest().await;
    let (text, finish) = joined(&events);
    assert_eq!(
        (text.as_str(), finish.as_str()),
        (whole["choices"][0]["message"]["content"].as_str().expect("text"), "length")
    );
    let parsed: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).expect("JSON")).collect();
    assert_eq!(parsed[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(
        parsed
            .iter()
            .all(|event| event["object"] == "chat.completion.chunk" && event["id"] == parsed[0]["id"])
    );
    let (usage, before) = parsed.split_last().expect("events");
    let mut expected = whole["usage"].clone();
    expected["prompt_tokens_details"]["cached_tokens"] = json!(16);
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &expected));
    assert!(before.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some()));
    // Without the option no event speaks of usage.
    let events = server.stream("/v1/chat/completions", body).await.rest().await;
    assert!(events.iter().all(|event| !event.contains("usage")));
}

#[tokio::test]
async fn a_completion_takes_text_or_tokens() {
    let server = start(|_, _| {}).await;
    let ask = |prompt: Value| json!({"model": "base", "prompt": prompt, "seed": 1});
    let text = server.complete(ask(json!("ab"))).await;
    assert_eq!(text["object"], "text_completion");
    let usage = json!({"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18,
                       "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(text["usage"], usage);
    for same in [json!([97, 98]), json!([[97, 98]]), json!(["ab"])] {
        assert_eq!(server.complete(ask(same)).await["choices"], text["choices"]);
    }
    // An empty prompt begins with the model's own first token.
    assert_eq!(
        server.complete(ask(json!(""))).await["choices"],
        server.complete(ask(json!([256]))).await["choices"]
    );
}

#[tokio::test]
async fn seeds_and_sampling_mean_what_they_say() {
    let server = start(|_, _| {}).await;
    let ask = async |extra: Value| {
        let mut body = json!({"model": "base", "prompt": "once", "max_tokens": 40});
        for (name, value) in extra.as_object().expect("an object") {
            body[name] = value.clone();
        }
        server.complete(body).await["choices"][0]["text"].as_str().expect("text").to_owned()
    };
    assert_eq!(ask(json!({"seed": 1})).await, ask(json!({"seed": 1})).await);
    assert_eq!(ask(json!({"seed": -1})).await, ask(json!({"seed": -1})).await);
    assert_ne!(ask(json!({"seed": 1})).await, ask(json!({"seed": 2})).await);
    assert_ne!(ask(json!({})).await, ask(json!({})).await);
    let greedy = ask(json!({"temperature": 0})).await;
    assert_eq!(ask(json!({"temperature": 0, "seed": 9})).await, greedy);
    assert_eq!(ask(json!({"top_k": 1})).await, greedy);
    assert_eq!(ask(json!({"top_p": 0})).await, greedy);
    assert_ne!(ask(json!({"temperature": 2, "seed": 1, "top_k": -1})).await, greedy);
}

#[tokio::test]
async fn a_stop_string_ends_an_answer_and_none_of_it_is_shown() {
    let server = start(|_, _| {}).await;
    let free = server.greedy("base", "story", 60).await;
    // Each token is a byte, so every longer stop string lies across tokens.
    for (from, length) in [(20, 1), (20, 2), (20, 5), (0, 3)] {
        let stop = &free[from..from + length];
        let at = free.find(stop).expect("it is there");
        let body = json!({"model": "base", "prompt": "story", "temperature": 0, "max_tokens": 60, "stop": ["never\u{1}", stop]});
        let answer = server.complete(body.clone()).await;
        assert_eq!(answer["choices"][0]["text"], free[..at], "stop {stop:?}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert_eq!(answer["usage"]["completion_tokens"], at + length);
        let events = server.stream("/v1/completions", body).await.rest().await;
        assert_eq!(joined(&events), (free[..at].to_owned(), "stop".to_owned()));
    }
    // The beginning of a stop string that does not come is shown after all.
    let begun = format!("{}\u{1}", &free[58..60]);
    let body = json!({"model": "base", "prompt": "story", "temperature": 0, "max_tokens": 60, "stop": begun});
    assert_eq!(server.complete(body).await["choices"][0]["text"], free);
}

#[tokio::test]
async fn the_context_bounds_an_answer_that_is_not_bounded_itself() {
    let server = start(|_, task| task.context_length = 64).await;
    let body = json!({"model": "base", "messages": [{"role": "user", "content": "hi"}]});
    let (_, answer) = server.post("/v1/chat/completions", &body).await;
    assert_eq!(
        (&answer["usage"]["total_tokens"], &answer["choices"][0]["finish_reason"]),
        (&json!(64), &json!("length"))
    );
    let answer = server.complete(json!({"model": "base", "prompt": "x".repeat(60)})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn answers_are_the_same_alone_and_in_any_batch() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (6, 40)).await;
    let body = |n: usize| json!({"model": "base", "prompt": "p".repeat(1 + n * 7 % 30), "seed": n, "max_tokens": 5 + n * 11 % 40});
    let mut alone = Vec::new();
    for n in 0..24 {
        alone.push(server.complete(body(n)).await["choices"].clone());
    }
    let together = futures::future::join_all((0..24).map(|n| server.complete(body(n)))).await;
    for (n, (together, alone)) in together.iter().zip(&alone).enumerate() {
        assert_eq!(&together["choices"], alone, "request {n}");
    }
    let different: BTreeSet<String> = alone.iter().map(Value::to_string).collect();
    assert!(different.len() > 20, "the answers must differ for the comparison to mean anything");
}

#[tokio::test]
async fn what_an_answer_took_is_told_in_a_header_or_to_who_asks_for_trailers_after_a_stream() {
    let server = start(|_, _| {}).await;
    let mut body = json!({"model": "base", "prompt": "hello", "max_tokens": 7, "ignore_eos": true});
    let answer = server.request("/v1/completions", &body).send().await.expect("an answer");
    // The prompt's bytes, one token each.
    assert_eq!(answer.headers()["lathe-usage"], "prompt=5,completion=7,cached=0");

    body["stream"] = json!(true);
    let address = server.base.strip_prefix("http://").expect("an address");
    let ask = async |te: &str| {
        let body = body.to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n{te}\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("an answer");
        text
    };
    let told = ask("te: trailers\r\n").await;
    assert!(told.ends_with("0\r\nlathe-usage: prompt=5,completion=7,cached=0\r\n\r\n"), "{told}");
    let plain = ask("").await;
    assert!(plain.contains("[DONE]") && plain.ends_with("0\r\n\r\n"), "{plain}");

    let longer = json!({"model": "base", "prompt": "hello, hello, hello", "max_tokens": 1});
    server.complete(longer.clone()).await;
    let answer = server.request("/v1/completions", &longer).send().await.expect("an answer");
    assert_eq!(answer.headers()["lathe-usage"], "prompt=19,completion=1,cached=16");
}
