//! The end: readiness first, then the answers in flight, then the process.
use lathe_contract::{Phase, Signer, exit};
use serde_json::json;

use crate::server::{Stream, joined, start, until};

#[tokio::test]
async fn what_is_in_flight_is_answered_to_its_end() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (1, 4)).await;
    let body = json!({"model": "base", "prompt": "long", "max_tokens": 1500, "ignore_eos": true});
    let mut running = server.stream("/v1/completions", body).await;
    running.next().await.expect("an event");
    let waiting =
        server.stream("/v1/completions", json!({"model": "base", "prompt": "x", "max_tokens": 4})).await;
    server.stop.cancel();
    until("it is unready", async || (server.ready().await == 503).then_some(())).await;
    assert_eq!(server.report().await.phase, Phase::Draining);
    until("nobody new is let in", async || {
        let asked = server.request("/v1/completions", &json!({"model": "base", "prompt": "x"})).send().await;
        match asked {
            Err(_) => Some(()),
            Ok(answer) => (answer.status().as_u16() == 503).then_some(()),
        }
    })
    .await;
    assert_eq!(joined(&running.rest().await).1, "length");
    let (text, finish) = joined(&waiting.rest().await);
    assert_eq!((text.len(), finish.as_str()), (4, "length"));
    assert_eq!(server.ended.await.expect("no panic"), exit::SUCCESS);
}

/// A stream that was cut off ends with an error event and without `[DONE]`.
async fn is_cut_off(stream: Stream) {
    let events = stream.rest().await;
    let last: serde_json::Value = serde_json::from_str(events.last().expect("an event")).expect("JSON");
    assert_eq!(last["error"]["code"], "shutting_down", "{last}");
}

#[tokio::test]
async fn a_second_signal_cuts_off_what_is_in_flight_with_an_error() {
    let server = start(|_, task| (task.max_sequences, task.max_waiting) = (1, 4)).await;
    let running = server.long_stream("base").await;
    let waiting =
        server.stream("/v1/completions", json!({"model": "base", "prompt": "x", "max_tokens": 4})).await;
    let whole = {
        let request = server.request("/v1/completions", &json!({"model": "base", "prompt": "x"}));
        tokio::spawn(async move { request.send().await.expect("an answer").status().as_u16() })
    };
    server.until_metric("vllm:num_requests_waiting{", 2.0).await;
    server.stop.cancel();
    server.abort.cancel();
    is_cut_off(running).await;
    is_cut_off(waiting).await;
    assert_eq!(whole.await.expect("no panic"), 503);
    assert_eq!(server.ended.await.expect("no panic"), exit::SUCCESS);
}

#[tokio::test]
async fn when_time_is_up_what_is_in_flight_is_cut_off() {
    let server = start(|_, task| task.drain_seconds = 0).await;
    let running = server.long_stream("base").await;
    server.stop.cancel();
    is_cut_off(running).await;
    assert_eq!(server.ended.await.expect("no panic"), exit::SUCCESS);
}

#[tokio::test]
async fn in_a_cluster_requests_are_taken_until_the_endpoints_know() {
    let key = Signer::from_seed(&[1; 32]).public_pem().ok();
    let server = start(|contract, _| contract.trust.operator_key = key).await;
    server.stop.cancel();
    until("it is unready", async || (server.ready().await == 503).then_some(())).await;
    assert_eq!(server.greedy("base", "late", 4).await.len(), 4);
    server.abort.cancel();
    assert_eq!(server.ended.await.expect("no panic"), exit::SUCCESS);
}

#[tokio::test]
async fn a_stop_while_the_model_is_loaded_is_no_failure() {
    let server = crate::server::launch(|_, _| {}).await;
    server.stop.cancel();
    assert_eq!(server.ended.await.expect("no panic"), exit::SUCCESS);
}
