//! A gateway on a real socket, which believes real tokens alone.
use std::sync::Mutex;

use axum::{
    Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use lathe_contract::{
    CURVES_PATH, Flow, JobCurves, ReplicaCapacity, Scope, ServiceTraffic, Signer, TRAFFIC_AUDIENCE,
    TRAFFIC_PATH, Traffic, Verifier,
};
use lathe_scaling::Window;

use super::*;
use crate::{
    channel::Channel,
    health::Health,
    testing::{Server, config, object, trust},
};

struct Fake {
    verifier: Verifier,
    asked: Mutex<Vec<TrafficQuery>>,
    /// Losses that were handed over, each call's.
    curves: Mutex<Vec<JobCurves>>,
    done: tokio::sync::Notify,
}

/// First something that is no report; then second 3, and one more at each call. From the fifth on a request is held, and the
/// sixth is never answered.
async fn answer(
    State(fake): State<Arc<Fake>>,
    Query(query): Query<TrafficQuery>,
    headers: HeaderMap,
) -> Response {
    let token = headers[header::AUTHORIZATION].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    let now = jiff::Timestamp::now().as_second();
    if fake.verifier.verify(token, TRAFFIC_AUDIENCE, Scope::Report, now).is_err() {
        return StatusCode::FORBIDDEN.into_response();
    }
    let after = query.after;
    let calls = {
        let mut asked = fake.asked.lock().unwrap();
        asked.push(query);
        asked.len()
    };
    if calls == 1 {
        return "no report".into_response();
    }
    if calls == 6 {
        fake.done.notify_one();
        std::future::pending::<()>().await;
    }
    let second = if after == 0 { 3 } else { after + 1 };
    let service = ServiceTraffic {
        outcomes: Vec::new(),
        uid: "s".to_owned(),
        seconds: vec![Flow { arrived: 2, ..Flow::default() }; (second - after) as usize],
        held: u64::from(calls >= 5),
        capacity: Some(ReplicaCapacity { prompt: 10.0, generation: 2.0, sequences: 4 }),
    };
    let told = Traffic { instance: "g 1".to_owned(), second, services: vec![service] };
    serde_json::to_vec(&told).unwrap().into_response()
}

/// Not at once: it does not know its jobs yet.
async fn take(State(fake): State<Arc<Fake>>, headers: HeaderMap, body: axum::body::Bytes) -> StatusCode {
    let token = headers[header::AUTHORIZATION].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    let now = jiff::Timestamp::now().as_second();
    if fake.verifier.verify(token, TRAFFIC_AUDIENCE, Scope::Curves, now).is_err() {
        return StatusCode::FORBIDDEN;
    }
    let mut curves = fake.curves.lock().unwrap();
    curves.push(JobCurves::parse(&body).unwrap());
    if curves.len() == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::NO_CONTENT }
}

#[tokio::test]
async fn a_gateway_is_asked_for_what_is_not_known_yet_and_one_that_is_gone_no_more() {
    let signer = || Signer::from_seed(&[7; 32]);
    let verifier = Verifier::from_pem(&signer().public_pem().unwrap()).unwrap();
    let (asked, done) = (Mutex::default(), tokio::sync::Notify::new());
    let fake = Arc::new(Fake { verifier, asked, curves: Mutex::default(), done });
    let router = Router::new()
        .route(TRAFFIC_PATH, get(answer))
        .route(CURVES_PATH, axum::routing::put(take))
        .with_state(fake.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, router).await });

    let (client, _server) = Server::start(&[]);
    let channel = Channel::on_port(signer(), port).unwrap();
    let context = Arc::new(Context::new(client, config(), channel, trust(), Health::new(Arc::default())));
    let progress = lathe_contract::TrainProgress { curve: vec![(1, 2.5)], ..Default::default() };
    let report = lathe_contract::Report { progress: Some(progress), ..Default::default() };
    context.curves.reported(&crate::curves::tests::job("a", "1"), &report);
    assert_eq!(hand_over(&context, "127.0.0.1", 0).await, None);
    let mut holds = context.traffic.holds();
    let mut loops = Loops::default();
    let pod = Awaited { uid: "p".to_owned(), ip: "127.0.0.1".to_owned(), ready: true, restarted: false };
    loops.follow(&context, std::slice::from_ref(&pod));
    // What is there already is not asked twice.
    loops.follow(&context, std::slice::from_ref(&pod));
    holds.changed().await.unwrap();
    assert_eq!(context.traffic.held().into_iter().collect::<Vec<_>>(), ["s"]);
    let capacity = lathe_scaling::Capacity { prompt: 10.0, generation: 2.0, sequences: 4 };
    assert_eq!(context.traffic.ledger().capacity("s"), Some(capacity));
    fake.done.notified().await;
    let queries: Vec<(String, u64)> =
        fake.asked.lock().unwrap().iter().map(|query| (query.instance.clone(), query.after)).collect();
    let known = |second| ("g 1".to_owned(), second);
    let nothing = || (String::new(), 0);
    assert_eq!(queries, [nothing(), nothing(), known(3), known(4), known(5), known(6)]);

    // Until it was taken, and then no more.
    let curves: Vec<_> =
        fake.curves.lock().unwrap().iter().map(|told| told.curves[0].points.clone()).collect();
    assert_eq!(curves, [[(1, 2.5)], [(1, 2.5)]]);

    let told = |context: &Context| context.traffic.ledger().window("s", context.traffic.now());
    assert_ne!(told(&context), Window::default());
    loops.follow(&context, &[]);
    assert!(loops.0.is_empty() && context.traffic.held().is_empty());
    let text = context.health.metrics.text().unwrap();
    assert!(text.contains("gateway_polls_total{outcome=\"failed\"} 1\n"), "{text}");
    assert!(text.contains("gateway_polls_total{outcome=\"answered\"} 4\n"), "{text}");
}

#[test]
fn only_a_pod_that_runs_can_be_asked() {
    const NOW: Seconds = 1_767_225_700;
    let of = |phase: &str, restarts: i32| {
        let pod: Pod = object(serde_json::json!({
            "metadata": {"uid": "u", "name": "p"},
            "status": {
                "phase": phase, "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "gateway", "image": "i", "imageID": "", "ready": true, "restartCount": restarts}],
            },
        }));
        let mut lost = pod.clone();
        // Its node is gone: it stays there, and nobody should wait for its part.
        lost.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            "2026-01-01T00:00:00Z".parse().unwrap(),
        ));
        assert_eq!(awaited(&lost, NOW), None);
        awaited(&pod, NOW)
    };
    assert_eq!(of("Pending", 0), None);
    assert_eq!(of("Succeeded", 0), None);
    assert_eq!(of("Running", 0).map(|pod| (pod.ready, pod.restarted)), Some((true, false)));
    assert_eq!(of("Running", 1).map(|pod| (pod.ready, pod.restarted)), Some((true, true)));
}
