//! What flows, as the operator asks for it.
use lathe_contract::{Flow, Scope, ServiceTraffic, Signer, TRAFFIC_AUDIENCE, TRAFFIC_PATH, Traffic};
use rstest::rstest;
use serde_json::{Value, json};

use super::replica::{Act, LAST_CHUNK, Replica, completion, events};
use super::rig::{Rig, Setup, soon, start, start_with};

const OPERATOR: [u8; 32] = [4; 32];

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

fn token() -> String {
    Signer::from_seed(&OPERATOR).sign(TRAFFIC_AUDIENCE, Scope::Report, now())
}

pub async fn poll(rig: &Rig, last: &Traffic) -> Traffic {
    let url = format!("{}{TRAFFIC_PATH}?instance={}&after={}", rig.admin, last.instance, last.second);
    let answer = soon(rig.client.get(url).bearer_auth(token()).send()).await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    Traffic::parse(&answer.bytes().await.unwrap()).unwrap()
}

/// The sum of everything that was told until this holds of it.
async fn until(rig: &Rig, holds: impl Fn(&Flow) -> bool) -> (Flow, ServiceTraffic) {
    let (mut last, mut sum) = (Traffic::default(), Flow::default());
    loop {
        let told = poll(rig, &last).await;
        assert!(told.second > last.second || told.services.iter().any(|service| service.held > 0));
        for service in &told.services {
            assert_eq!(service.uid, "uid-team-a-support");
            assert_eq!(service.seconds.len() as u64, (told.second - last.second).min(120));
            for flow in &service.seconds {
                sum.arrived += flow.arrived;
                sum.finished += flow.finished;
                sum.prompt += flow.prompt;
                sum.generation += flow.generation;
                (sum.running, sum.waiting, sum.held) = (flow.running, flow.waiting, flow.held);
            }
        }
        if holds(&sum) {
            return (sum, told.services[0].clone());
        }
        last = Traffic { services: vec![], ..told };
    }
}

#[tokio::test]
async fn the_operator_is_told_what_flows_and_what_a_replica_can_do() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let rig = start(&[replica.address]).await;
    assert_eq!(rig.complete("x").await.0, 200);
    let load = "endpoint-load-metrics: TEXT named_metrics.num_requests_running=1, named_metrics.num_requests_waiting=0, \
                named_metrics.capacity_prompt_tokens_per_second=90.0, named_metrics.capacity_generation_tokens_per_second=70.5, \
                named_metrics.capacity_sequences=4\r\ntrailer:";
    let pieces = ["data: 1\n\n"; 9];
    replica.now(Act::Says(events(&pieces).replace("trailer:", load) + LAST_CHUNK));
    let body = json!({"model": "support", "prompt": "x".repeat(400), "stream": true});
    drop(rig.post(&body).send().await.unwrap().bytes().await.unwrap());
    // Refused by its name: nobody's traffic.
    assert_eq!(
        rig.post(&json!({"model": "other", "prompt": "x"})).send().await.unwrap().status().as_u16(),
        404
    );
    replica.now(Act::SaysAndStalls(String::new()));
    let open = tokio::spawn(rig.post(&body).send());
    let (sum, service) = until(&rig, |sum| sum.running > 0.0 && sum.finished == 2).await;
    // The stream was estimated at 100 and 9, and counted by the worker as 11, of which 8 were cached, and 5.
    let flow = Flow { arrived: 3, finished: 2, running: 1.0, ..Flow::default() };
    assert_eq!(Flow { prompt: 0, generation: 0, ..sum }, flow);
    assert!((10..=107).contains(&sum.prompt) && (8..=12).contains(&sum.generation), "{sum:?}");
    let capacity = service.capacity.unwrap();
    assert_eq!((capacity.prompt, capacity.generation, capacity.sequences), (90.0, 70.5, 4));
    open.abort();
}

#[tokio::test]
async fn a_service_that_begins_to_be_waited_for_is_told_of_at_once() {
    let rig = start_with(&[], Setup { autoscaled: true, ..Setup::default() }).await;
    let mut last = poll(&rig, &Traffic::default()).await;
    // Whenever in its second it comes: the answer is there before the next one is over, at the latest.
    let asking = tokio::spawn(rig.post(&json!({"model": "support", "prompt": "x"})).send());
    let service = loop {
        let told = poll(&rig, &last).await;
        if let [service] = &told.services[..] {
            break service.clone();
        }
        last = told;
    };
    assert_eq!((service.uid.as_str(), service.held), ("uid-team-a-support", 1));
    let (sum, _) = until(&rig, |sum| sum.held == 1).await;
    assert_eq!((sum.arrived, sum.running), (1, 0.0));
    asking.abort();
    rig.until_free().await;
}

#[rstest]
#[case::nobody(None)]
#[case::another_object(Some(Signer::from_seed(&OPERATOR).sign("uid", Scope::Report, now())))]
#[case::another_purpose(Some(Signer::from_seed(&OPERATOR).sign(TRAFFIC_AUDIENCE, Scope::Inference, now())))]
#[case::expired(Some(Signer::from_seed(&OPERATOR).sign(TRAFFIC_AUDIENCE, Scope::Report, now() - 600)))]
#[case::the_gateways_own(Some(Signer::from_seed(&[3; 32]).sign(TRAFFIC_AUDIENCE, Scope::Report, now())))]
#[case::a_clients_key(Some(lathe_contract::new_key([1; 32]).0))]
#[tokio::test]
async fn nobody_but_the_operator_is_told(#[case] token: Option<String>) {
    let rig = start(&[]).await;
    let mut request = rig.client.get(format!("{}{TRAFFIC_PATH}", rig.admin));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let answer = soon(request.send()).await.unwrap();
    assert_eq!(answer.status().as_u16(), 401);
    assert!(
        answer.json::<Value>().await.unwrap()["error"]["message"]
            .as_str()
            .unwrap()
            .starts_with("Not allowed")
    );
}

#[tokio::test]
async fn a_query_that_is_none_and_a_path_of_clients_are_refused() {
    let rig = start(&[]).await;
    let odd = rig.client.get(format!("{}{TRAFFIC_PATH}?after=-1", rig.admin)).bearer_auth(token());
    let odd = odd.send().await.unwrap();
    assert_eq!(odd.status().as_u16(), 400);
    assert!(odd.text().await.unwrap().contains("whole number of seconds"));
    // On the port of clients there is no such path, whoever asks.
    let of_clients = rig.client.get(format!("{}{TRAFFIC_PATH}", rig.url)).bearer_auth(token());
    assert_eq!(of_clients.send().await.unwrap().status().as_u16(), 401);
    assert_eq!(rig.get(TRAFFIC_PATH).send().await.unwrap().status().as_u16(), 404);
}
