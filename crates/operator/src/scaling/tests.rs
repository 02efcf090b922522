//! Rounds against a scripted API server: what is written, and that nothing is where nothing changed.
use kube::core::DeserializeGuard;
use lathe_contract::{Flow, ServiceTraffic, Traffic as Answer};
use serde_json::{Value, json};

use super::*;
use crate::testing::{Call, Server, context, failure, filled, object, paths, sent};

const DEPLOYMENT: &str = "PATCH /apis/apps/v1/namespaces/n/deployments/svc-serve lathe-scaler";
const STATUS: &str = "PATCH /apis/lathe.dev/v1alpha1/namespaces/n/inferenceservices/svc/status lathe-scaler";

fn service(autoscaling: Value, status: Value) -> InferenceService {
    object(json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": "svc", "namespace": "n", "uid": "uid-svc", "generation": 1},
        "spec": {"modelRef": {"name": "base"}, "access": "GatewayOnly", "autoscaling": autoscaling},
        "status": status,
    }))
}

fn sleepy() -> Value {
    json!({"minReplicas": 0, "maxReplicas": 3})
}

/// The scaler has set `asked`; somebody made it `is`.
fn deployment(asked: &str, is: i32) -> Deployment {
    object(json!({
        "metadata": {
            "name": "svc-serve", "namespace": "n", "uid": "uid-d", "annotations": {"lathe.dev/replicas": asked},
            "ownerReferences": [{"apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService", "name": "svc", "uid": "uid-svc", "controller": true}],
        },
        "spec": {"replicas": is, "selector": {}, "template": {}},
    }))
}

struct World {
    context: Arc<Context>,
    stores: Stores,
    server: Server,
}

impl World {
    fn new(service: &InferenceService, deployment: Deployment, answers: &[(&str, u16, Value)]) -> Self {
        let (client, server) = Server::start(answers);
        let context = context(client);
        let stores = Stores {
            services: filled(vec![DeserializeGuard(Ok(service.clone()))]),
            deployments: filled(vec![deployment]),
            pods: filled(Vec::new()),
        };
        let pod = ledger::Awaited { uid: "g".to_owned(), ip: String::new(), ready: true, restarted: false };
        context.traffic.ledger().expect([&pod]);
        Self { context, stores, server }
    }

    /// The gateway tells of its second, with so many requests held.
    fn hear(&self, second: u64, held: u64) {
        let seconds = vec![Flow { held, ..Flow::default() }];
        let service =
            ServiceTraffic { uid: "uid-svc".to_owned(), seconds, held, ..ServiceTraffic::default() };
        let answer = Answer { instance: "i".to_owned(), second, services: vec![service] };
        self.context.traffic.hear("g", answer);
    }

    async fn round(&self, service: &InferenceService, state: &mut Option<State>) -> Result<(), Error> {
        round::round(&self.context, &self.stores, service, &[], state).await
    }

