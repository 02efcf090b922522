//! Replicas that refuse, break off, drain and stall: nothing is lost silently, nothing is answered twice.
use rstest::rstest;
use serde_json::{Value, json};

use super::replica::{Act, Replica, completion, error, events};
use super::rig::{Rig, addresses, soon, start};

/// A replica of each kind; the first one asked is whichever hashing says, so both are told what to do.
async fn two(act: Act) -> [Replica; 2] {
    [Replica::start(act.clone()).await, Replica::start(act).await]
}

fn times(replicas: &[Replica]) -> usize {
    replicas.iter().map(|replica| replica.asked().len()).sum()
}

#[rstest]
#[case::reset_before_the_head(Act::SaysAndCloses(String::new()), "reset")]
#[case::half_a_head(Act::SaysAndCloses("HTTP/1.1 200 OK\r\ncontent-".into()), "reset")]
#[case::a_drain(Act::Says(error(503, "shutting_down", "retry-after: 1\r\n")), "drain")]
#[case::half_an_error(Act::SaysAndCloses(
    "HTTP/1.1 503 X\r\ncontent-length: 99\r\n\r\n{\"error\"".into()
), "reset")]
#[tokio::test]
async fn a_request_that_nothing_was_done_with_is_answered_by_another_replica(
    #[case] act: Act,
    #[case] reason: &str,
) {
    let (bad, good) = (Replica::start(act).await, Replica::start(Act::Says(completion("hi"))).await);
    let rig = start(&[bad.address, good.address]).await;
    let mut asked = 0;
    // Until one prompt's first choice is the bad one.
    while bad.asked().is_empty() {
        let (status, _) = rig.complete(&asked.to_string()).await;
        assert_eq!(status, 200);
        asked += 1;
    }
    assert_eq!((bad.asked().len(), good.asked().len()), (1, asked));
    // The same bytes went to both.
    assert_eq!(bad.asked()[0].body, good.asked()[asked - 1].body);
    rig.until_metric(&format!(r#"lathe_gateway_requests_repeated_total{{reason="{reason}"}} 1"#)).await;
    // It rests: nothing new goes there.
    rig.complete(&(asked - 1).to_string()).await;
    assert_eq!(bad.asked().len(), 1);
}

#[tokio::test]
async fn a_replica_that_does_not_listen_is_passed_over() {
    let good = Replica::start(Act::Says(completion("hi"))).await;
    let rig = start(&[Replica::nobody(), good.address]).await;
    for prompt in 0..20 {
        assert_eq!(rig.complete(&prompt.to_string()).await.0, 200);
    }
    assert_eq!(good.asked().len(), 20);
    rig.until_metric(r#"lathe_gateway_requests_repeated_total{reason="refused"} 1"#).await;
}

#[tokio::test]
async fn where_all_fail_the_client_is_told_and_a_request_that_may_have_killed_one_is_asked_once_more() {
    let act = Act::SaysAndCloses(String::new());
    let replicas =
        [Replica::start(act.clone()).await, Replica::start(act.clone()).await, Replica::start(act).await];
    let rig = start(&addresses(&replicas)).await;
    let (status, body) = rig.complete("x").await;
    assert_eq!((status, &body["error"]["code"]), (502, &json!("upstream_failed")));
    assert_eq!(times(&replicas), 2);
    assert!(replicas.iter().all(|replica| replica.asked().len() <= 1));
}

#[rstest]
#[case::bad_request(400, "invalid_value")]
#[case::too_long(400, "context_length_exceeded")]
#[case::internal(500, "internal_error")]
#[tokio::test]
async fn any_other_answer_passes_through_unchanged_and_is_not_repeated(
    #[case] status: u16,
    #[case] code: &str,
) {
    let replicas = two(Act::Says(error(status, code, "retry-after: 7\r\nx-request-id: abc\r\n"))).await;
    let rig = start(&addresses(&replicas)).await;
    let answer = rig.post(&json!({"model": "support", "prompt": "x"})).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), status);
    assert_eq!(answer.headers()["retry-after"], "7");
    assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
    // The gateway's own, which the worker logs as well.
    assert!(answer.headers()["x-request-id"].to_str().unwrap().starts_with("req_"));
    assert_eq!(answer.json::<Value>().await.unwrap(), json!({"error": {"message": code, "code": code}}));
    assert_eq!(times(&replicas), 1);
}

#[rstest]
#[case::not_yet(503, "model_not_ready")]
#[case::failed(503, "model_failed")]
#[case::unknown(404, "model_not_found")]
#[tokio::test]
async fn what_one_replica_lacks_is_asked_of_another(#[case] status: u16, #[case] code: &str) {
    let (lacks, has) = (
        Replica::start(Act::Says(error(status, code, ""))).await,
        Replica::start(Act::Says(completion("hi"))).await,
    );
    let rig = start(&[lacks.address, has.address]).await;
    let mut asked = 0;
    // It does not rest for it: what else it is asked for, it may have.
    while lacks.asked().len() < 2 {
        assert_eq!(rig.complete(&asked.to_string()).await.0, 200);
        asked += 1;
        assert!(asked < 1000, "no prompt goes to it twice");
    }
    assert_eq!(has.asked().len(), asked);
    rig.until_metric(r#"lathe_gateway_requests_repeated_total{reason="lacking"} 2"#).await;
}

#[rstest]
#[case::not_yet(503, "model_not_ready", 503, "model_not_ready", "7")]
#[case::failed(503, "model_failed", 503, "model_failed", "7")]
// The gateway knows it from the service's status: the client named it rightly.
#[case::unknown(404, "model_not_found", 503, "model_not_ready", "1")]
#[case::another_404(404, "not_found", 404, "not_found", "7")]
#[tokio::test]
async fn what_no_replica_has_is_asked_of_three_of_them(
    #[case] status: u16,
    #[case] code: &str,
    #[case] told: u16,
    #[case] told_code: &str,
    #[case] retry_after: &str,
) {
    let mut replicas = Vec::new();
    for _ in 0..5 {
        replicas.push(Replica::start(Act::Says(error(status, code, "retry-after: 7\r\n"))).await);
    }
    let rig = start(&addresses(&replicas)).await;
    let answer = rig.post(&json!({"model": "support", "prompt": "x"})).send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()),
        (told, retry_after)
    );
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], told_code);
    assert_eq!(times(&replicas), 3);
}

