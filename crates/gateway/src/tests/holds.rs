//! Requests that wait for a replica, before real sockets.
use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;
use serde_json::{Value, json};

use super::replica::{Act, LAST_CHUNK, Replica, completion, error, events};
use super::rig::{Rig, Setup, soon, start, start_with};
use crate::hold::HoldBounds;
use crate::testing::service;

const COMMENT: &str = ": waiting for a replica\n\n";

/// Services that sleep.
async fn asleep() -> Rig {
    start_with(&[], Setup { autoscaled: true, ..Setup::default() }).await
}

fn question(stream: bool) -> Value {
    json!({"model": "support", "prompt": "x", "max_tokens": 10, "stream": stream})
}

fn held(requests: usize) -> String {
    format!("lathe_gateway_requests_held {requests}")
}

#[tokio::test]
async fn who_asks_a_service_that_sleeps_is_answered_when_it_has_woken() {
    let rig = Arc::new(asleep().await);
    let asking: Vec<_> = (0..3)
        .map(|of| {
            let rig = Arc::clone(&rig);
            tokio::spawn(async move { rig.complete(&of.to_string()).await })
        })
        .collect();
    rig.until_metric(&held(3)).await;
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    rig.scale(&[replica.address], &[]);
    for asked in asking {
        assert_eq!(soon(asked).await.unwrap(), (200, json!({"choices": [{"text": "hi"}]})));
    }
    assert_eq!(replica.asked().len(), 3);
    rig.until_metric("lathe_gateway_holds_total 3").await;
    rig.until_metric("lathe_gateway_hold_seconds_count 3").await;
    rig.until_idle().await;
    rig.until_free().await;
}

#[tokio::test]
async fn an_adapter_and_the_list_of_models_do_not_wait_for_the_status() {
    let rig = asleep().await;
    let list: Value = rig.get("/v1/models").send().await.unwrap().json().await.unwrap();
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["team-a/late", "team-a/support", "team-a/tone"], "they are a request away");
    let asking = tokio::spawn(rig.post(&json!({"model": "tone", "prompt": "x"})).send());
    rig.until_metric(&held(1)).await;
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    rig.scale(&[replica.address], &[]);
    assert_eq!(soon(asking).await.unwrap().unwrap().status().as_u16(), 200);
    assert_eq!(replica.asked()[0].body["model"], "tone");
}

#[rstest]
#[case::whole(false)]
#[case::stream(true)]
#[tokio::test]
async fn a_client_that_leaves_leaves_its_place_and_pays_nothing(#[case] stream: bool) {
    let holds = HoldBounds { requests: 1, ..Setup::default().holds };
    let key = json!({"tokensPerMinute": 100});
    let rig = start_with(&[], Setup { autoscaled: true, holds, key, ..Setup::default() }).await;
    for left in 1..4 {
        let body = json!({"model": "support", "prompt": "x", "max_tokens": 90, "stream": stream});
        let asking = tokio::spawn(rig.post(&body).send());
        rig.until_metric(&held(1)).await;
        asking.abort();
        drop(asking.await);
        rig.until_free().await;
        rig.until_idle().await;
        rig.until_metric(&format!(
            r#"lathe_gateway_requests_total{{key="k",namespace="team-a",model="support",adapter="",code="499",by="client"}} {left}"#
        ))
        .await;
    }
}

#[rstest]
#[case::requests(1, 1 << 20)]
#[case::bytes(8, 100)]
#[tokio::test]
async fn one_more_than_may_wait_is_sent_away_at_once(#[case] requests: usize, #[case] bytes: usize) {
    let holds = HoldBounds { requests, bytes, ..Setup::default().holds };
    let rig = start_with(&[], Setup { autoscaled: true, holds, ..Setup::default() }).await;
    let asking = tokio::spawn(rig.post(&question(false)).send());
    rig.until_metric(&held(1)).await;
    let refused = rig.post(&question(true)).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"5".parse().unwrap()));
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "hold_full");
    rig.until_metric("lathe_gateway_holds_refused_total 1").await;
    asking.abort();
    rig.until_free().await;
}

#[tokio::test]
async fn a_stream_has_comments_while_it_waits_and_then_what_the_replica_writes() {
    let rig = asleep().await;
    let mut answer = soon(rig.post(&question(true)).send()).await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (200, &"text/event-stream".parse().unwrap())
    );
    assert_eq!(answer.headers()["x-accel-buffering"], "no");
    assert_eq!(soon(answer.chunk()).await.unwrap().unwrap(), COMMENT);
    // From here on the clock goes on by itself where everybody waits.
    tokio::time::pause();
    assert_eq!(answer.chunk().await.unwrap().unwrap(), COMMENT);
    tokio::time::resume();
    let said =
        ["data: {\"a\":\"\u{e9}\"}\n\n", ": half a", " comment\n\ndata: 2", "\n\n", "data: [DONE]\n\n"];
    let replica = Replica::start(Act::Says(events(&said) + LAST_CHUNK)).await;
    rig.scale(&[replica.address], &[]);
    let text = soon(answer.text()).await.unwrap();
    assert_eq!(text.replace(COMMENT, ""), said.concat());
    rig.until_metric(
        r#"lathe_gateway_generation_tokens_total{key="k",namespace="team-a",model="support",adapter=""} 5"#,
    )
    .await;
    rig.until_idle().await;
    rig.until_free().await;
}

