//! Many clients, slow clients, clients that leave.
use lathe_plan::SPARE_ADAPTERS;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::model;
use crate::server::{joined, start, until};

const ABORTED: &str = "vllm:request_success_total{model_name=\"base\",finished_reason=\"abort\"}";
const RUNNING: &str = "vllm:num_requests_running{";

#[tokio::test]
async fn tokens_are_counted_exactly_under_many_requests() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (5, 100)).await;
    let requests = (0..60).map(|n: usize| {
        let (prompt, tokens) = ("x".repeat(1 + n * 13 % 50), 1 + n * 7 % 30);
        let body = json!({"model": "base", "prompt": prompt, "max_tokens": tokens, "ignore_eos": true,
                          "stream_options": if n.is_multiple_of(2) { json!(null) } else { json!({"include_usage": true}) }});
        let server = &server;
        async move {
            let usage = if n.is_multiple_of(2) {
                server.complete(body).await["usage"].clone()
            } else {
                let events = server.stream("/v1/completions", body).await.rest().await;
                assert_eq!(joined(&events).0.len(), tokens);
                let last: serde_json::Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
                last["usage"].clone()
            };
            let length = prompt.len();
            // Which of them found another's beginning is chance: whole blocks of 16, and never the last token.
            let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number") as usize;
            assert!(cached.is_multiple_of(16) && cached < length, "request {n}: {cached} of {length}");
            let expected = json!({"prompt_tokens": length, "completion_tokens": tokens, "total_tokens": length + tokens,
                                  "prompt_tokens_details": {"cached_tokens": cached}});
            assert_eq!(usage, expected, "request {n}");
            (length, tokens, cached)
        }
    });
    let counts = futures::future::join_all(requests).await;
    let sum = |which: fn(&(usize, usize, usize)) -> usize| counts.iter().map(which).sum::<usize>() as f64;
    assert_eq!(server.metric("vllm:prompt_tokens_total{").await, sum(|c| c.0));
    assert_eq!(server.metric("vllm:generation_tokens_total{").await, sum(|c| c.1));
    assert_eq!(server.metric("vllm:prefix_cache_queries_total{").await, sum(|c| c.0));
    assert_eq!(server.metric("vllm:prefix_cache_hits_total{").await, sum(|c| c.2));
    let totals = until("the report counts all of them", async || {
        server.report().await.load.map(|load| load.totals).filter(|totals| totals.finished == 60)
    })
    .await;
    let read = sum(|c| c.0 - c.2);
    assert_eq!(
        (totals.arrived as f64, totals.prompt as f64, totals.generation as f64),
        (60.0, read, sum(|c| c.1))
    );
    let count = async |name: &str| server.metric(&format!("vllm:{name}_count{{")).await;
    for name in ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"] {
        assert_eq!(count(name).await, 60.0, "{name}");
    }
    assert_eq!(count("inter_token_latency_seconds").await, sum(|c| c.1 - 1));
    let ended = "vllm:request_success_total{model_name=\"base\",finished_reason=\"length\"}";
    assert_eq!(server.metric(ended).await, 60.0);
    server.until_metric(RUNNING, 0.0).await;
    assert_eq!(server.metric("vllm:kv_cache_usage_perc{").await, 0.0);
}

/// The model server protocol of the Gateway API Inference Extension, under vLLM's names.
#[tokio::test]
async fn every_metric_is_there_before_the_first_request() {
    let server = start(|_, _| {}).await;
    let loras = format!("vllm:lora_requests_info{{model_name=\"base\",max_lora=\"{SPARE_ADAPTERS}\",");
    until("adapters are told of", async || {
        let text =
            server.client.get(format!("{}/metrics", server.base)).send().await.ok()?.text().await.ok()?;
        text.contains(&loras).then_some(())
    })
    .await;
    for gauge in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        assert_eq!(server.metric(&format!("vllm:{gauge}{{model_name=\"base\"}}")).await, 0.0, "{gauge}");
    }
    for counter in ["prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"] {
        assert_eq!(
            server.metric(&format!("vllm:{counter}_total{{model_name=\"base\"}}")).await,
            0.0,
            "{counter}"
        );
    }
    for reason in ["stop", "length", "abort", "error"] {
        let line = format!("vllm:request_success_total{{model_name=\"base\",finished_reason=\"{reason}\"}}");
        assert_eq!(server.metric(&line).await, 0.0, "{reason}");
    }
    let histograms =
        ["time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"];
    for name in histograms.into_iter().chain(["request_prefill_time", "request_decode_time"]) {
        assert_eq!(
            server.metric(&format!("vllm:{name}_seconds_count{{model_name=\"base\"}}")).await,
            0.0,
            "{name}"
        );
    }
}