#[tokio::test]
async fn what_one_lacks_and_nobody_else_can_be_asked_for_is_not_there_yet() {
    let lacks = Replica::start(Act::Says(error(404, "model_not_found", ""))).await;
    let rig = start(&[lacks.address, Replica::nobody()]).await;
    for prompt in 0..10 {
        let (status, body) = rig.complete(&prompt.to_string()).await;
        assert_eq!((status, &body["error"]["code"]), (503, &json!("model_not_ready")));
    }
}

#[tokio::test]
async fn that_one_replica_lacks_it_is_told_only_where_the_others_say_nothing_else() {
    let (lacks, full) = (
        Replica::start(Act::Says(error(404, "model_not_found", ""))).await,
        Replica::start(Act::Says(error(429, "rate_limit_exceeded", "retry-after: 3\r\n"))).await,
    );
    let rig = start(&[lacks.address, full.address]).await;
    let mut asked = 0;
    while lacks.asked().is_empty() {
        let answer =
            rig.post(&json!({"model": "support", "prompt": asked.to_string()})).send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["retry-after"]),
            (429, &"3".parse().unwrap())
        );
        asked += 1;
        assert!(asked < 1000, "no prompt goes to the one that lacks it first");
    }
}

/// Two replicas of which the first has a long request; the second's address, by which prompts can be told apart.
async fn one_busy(rig: &Rig, replicas: &[Replica; 2]) -> (usize, usize) {
    let long = json!({"model": "support", "prompt": "a", "max_tokens": 1000});
    tokio::spawn(rig.post(&long).send());
    while times(replicas) == 0 {
        tokio::task::yield_now().await;
    }
    if replicas[0].asked().is_empty() { (1, 0) } else { (0, 1) }
}