/// The head has gone out: what would have been a status is the last event.
#[rstest]
#[case::refused(
    Act::Says(error(400, "context_length_exceeded", "")),
    "context_length_exceeded",
    "400\",by=\"replica"
)]
#[case::lost(Act::SaysAndCloses(String::new()), "upstream_failed", "502\",by=\"gateway")]
#[case::no_stream(Act::Says(completion("hi")), "upstream_failed", "502\",by=\"gateway")]
#[tokio::test]
async fn an_error_after_the_wait_ends_a_stream(#[case] act: Act, #[case] code: &str, #[case] counted: &str) {
    let rig = asleep().await;
    let answer = soon(rig.post(&question(true)).send()).await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    let replica = Replica::start(act).await;
    rig.scale(&[replica.address], &[]);
    let text = soon(answer.text()).await.unwrap().replace(COMMENT, "");
    let event: Value = serde_json::from_str(text.trim_end().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(event["error"]["code"], code, "{text}");
    assert!(text.ends_with("\n\n") && !text.contains("[DONE]"), "{text}");
    let labels = r#"key="k",namespace="team-a",model="support",adapter="""#;
    rig.until_metric(&format!(r#"lathe_gateway_requests_total{{{labels},code="{counted}"}} 1"#)).await;
    rig.until_free().await;
}

#[rstest]
#[case::whole(false)]
#[case::stream(true)]
#[tokio::test]
async fn who_waits_too_long_is_told(#[case] stream: bool) {
    let rig = asleep().await;
    let asking = tokio::spawn(rig.post(&question(stream)).send());
    rig.until_metric(&held(1)).await;
    tokio::time::pause();
    let answer = asking.await.unwrap().unwrap();
    let body = match stream {
        false => {
            assert_eq!(
                (answer.status().as_u16(), &answer.headers()["retry-after"]),
                (503, &"1".parse().unwrap())
            );
            answer.text().await.unwrap()
        }
        true => answer.text().await.unwrap().replace(COMMENT, "").strip_prefix("data: ").unwrap().to_owned(),
    };
    let body: Value = serde_json::from_str(body.trim_end()).unwrap();
    assert_eq!(body["error"]["code"], "no_replica");
    assert!(body["error"]["message"].as_str().unwrap().contains("within 300 s"), "{body}");
    tokio::time::resume();
    rig.until_free().await;
}

#[rstest]
#[case::whole(false)]
#[case::stream(true)]
#[tokio::test]
async fn a_gateway_that_goes_tells_who_waits(#[case] stream: bool) {
    let rig = asleep().await;
    let asking = tokio::spawn(rig.post(&question(stream)).send());
    rig.until_metric(&held(1)).await;
    rig.stop.cancel();
    rig.holds.close();
    let answer = soon(asking).await.unwrap().unwrap();
    assert_eq!(answer.status().as_u16(), if stream { 200 } else { 503 });
    assert_eq!(answer.headers().contains_key("retry-after"), !stream);
    assert!(soon(answer.text()).await.unwrap().contains("shutting_down"));
    soon(rig.ended).await.unwrap();
}

#[tokio::test]
async fn what_a_tenant_asked_goes_to_no_other_ones_replica() {
    let rig = asleep().await;
    let asking = tokio::spawn(rig.post(&question(false)).send());
    rig.until_metric(&held(1)).await;
    let [ours, theirs] = [
        Replica::start(Act::Says(completion("hi"))).await,
        Replica::start(Act::Says(completion("no"))).await,
    ];
    rig.scale(&[], &[theirs.address]);
    rig.scale(&[ours.address], &[theirs.address]);
    assert_eq!(soon(asking).await.unwrap().unwrap().status().as_u16(), 200);
    assert_eq!((ours.asked().len(), theirs.asked().len()), (1, 0));
    rig.until_idle().await;
    // What was deleted does not come back under its name.
    rig.scale(&[], &[theirs.address]);
    let asking = tokio::spawn(rig.post(&question(false)).send());
    rig.until_metric("lathe_gateway_holds_total 2").await;
    rig.delete();
    assert_eq!(soon(asking).await.unwrap().unwrap().status().as_u16(), 503);
    assert_eq!((ours.asked().len(), theirs.asked().len()), (1, 0));
}

/// Nobody's own doing: the table says that a replica is ready, and it is not there, or says that it goes.
#[rstest]
#[case::vanished(None, true)]
#[case::vanished_of_a_fixed_number(None, false)]
#[case::drains(Some(error(503, "shutting_down", "retry-after: 1\r\n")), false)]
#[tokio::test]
async fn who_meets_the_last_replica_going_waits_for_the_next(
    #[case] says: Option<String>,
    #[case] autoscaled: bool,
) {
    let last = match says {
        Some(says) => Replica::start(Act::Says(says)).await.address,
        None => Replica::nobody(),
    };
    let rig = start_with(&[last], Setup { autoscaled, ..Setup::default() }).await;
    let asking = tokio::spawn(rig.post(&question(false)).send());
    rig.until_metric("lathe_gateway_holds_total 1").await;
    let next = Replica::start(Act::Says(completion("hi"))).await;
    rig.scale(&[next.address], &[]);
    assert_eq!(soon(asking).await.unwrap().unwrap().status().as_u16(), 200);
    assert_eq!(next.asked().len(), 1);
}

#[tokio::test]
async fn a_cold_replica_without_room_is_asked_again_later() {
    let rig = asleep().await;
    let asking = tokio::spawn(rig.post(&question(false)).send());
    rig.until_metric(&held(1)).await;
    let replica = Replica::start(Act::Says(error(429, "rate_limit_exceeded", "retry-after: 7\r\n"))).await;
    let woken = tokio::time::Instant::now();
    rig.scale(&[replica.address], &[]);
    while replica.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    rig.until_metric(&held(1)).await;
    replica.now(Act::Says(completion("hi")));
    tokio::time::pause();
    assert_eq!(asking.await.unwrap().unwrap().status().as_u16(), 200);
    assert!(woken.elapsed() >= Duration::from_secs(7), "it said when");
    assert_eq!(replica.asked().len(), 2);
}

#[tokio::test]
async fn a_replica_is_not_charged_with_who_waits_for_it_to_load_an_adapter() {
    let rig = asleep().await;
    let asking = tokio::spawn(rig.post(&json!({"model": "tone", "prompt": "x"})).send());
    rig.until_metric(&held(1)).await;
    let replica = Replica::start(Act::Says(error(503, "model_not_ready", ""))).await;
    rig.scale(&[replica.address], &[]);
    while replica.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    rig.until_uncharged().await;
    replica.now(Act::Says(completion("hi")));
    assert_eq!(soon(asking).await.unwrap().unwrap().status().as_u16(), 200);
}

#[tokio::test]
async fn who_found_no_room_until_its_time_was_over_is_told_so() {
    let holds = HoldBounds { time: Duration::from_secs(3), ..Setup::default().holds };
    let rig = start_with(&[], Setup { autoscaled: true, holds, ..Setup::default() }).await;
    let asking = tokio::spawn(rig.post(&question(false)).send());
    rig.until_metric(&held(1)).await;
    let replica = Replica::start(Act::Says(error(429, "rate_limit_exceeded", "retry-after: 1\r\n"))).await;
    rig.scale(&[replica.address], &[]);
    let answer = soon(asking).await.unwrap().unwrap();
    assert_eq!(answer.status().as_u16(), 429);
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "rate_limit_exceeded");
    rig.until_free().await;
}

/// The status does not say yet who answers.
#[tokio::test]
async fn who_asks_for_an_adapter_after_the_wake_waits_as_those_before_do() {
    let replica = Replica::start(Act::Says(error(503, "model_not_ready", ""))).await;
    let services = vec![service("team-a", "support", &["tone"], &[])];
    let rig = start_with(&[replica.address], Setup { services, ..Setup::default() }).await;
    let asking = tokio::spawn(rig.post(&json!({"model": "tone", "prompt": "x"})).send());
    rig.until_metric("lathe_gateway_holds_total 1").await;
    replica.now(Act::Says(completion("hi")));
    assert_eq!(soon(asking).await.unwrap().unwrap().status().as_u16(), 200);
}

#[tokio::test]
async fn a_service_of_a_fixed_number_that_loses_its_last_replica_keeps_who_asks() {
    let first = Replica::start(Act::Says(completion("hi"))).await;
    let rig = start(&[first.address]).await;
    assert_eq!(rig.complete("x").await.0, 200);
    rig.scale(&[], &[]);
    let asking = tokio::spawn(rig.post(&question(false)).send());
    rig.until_metric(&held(1)).await;
    rig.scale(&[first.address], &[]);
    assert_eq!(soon(asking).await.unwrap().unwrap().status().as_u16(), 200);
}
