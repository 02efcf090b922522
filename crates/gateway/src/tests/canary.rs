//! Two revisions of a service on real sockets: who is answered by which, and that no request is lost with one of them.
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lathe_contract::{Ended, Traffic};
use rstest::rstest;
use serde_json::{Value, json};

use super::replica::{Act, LAST_CHUNK, Replica, completion, error, events};
use super::rig::{Rig, soon, start};
use super::traffic::poll;

async fn says(text: &str) -> Replica {
    Replica::start(Act::Says(completion(text))).await
}

/// Who answers this user.
async fn ask(rig: &Rig, user: u32) -> String {
    // Prompts that begin alike would all go to one replica.
    let (prompt, user) = (user.to_string(), format!("user-{user}"));
    let body = json!({"model": "support", "prompt": prompt, "max_tokens": 10, "user": user});
    let answer = soon(rig.post(&body).send()).await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    answer.json::<Value>().await.unwrap()["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn each_user_stays_on_one_side_and_a_higher_share_moves_users_to_the_candidate_alone() {
    let (stable, candidate) =
        ([says("old").await, says("old").await], [says("new").await, says("new").await]);
    let rig = start(&[]).await;
    let mut before = BTreeSet::new();
    for percent in [0, 10, 30, 100] {
        rig.try_out(&stable.clone().map(|r| r.address), &candidate.clone().map(|r| r.address), percent);
        let mut now = BTreeSet::new();
        for user in 0..300 {
            let side = ask(&rig, user).await;
            assert_eq!(ask(&rig, user).await, side, "{user} at {percent}");
            now.extend((side == "new").then_some(user));
        }
        assert!(before.is_subset(&now), "{percent}");
        // Five standard deviations of 300 users.
        let p = percent as f64 / 100.0;
        assert!(
            (now.len() as f64 - 300.0 * p).abs() <= 5.0 * (300.0 * p * (1.0 - p)).sqrt(),
            "{}",
            now.len()
        );
        before = now;
    }
    // Both replicas of a revision are used.
    let used = |replicas: &[Replica]| replicas.iter().all(|replica| !replica.asked().is_empty());
    assert!(used(&stable) && used(&candidate));
}

#[rstest]
#[case::it_breaks_off(Act::SaysAndCloses(String::new()))]
#[case::it_drains(Act::Says(error(503, "shutting_down", "retry-after: 1\r\n")))]
#[case::it_is_full(Act::Says(error(429, "overloaded", "retry-after: 1\r\n")))]
#[tokio::test]
async fn no_request_is_lost_with_a_candidate(#[case] act: Act) {
    let (stable, candidate) = (says("old").await, [says("new").await, says("new").await]);
    let rig = Arc::new(start(&[]).await);
    rig.try_out(&[stable.address], &[candidate[0].address, candidate[1].address, Replica::nobody()], 50);
    let clients: Vec<_> = (0..8)
        .map(|client| {
            let rig = Arc::clone(&rig);
            tokio::spawn(async move {
                for turn in 0..40 {
                    ask(&rig, 40 * client + turn).await;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
        })
        .collect();
    let tried = || candidate.iter().map(|replica| replica.asked().len()).sum::<usize>() >= 20;
    soon(async {
        while !tried() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    candidate.iter().for_each(|replica| replica.now(act.clone()));
    let before = stable.asked().len();
    for client in clients {
        soon(client).await.unwrap();
    }
    assert!(stable.asked().len() > before);
    // It is gone: its users are the stable revision's again.
    rig.try_out(&[stable.address], &[], 50);
    for user in 0..40 {
        assert_eq!(ask(&rig, user).await, "old");
    }
    rig.until_idle().await;
}

#[tokio::test]
async fn a_candidate_answers_where_the_stable_revision_has_nobody() {
    let candidate = says("new").await;
    let rig = start(&[]).await;
    rig.try_out(&[], &[candidate.address], 1);
    for user in 0..30 {
        assert_eq!(ask(&rig, user).await, "new");
    }
}

/// How requests ended by revision, once as many are told of.
async fn outcomes(rig: &Rig, requests: u64) -> [Ended; 2] {
    let (mut last, mut sums) = (Traffic::default(), [Ended::default(); 2]);
    while sums[0].requests + sums[1].requests < requests {
        let told = poll(rig, &last).await;
        for outcome in told.services.iter().flat_map(|service| &service.outcomes) {
            assert!(outcome.back < told.second - last.second);
            let side = ["old", "new"].iter().position(|name| *name == outcome.revision).unwrap();
            sums[side] = sums[side].and(outcome.ended);
        }
        last = Traffic { services: vec![], ..told };
    }
    sums
}

#[tokio::test]
async fn the_operator_is_told_how_each_revisions_requests_ended() {
    let (stable, candidate) = (says("old").await, says("new").await);
    let rig = start(&[]).await;
    rig.try_out(&[stable.address], &[candidate.address], 50);
    let (mut of_stable, mut of_candidate) = (Vec::new(), Vec::new());
    for user in 0..20 {
        if ask(&rig, user).await == "new" { of_candidate.push(user) } else { of_stable.push(user) }
    }
    let send = async |user: u32, stream: bool| {
        let body =
            json!({"model": "support", "prompt": "x", "stream": stream, "user": format!("user-{user}")});
        soon(soon(rig.post(&body).send()).await.unwrap().bytes()).await
    };
    // An answer as it streams: chat's opening and comments are no tokens.
    let pieces = [": wait\n\n", "data: {\"delta\":{\"content\":\"\"}}\n\n", "data: a\n\n", "data: b\n\n"];
    candidate.now(Act::Says(events(&pieces) + LAST_CHUNK));
    drop(send(of_candidate[0], true).await.unwrap());
    // Its own error, one of the client, half an answer, and one that the other revision answers.
    candidate.now(Act::Says(error(500, "internal_error", "")));
    drop(send(of_candidate[0], false).await.unwrap());
    candidate.now(Act::Says(error(400, "invalid_value", "")));
    drop(send(of_candidate[0], false).await.unwrap());
    candidate.now(Act::SaysAndCloses(events(&["data: a\n\n"])));
    drop(send(of_candidate[0], true).await.unwrap());
    candidate.now(Act::SaysAndCloses(String::new()));
    assert_eq!(ask(&rig, of_candidate[0]).await, "old");
    let [old, new] = outcomes(&rig, 26).await;
    let plain = |requests| Ended { requests, ..Ended::default() };
    assert_eq!(old, plain(of_stable.len() as u64 + 1));
    let (requests, errors) = (of_candidate.len() as u64 + 5, 3);
    // The worker counted five tokens.
    assert_eq!((new.requests, new.errors, new.streams, new.tokens), (requests, errors, 1, 4));
    let labels = r#"namespace="team-a",model="support",revision="candidate""#;
    rig.until_metric(&format!("lathe_gateway_canary_requests_total{{{labels}}} {requests}")).await;
    rig.until_metric(&format!("lathe_gateway_canary_errors_total{{{labels}}} {errors}")).await;
}