#[tokio::test]
async fn a_full_replica_is_passed_over_for_one_with_less_to_do() {
    let replicas = two(Act::SaysAndStalls(String::new())).await;
    let rig = start(&addresses(&replicas)).await;
    let (busy, idle) = one_busy(&rig, &replicas).await;
    replicas[busy].now(Act::Says(error(429, "rate_limit_exceeded", "retry-after: 3\r\n")));
    replicas[idle].now(Act::Says(completion("hi")));
    // Until one prompt's first choice is the busy one: its cache counts for more than its one request.
    let mut prompts = 0;
    while replicas[busy].asked().len() == 1 {
        assert_eq!(rig.complete(&prompts.to_string()).await.0, 200);
        prompts += 1;
        assert!(prompts < 1000, "no prompt goes to the busy one");
    }
    rig.until_metric(r#"lathe_gateway_requests_repeated_total{reason="full"} 1"#).await;
    assert_eq!((replicas[busy].asked().len(), replicas[idle].asked().len()), (2, prompts));
    assert_eq!(replicas[busy].asked()[1].body, replicas[idle].asked()[prompts - 1].body);
}

#[tokio::test]
async fn where_the_idle_replica_is_full_the_busy_one_is_not_bothered() {
    let replicas = two(Act::SaysAndStalls(String::new())).await;
    let rig = start(&addresses(&replicas)).await;
    let (busy, idle) = one_busy(&rig, &replicas).await;
    replicas[busy].now(Act::Says(completion("hi")));
    replicas[idle].now(Act::Says(error(429, "rate_limit_exceeded", "retry-after: 5\r\n")));
    let mut prompts = 0;
    while replicas[idle].asked().is_empty() {
        let before = replicas[busy].asked().len();
        let request = rig.post(&json!({"model": "support", "prompt": prompts.to_string(), "max_tokens": 10}));
        let answer = request.send().await.unwrap();
        if answer.status().as_u16() != 200 {
            assert_eq!(
                (answer.status().as_u16(), &answer.headers()["retry-after"]),
                (429, &"5".parse().unwrap())
            );
            assert_eq!(replicas[busy].asked().len(), before);
        }
        prompts += 1;
        assert!(prompts < 1000, "no prompt goes to the idle one");
    }
}

/// The client's key was good: it must not be told otherwise, or it would be changed for nothing.
#[rstest]
#[case(401)]
#[case(403)]
#[tokio::test]
async fn a_replica_that_does_not_believe_the_gateway_is_the_gateways_trouble(#[case] status: u16) {
    let replicas = two(Act::Says(error(status, "invalid_api_key", "www-authenticate: Bearer\r\n"))).await;
    let rig = start(&addresses(&replicas)).await;
    let answer = rig.post(&json!({"model": "support", "prompt": "x"})).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 502);
    assert!(!answer.headers().contains_key("www-authenticate"));
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "upstream_failed");
    assert_eq!(times(&replicas), 1);
    rig.until_metric("lathe_gateway_tokens_refused_total 1").await;
}

#[tokio::test]
async fn a_replica_that_answers_with_errors_alone_is_left_alone_while_another_is_there() {
    let (bad, good) = (
        Replica::start(Act::Says(error(500, "internal_error", ""))).await,
        Replica::start(Act::Says(completion("hi"))).await,
    );
    let rig = start(&[bad.address, good.address]).await;
    // Until one prompt's first choice is the bad one.
    let mut prompts = 0;
    while bad.asked().is_empty() {
        prompts += 1;
        rig.complete(&prompts.to_string()).await;
    }
    let mut errors = 1;
    while rig.complete(&prompts.to_string()).await.0 == 500 {
        errors += 1;
        assert!(errors <= 5, "it is asked again and again");
    }
    assert_eq!((errors, bad.asked().len()), (5, 5));
}