    async fn calls(self) -> Vec<Call> {
        drop((self.context, self.stores));
        self.server.calls().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_held_request_wakes_a_service_and_is_told_with_its_reason() {
    let service = service(sleepy(), json!({"observedGeneration": 1, "scaling": {"replicas": 0}}));
    assert_eq!(begin(&service), 0);
    let world = World::new(&service, deployment("0", 0), &[]);
    world.hear(100, 0);
    world.hear(101, 2);
    let mut state = None;
    world.round(&service, &mut state).await.unwrap();
    let calls = world.calls().await;
    assert_eq!(paths(&calls), [DEPLOYMENT, STATUS]);
    let written: Value = sent(&calls, DEPLOYMENT);
    assert_eq!(written["spec"], json!({"replicas": 1}));
    assert_eq!(written["metadata"]["annotations"], json!({"lathe.dev/replicas": "1"}));
    let status: Value = sent::<Value>(&calls, STATUS)["status"].clone();
    let decision = &status["decisions"][0];
    assert_eq!((&decision["from"], &decision["to"]), (&json!(0), &json!(1)));
    assert_eq!(decision["reason"], "RequestHeld");
    assert_eq!(status["scaling"]["replicas"], 1);
    // Nobody else's fields are taken.
    assert_eq!(status.as_object().unwrap().len(), 2, "{status}");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_sleeps_is_written_once_and_then_left_alone() {
    let service = service(sleepy(), json!({"observedGeneration": 1}));
    let world = World::new(&service, deployment("0", 0), &[]);
    let mut state = None;
    for second in 100..120 {
        world.hear(second, 0);
        world.round(&service, &mut state).await.unwrap();
        tokio::time::advance(ROUND).await;
    }
    assert_eq!(paths(&world.calls().await), [STATUS]);
}

#[tokio::test(start_paused = true)]
async fn what_somebody_makes_of_the_replicas_is_set_right() {
    let status = json!({"observedGeneration": 1, "scaling": {"replicas": 1}});
    let service = service(json!({"minReplicas": 1, "maxReplicas": 3}), status);
    let world = World::new(&service, deployment("1", 7), &[]);
    world.round(&service, &mut None).await.unwrap();
    let calls = world.calls().await;
    assert_eq!(paths(&calls), [DEPLOYMENT]);
    assert_eq!(sent::<Value>(&calls, DEPLOYMENT)["spec"]["replicas"], 1);
}

#[tokio::test(start_paused = true)]
async fn a_number_that_is_refused_is_told_once_and_tried_again_after_pauses_that_grow() {
    let status = json!({"observedGeneration": 1, "scaling": {"replicas": 1}});
    let service = service(json!({"minReplicas": 2, "maxReplicas": 3}), status);
    let world =
        World::new(&service, deployment("1", 1), &[(DEPLOYMENT, 403, failure(403, "exceeded quota"))]);
    let mut state = None;
    let mut tried = Vec::new();
    for second in 0..20 {
        let done = world.round(&service, &mut state).await;
        tried.extend(done.err().map(|error| (second, error.category())));
        tokio::time::advance(ROUND).await;
    }
    let refused = "WriteRefused";
    assert_eq!(tried, [(0, refused), (2, refused), (6, refused), (14, refused)]);
    let calls = world.calls().await;
    assert_eq!(paths(&calls), [DEPLOYMENT, STATUS, DEPLOYMENT, DEPLOYMENT, DEPLOYMENT]);
    assert_eq!(crate::testing::told(&calls), [refused]);
    let status = &sent::<Value>(&calls, STATUS)["status"];
    let scaling = &status["scaling"];
    assert_eq!((&scaling["blocked"], &scaling["replicas"]), (&json!(refused), &json!(1)));
    let message = scaling["message"].as_str().unwrap();
    assert!(message.contains("exceeded quota. Next: have that allowed"), "{message}");
    // What was not carried out is no decision.
    assert_eq!(status["decisions"], Value::Null);

    // It is allowed by now; whoever leads by then knows that it was not.
    let mut told = service.clone();
    told.status = Some(object(json!({"observedGeneration": 1, "scaling": scaling})));
    let world = World::new(&told, deployment("1", 1), &[]);
    world.round(&told, &mut None).await.unwrap();
    let calls = world.calls().await;
    assert_eq!(paths(&calls), [DEPLOYMENT, STATUS]);
    let status = &sent::<Value>(&calls, STATUS)["status"];
    assert_eq!((&status["scaling"]["blocked"], &status["scaling"]["message"]), (&Value::Null, &Value::Null));
    assert_eq!(status["decisions"][0]["to"], 2);
}

#[tokio::test(start_paused = true)]
async fn notes_that_are_refused_are_tried_again_after_pauses_that_grow() {
    let service = service(sleepy(), json!({"observedGeneration": 1}));
    let world = World::new(&service, deployment("0", 0), &[(STATUS, 403, failure(403, "Forbidden"))]);
    let mut state = None;
    for _ in 0..20 {
        let _refused = world.round(&service, &mut state).await;
        tokio::time::advance(ROUND).await;
    }
    assert_eq!(paths(&world.calls().await), [STATUS; 4]);
}

#[tokio::test(start_paused = true)]
async fn what_was_not_taken_is_decided_anew_and_no_decision_until_then() {
    let status = json!({"observedGeneration": 1, "scaling": {"replicas": 1}});
    let service = service(json!({"minReplicas": 2, "maxReplicas": 3}), status);
    let refused = [(DEPLOYMENT, 500, failure(500, "InternalError"))];
    let world = World::new(&service, deployment("1", 1), &refused);
    let mut state = None;
    for _ in 0..2 {
        assert_eq!(world.round(&service, &mut state).await.unwrap_err().category(), "WriteFailed");
    }
    assert_eq!(paths(&world.calls().await), [DEPLOYMENT, DEPLOYMENT]);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_scaled_no_more_loses_the_notes_and_its_replicas_are_left_alone() {
    let status = json!({"observedGeneration": 1, "scaling": {"replicas": 1}});
    let mut service = service(sleepy(), status);
    service.spec.autoscaling = None;
    assert!(is_scaled(&service));
    let world = World::new(&service, deployment("1", 1), &[]);
    world.round(&service, &mut None).await.unwrap();
    let calls = world.calls().await;
    assert_eq!(paths(&calls), [STATUS]);
    assert_eq!(sent::<Value>(&calls, STATUS)["status"], json!({}));
    service.status = None;
    assert!(!is_scaled(&service));
}

#[tokio::test(start_paused = true)]
async fn a_deployment_of_somebody_else_is_left_alone() {
    let service = service(json!({"minReplicas": 2, "maxReplicas": 3}), json!({"observedGeneration": 1}));
    let mut foreign = deployment("1", 1);
    foreign.metadata.owner_references = None;
    let world = World::new(&service, foreign, &[]);
    world.round(&service, &mut None).await.unwrap();
    assert!(world.calls().await.is_empty());
}

/// Held requests and seconds begin rounds; one that takes long is not begun twice.
#[tokio::test(start_paused = true)]
async fn a_request_that_is_held_begins_a_round_at_once() {
    let service = service(sleepy(), json!({"observedGeneration": 1, "scaling": {"replicas": 0}}));
    let World { context, stores, server } = World::new(&service, deployment("0", 0), &[]);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let scaler = Scaler::new(context.clone(), stores.clone());
    let running = tokio::spawn(scaler.run(Box::pin(async {}), stopped));
    let world = World { context, stores, server };
    world.hear(100, 0);
    // The first round of the interval is over, and time stands still until all tasks wait.
    tokio::time::sleep(Duration::from_millis(1)).await;
    world.hear(100, 1);
    tokio::time::sleep(Duration::from_millis(1)).await;
    stop.send(true).unwrap();
    running.await.unwrap();
    assert_eq!(paths(&world.calls().await), [DEPLOYMENT, STATUS]);
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_decides_once_the_gateways_have_told_what_flowed_before_it() {
    let service = service(json!({"minReplicas": 1, "maxReplicas": 3}), json!({"observedGeneration": 1}));
    let world = World::new(&service, deployment("1", 1), &[]);
    let scaler = Scaler::new(world.context.clone(), world.stores.clone());
    let begun = |only: Option<&str>| {
        let mut rounds = Rounds::default();
        let only = only.map(|uid| HashSet::from([uid.to_owned()]));
        scaler.begin_rounds(only.as_ref(), &mut rounds);
        rounds.under_way.len()
    };
    world.hear(100, 0);
    // Where its seconds lie is known with its second answer.
    assert_eq!((begun(None), begun(Some("uid-svc"))), (0, 1));
    tokio::task::yield_now().await;
    world.hear(101, 0);
    assert_eq!(begun(None), 1);
    tokio::task::yield_now().await;
    // One that says nothing is not waited for for ever.
    let new = ledger::Awaited { uid: "h".to_owned(), ip: String::new(), ready: true, restarted: false };
    world.context.traffic.ledger().expect([&new]);
    assert_eq!(begun(None), 0);
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(begun(None), 1);
}

/// A scaler that runs, and its API server, which answers when the test does.
struct Slow {
    world: (Arc<Context>, Stores),
    running: tokio::task::JoinHandle<()>,
    stop: tokio::sync::watch::Sender<bool>,
    server: tower_test::mock::Handle<http::Request<kube::client::Body>, http::Response<kube::client::Body>>,
}

impl Slow {
    /// A service that sleeps.
    async fn start() -> Self {
        let service = service(sleepy(), json!({"observedGeneration": 1, "scaling": {"replicas": 0}}));
        let World { stores, .. } = World::new(&service, deployment("0", 0), &[]);
        let (client, server) = tower_test::mock::pair();
        let context = context(kube::Client::new(client, "default"));
        let pod = ledger::Awaited { uid: "g".to_owned(), ip: String::new(), ready: true, restarted: false };
        context.traffic.ledger().expect([&pod]);
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let scaler = Scaler::new(context.clone(), stores.clone());
        let running = tokio::spawn(scaler.run(Box::pin(async {}), stopped));
        let mut slow = Self { world: (context, stores), running, stop, server };
        // The first round of the interval only notes that it sleeps.
        slow.hear(100, 0);
        slow
    }

    fn hear(&mut self, second: u64, held: u64) {
        let service = ServiceTraffic { uid: "uid-svc".to_owned(), held, ..ServiceTraffic::default() };
        let answer = Answer { instance: "i".to_owned(), second, services: vec![service] };
        self.world.0.traffic.hear("g", answer);
    }

    /// Waits for the next call that is no event, which is answered as an echo once `meanwhile` is over.
    async fn answer(&mut self, meanwhile: impl AsyncFnOnce(&mut Self)) -> String {
        let mut meanwhile = Some(meanwhile);
        loop {
            let (request, reply) = self.server.next_request().await.unwrap();
            let (parts, body) = request.into_parts();
            let call = format!("{} {}", parts.method, parts.uri.path());
            let is_event = call.ends_with("/events");
            if !is_event && let Some(meanwhile) = meanwhile.take() {
                meanwhile(self).await;
            }
            let body = body.collect_bytes().await.unwrap();
            reply.send_response(http::Response::new(kube::client::Body::from(body)));
            if !is_event {
                return call;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_round_that_is_under_way_is_finished_before_the_scaler_ends() {
    let mut slow = Slow::start().await;
    slow.hear(101, 1);
    let call = slow
        .answer(async |slow| {
            slow.stop.send(true).unwrap();
            // Whoever ends now gives the lease away, and the write comes after it.
            let ended = tokio::time::timeout(Duration::from_secs(60), &mut slow.running).await;
            assert!(ended.is_err(), "it ended while a write was under way");
        })
        .await;
    assert!(DEPLOYMENT.starts_with(&call), "{call}");
    let call = slow.answer(async |_| {}).await;
    assert!(STATUS.starts_with(&call), "{call}");
    slow.running.await.unwrap();
    drop(slow.world);
    assert!(slow.server.next_request().await.is_none(), "a write after the end");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_held_during_a_round_begins_the_next_one_at_once() {
    let mut slow = Slow::start().await;
    slow.hear(101, 1);
    let began = tokio::time::Instant::now();
    slow.answer(async |slow| {
        // The one that was held is answered or gone, and another one comes.
        slow.hear(102, 0);
        slow.hear(103, 1);
        tokio::task::yield_now().await;
    })
    .await;
    slow.answer(async |_| {}).await;
    // The watch has not brought the first write: the second round does the same again.
    let call = slow.answer(async |_| {}).await;
    assert!(DEPLOYMENT.starts_with(&call), "{call}");
    assert_eq!(began.elapsed(), Duration::ZERO, "it waited for the next second");
}

#[test]
fn each_service_has_its_own_pods() {
    let pod = |namespace: &str, name: &str, service: Value| -> Pod {
        object(json!({"metadata": {"namespace": namespace, "name": name, "labels": service}}))
    };
    let of = |service: &str| json!({"lathe.dev/name": service});
    let pods = by_service(&filled(vec![
        pod("a", "1", of("shop")),
        pod("a", "2", of("shop")),
        pod("b", "1", of("shop")),
        pod("a", "3", of("other")),
        pod("a", "4", json!({})),
    ]));
    let names = |namespace: &str, service: &str| {
        let found = pods.get(&(namespace.to_owned(), service.to_owned()));
        let mut names: Vec<String> = found.into_iter().flatten().map(|pod| pod.name_any()).collect();
        names.sort();
        names
    };
    assert_eq!(
        (names("a", "shop"), names("b", "shop")),
        (vec!["1".into(), "2".into()], vec!["1".to_owned()])
    );
    assert_eq!((names("a", "other"), pods.len()), (vec!["3".to_owned()], 3));
}

/// The Deployment asks for pods of `new`; these are there, of other revisions perhaps.
fn can(world: &World, status: &Value, pods: &[(&str, bool)], revision: &mut Option<String>) -> Option<f64> {
    let mut deployment = deployment("1", 1);
    let template = json!({"metadata": {"annotations": {"lathe.dev/contract-checksum": "new"}}});
    deployment.spec.as_mut().unwrap().template = object(template);
    let pods: Vec<Pod> = pods
        .iter()
        .map(|(checksum, is_ready)| {
            object(json!({
                "metadata": {"name": "p", "annotations": {"lathe.dev/contract-checksum": checksum}},
                "status": {"conditions": [{"type": "Ready", "status": if *is_ready { "True" } else { "False" }}]},
            }))
        })
        .collect();
    let (pods, service): (Vec<&Pod>, _) = (pods.iter().collect(), service(sleepy(), status.clone()));
    round::capacity(&world.context, &service, &deployment, &pods, revision).map(|capacity| capacity.prompt)
}

#[tokio::test]
async fn what_replicas_of_another_revision_could_do_decides_nothing_once_they_are_gone() {
    let world = World::new(&service(sleepy(), Value::Null), deployment("1", 1), &[]);
    let known = |revision: &str| {
        let known = json!({"revision": revision, "prompt": "100", "generation": "3", "sequences": 16});
        json!({"observedGeneration": 1, "throughput": {"capacityPerReplica": known}})
    };
    let mut second = 0;
    let mut told = |world: &World| {
        let capacity = Some(lathe_contract::ReplicaCapacity { prompt: 50.0, generation: 2.0, sequences: 4 });
        let service = ServiceTraffic { uid: "uid-svc".to_owned(), capacity, ..ServiceTraffic::default() };
        second += 1;
        let answer = Answer { instance: "i".to_owned(), second, services: vec![service] };
        world.context.traffic.hear("g", answer);
    };
    let at_new = || Some("new".to_owned());
    // The status knows of which revision its figure is.
    assert_eq!(can(&world, &known("new"), &[], &mut at_new()), Some(100.0));
    assert_eq!(can(&world, &known("old"), &[("old", true), ("new", false)], &mut at_new()), Some(100.0));
    assert_eq!(can(&world, &known("old"), &[("old", false), ("new", true)], &mut at_new()), None);
    assert_eq!(can(&world, &known(""), &[("new", true)], &mut at_new()), None);
    // Gateways do not: theirs counts while there is one revision, and from then on.
    told(&world);
    assert_eq!(can(&world, &Value::Null, &[("new", true)], &mut at_new()), Some(50.0));
    assert_eq!(can(&world, &Value::Null, &[("new", true), ("old", false)], &mut at_new()), None);
    assert_eq!(can(&world, &Value::Null, &[("new", true)], &mut at_new()), None);
    told(&world);
    // It slept while its model was changed.
    let mut revision = Some("old".to_owned());
    assert_eq!(can(&world, &Value::Null, &[], &mut revision), None);
    assert_eq!(revision.as_deref(), Some("new"));
    told(&world);
    assert_eq!(can(&world, &Value::Null, &[("new", true)], &mut revision), Some(50.0));
}