#[tokio::test]
async fn one_more_than_may_wait_is_sent_away_and_a_leaving_client_frees_its_slot() {
    let server = start(|_, task| {
        (task.max_sequences, task.max_waiting) = (1, 1);
        (task.context_length, task.cache_tokens) = (model::LONGEST as i64, model::LONGEST as i64);
    })
    .await;
    // It must still run when a report of the next second has been read.
    let endless =
        json!({"model": "base", "prompt": "long", "max_tokens": model::LONGEST - 100, "ignore_eos": true});
    let mut running = server.stream("/v1/completions", endless).await;
    running.next().await.expect("an event");
    let body = json!({"model": "base", "prompt": "next", "max_tokens": 5});
    let mut waiting = server.stream("/v1/completions", body.clone()).await;
    server.until_metric("vllm:num_requests_waiting{", 1.0).await;
    let refused = server.request("/v1/completions", &body).send().await.expect("an answer");
    assert_eq!(refused.status().as_u16(), 429);
    let after: u64 = refused.headers()["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=60).contains(&after));
    assert!(refused.headers().contains_key("endpoint-load-metrics"));
    let error: serde_json::Value = refused.json().await.expect("JSON");
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    let load = until("the report speaks of both", async || {
        server.report().await.load.filter(|load| (load.running, load.waiting) == (1, 1))
    })
    .await;
    assert!(load.cache_usage > 0.0 && load.generation_tokens_per_second > 0.0, "{load:?}");

    drop(running);
    waiting.next().await.expect("its turn has come");
    assert_eq!(server.metric(ABORTED).await, 1.0);
    assert_eq!(joined(&waiting.rest().await).1, "length");
    let load = until("the capacity is measured when nobody asks for anything", async || {
        server.report().await.load.filter(|load| {
            load.capacity.is_some_and(|capacity| capacity.generation > 0.0 && capacity.prompt > 0.0)
        })
    })
    .await;
    assert_eq!((load.running, load.waiting), (0, 0));
    // Two that were let in and one that was sent away; nothing of the measurement.
    assert_eq!((load.totals.arrived, load.totals.finished), (3, 2));
}

#[tokio::test]
async fn a_client_that_leaves_before_its_whole_answer_frees_its_slot_too() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (1, 0)).await;
    let body = json!({"model": "base", "prompt": "x", "max_tokens": 4000, "ignore_eos": true}).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let address = server.base.strip_prefix("http://").expect("a URL");
    let mut socket = tokio::net::TcpStream::connect(address).await.expect("connects");
    socket.write_all(format!("{head}{body}").as_bytes()).await.expect("sent");
    server.until_metric(RUNNING, 1.0).await;
    drop(socket);
    server.until_metric(ABORTED, 1.0).await;
    // No place waits, so this would be refused were the slot still taken.
    until("the place is free", async || {
        let answer = server.request("/v1/completions", &json!({"model": "base", "prompt": "x"})).send().await;
        (answer.expect("an answer").status().as_u16() == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_holds_up_nobody_and_loses_nothing() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (2, 0)).await;
    let body = json!({"model": "base", "prompt": "long", "max_tokens": 4000, "ignore_eos": true, "seed": 3});
    // Its head is read, its events are not: small windows would hold back what it was sent.
    let slow = server.stream("/v1/completions", body.clone()).await;
    for _ in 0..3 {
        assert_eq!(server.greedy("base", "quick", 20).await.len(), 20);
    }
    // The engine comes to the end without its client.
    server.until_metric(RUNNING, 0.0).await;
    let (text, finish) = joined(&slow.rest().await);
    assert_eq!((text.len(), finish.as_str()), (4000, "length"));
    assert_eq!(server.complete(body).await["choices"][0]["text"], text);
}