#[tokio::test]
async fn a_stream_that_breaks_between_events_ends_with_an_error_and_is_not_repeated() {
    let replicas = two(Act::SaysAndCloses(events(&["data: 1\n\n"]))).await;
    let rig = start(&addresses(&replicas)).await;
    let body = json!({"model": "support", "prompt": "x", "stream": true});
    let text = rig.post(&body).send().await.unwrap().text().await.unwrap();
    let (first, last) = text.split_once("\n\n").unwrap();
    assert_eq!(first, "data: 1");
    let error: Value = serde_json::from_str(last.trim_end().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "upstream_failed");
    assert_eq!(times(&replicas), 1);
    rig.until_metric(r#"lathe_gateway_streams_broken_total{by="replica"} 1"#).await;
}

#[rstest]
#[case::within_an_event(events(&["data: 1\n\n", "data: 2"]), true)]
#[case::within_a_whole_answer("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{\"choices\"".to_owned(), true)]
// Where no byte of the body came, the head may not have gone out either.
#[case::no_byte_of_a_whole_answer("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n".to_owned(), false)]
#[tokio::test]
async fn an_answer_that_breaks_elsewhere_is_broken_for_the_client_too(
    #[case] said: String,
    #[case] begun: bool,
) {
    let replicas = two(Act::SaysAndCloses(said)).await;
    let rig = start(&addresses(&replicas)).await;
    match rig.post(&json!({"model": "support", "prompt": "x", "stream": true})).send().await {
        Ok(answer) => {
            assert_eq!(answer.status().as_u16(), 200);
            assert!(answer.bytes().await.is_err());
        }
        Err(error) => assert!(!begun, "{error}"),
    }
    assert_eq!(times(&replicas), 1);
}

#[tokio::test]
async fn a_stream_that_falls_silent_ends_with_an_error() {
    let replicas = two(Act::SaysAndStalls(events(&["data: 1\n\n"]))).await;
    let rig = start(&addresses(&replicas)).await;
    let body = json!({"model": "support", "prompt": "x", "stream": true});
    let mut answer = rig.post(&body).send().await.unwrap();
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "data: 1\n\n");
    // From here on the clock goes on by itself where everybody waits.
    tokio::time::pause();
    let rest = answer.text().await.unwrap();
    assert!(rest.contains("upstream_failed") && !rest.contains("[DONE]"), "{rest}");
    assert_eq!(times(&replicas), 1);
}

#[tokio::test]
async fn a_replica_that_never_answers_is_given_up_and_no_other_is_asked() {
    let replicas = two(Act::SaysAndStalls(String::new())).await;
    let rig = start(&addresses(&replicas)).await;
    let asking = tokio::spawn(rig.post(&json!({"model": "support", "prompt": "x"})).send());
    while times(&replicas) == 0 {
        tokio::task::yield_now().await;
    }
    tokio::time::pause();
    let answer = asking.await.unwrap().unwrap();
    assert_eq!(answer.status().as_u16(), 504);
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "upstream_timeout");
    assert_eq!(times(&replicas), 1);
    // The next one goes elsewhere.
    for replica in &replicas {
        replica.now(Act::Says(completion("hi")));
    }
    assert_eq!(rig.complete("x").await.0, 200);
    assert!(replicas.iter().all(|replica| replica.asked().len() == 1));
}

/// Whatever the replicas do, every request gets one answer, and each replica saw it at most once.
#[tokio::test]
async fn of_many_requests_over_failing_replicas_none_is_lost_and_none_answered_twice() {
    let acts = [
        Act::Says(completion("hi")),
        Act::SaysAndCloses(String::new()),
        Act::SaysAndCloses(completion("hi")),
        Act::Says(error(429, "rate_limit_exceeded", "retry-after: 1\r\n")),
    ];
    let replicas = [
        Replica::start(acts[0].clone()).await,
        Replica::start(acts[0].clone()).await,
        Replica::start(acts[0].clone()).await,
    ];
    let rig = std::sync::Arc::new(start(&addresses(&replicas)).await);
    let mut answered = std::collections::BTreeMap::new();
    for round in 0..60usize {
        for (at, replica) in replicas.iter().enumerate() {
            // The last one drains from the middle on, and stays so.
            let drains = at == 2 && round >= 30;
            replica.now(match drains {
                true => Act::Says(error(503, "shutting_down", "")),
                false => acts[(round * 7 + at * 3 + round / 5) % acts.len()].clone(),
            });
        }
        let asking: Vec<_> = (0..4)
            .map(|of| {
                let (rig, prompt) = (rig.clone(), format!("{round}-{of}"));
                tokio::spawn(async move { rig.complete(&prompt).await.0 })
            })
            .collect();
        for task in asking {
            *answered.entry(soon(task).await.unwrap()).or_insert(0) += 1;
        }
    }
    assert_eq!(answered.values().sum::<usize>(), 240);
    assert!(answered.keys().all(|status| [200, 429, 502, 503].contains(status)), "{answered:?}");
    assert!(answered[&200] > 60, "{answered:?}");
    for replica in &replicas {
        let mut prompts: Vec<_> = replica.asked().iter().map(|a| a.body["prompt"].to_string()).collect();
        let all = prompts.len();
        prompts.sort();
        prompts.dedup();
        assert_eq!(prompts.len(), all, "a replica was asked twice");
    }
    rig.until_idle().await;
}
