//! A service at every moment of its life.
use lathe_api::{
    conditions::READY,
    kstatus::Kstatus::{self, Current, Failed, InProgress},
};

use super::*;
use crate::recorded::Recorded;

/// What surrounds a service in one round.
#[derive(Default)]
struct World {
    models: Vec<Model>,
    /// On the heap: there are many of them at once.
    children: Box<Children>,
    pods: Vec<Pod>,
    answers: Vec<(&'static str, u16, Value)>,
}

async fn after(service: &InferenceService, world: World) -> Value {
    let answers: Vec<_> =
        world.answers.iter().map(|(call, code, body)| (*call, *code, body.clone())).collect();
    let calls = round_among(service, world.models, *world.children, world.pods, &answers).await;
    let written: Value = sent(&calls, STATUS);
    let mut object = serde_json::to_value(service).expect("JSON");
    object["status"] = written["status"].clone();
    object
}

fn base() -> Vec<Model> {
    vec![model("base", "pvc://models/base", None)]
}

/// Made and seen by the Deployment's controller, with pods of the wanted revision that have these statuses.
fn made<'a>(spec: &'a Value, pods: &'a [Value]) -> BoxFuture<'a, World> {
    // On the heap: the moments below await many of them.
    made_now(spec, pods).boxed()
}

async fn made_now(spec: &Value, pods: &[Value]) -> World {
    let (service, calls) = settled_as(service(spec.clone())).await;
    let mut children = children(&service, &calls);
    let deployment = children.deployment.as_mut().expect("there");
    deployment.metadata.generation = Some(1);
    deployment.status = Some(object(json!({"observedGeneration": 1})));
    let checksum = serving(&service, &seen(&service)).checksum;
    let pods = pods.iter().enumerate().map(|(i, status)| pod(&format!("p{i}"), &checksum, status.clone()));
    World { models: base(), children: Box::new(children), pods: pods.collect(), answers: Vec::new() }
}

fn worker(state: Value, last: Value) -> Value {
    json!({"phase": "Running", "containerStatuses": [{"name": "worker", "image": "i:1", "imageID": "", "ready": false,
        "restartCount": 1, "state": state, "lastState": last}]})
}

fn waits(reason: &str, message: &str) -> Value {
    worker(json!({"waiting": {"reason": reason, "message": message}}), json!({}))
}

fn unscheduled(message: &str) -> Value {
    json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]})
}

#[tokio::test]
async fn a_service_is_current_only_where_it_is_ready() {
    let plain = json!({});
    let two = json!({"replicas": 2});
    let stopped = json!({"replicas": 0});
    let through = json!({"access": "GatewayOnly"});
    let adapter = |of: &str| vec![base().remove(0), model("tone", "pvc://models/tone", Some(of))];
    let with_tone = json!({"adapterRefs": [{"name": "tone"}]});
    let only = |models: Vec<Model>| World { models, ..World::default() };
    let unready = |stalled: &str| {
        let mut model = base().remove(0);
        let conditions = json!([
            super::super::fixtures::condition("Ready", "False", "X", "no."),
            super::super::fixtures::condition("Stalled", stalled, "X", "no.")
        ]);
        model.status = Some(object(json!({"observedGeneration": 1, "conditions": conditions})));
        vec![model]
    };
    let taken = || World {
        models: base(),
        answers: vec![(
            "GET /api/v1/namespaces/n/services/svc",
            200,
            json!({"metadata": {"name": "svc", "uid": "other"}}),
        )],
        ..World::default()
    };
    let refused = || World {
        models: base(),
        answers: vec![(
            "PATCH /apis/apps/v1/namespaces/n/deployments/svc-serve",
            403,
            failure(403, "Forbidden"),
        )],
        ..World::default()
    };
    let oom = || {
        worker(
            json!({"waiting": {"reason": "CrashLoopBackOff"}}),
            json!({"terminated": {"reason": "OOMKilled", "exitCode": 137}}),
        )
    };
    let words = r#"{"outcome":{"failed":{"reason":"UnknownArchitecture","message":"no. Next: x.","userError":true}}}"#;
    let says = worker(json!({"terminated": {"exitCode": 64, "message": words}}), json!({}));
    let crash =
        worker(json!({"waiting": {"reason": "CrashLoopBackOff"}}), json!({"terminated": {"exitCode": 1}}));
    let beside = |mut world: World| {
        world.pods.push(pod("old", "before", ready()));
        world
    };
    let asleep =
        json!({"access": "GatewayOnly", "replicas": 0, "autoscaling": {"minReplicas": 0, "maxReplicas": 3}});
    let scaled = |mut world: World, replicas: i32| {
        let deployment = world.children.deployment.as_mut().expect("there");
        deployment.spec.as_mut().expect("a spec").replicas = Some(replicas);
        deployment.annotations_mut().insert(SCALED.to_owned(), replicas.to_string());
        world
    };
    let gone = |mut world: World| {
        world.models.clear();
        world
    };

    type Moment = (&'static str, Value, World, Kstatus);
    let moments: Vec<Moment> = vec![
        ("first visit", plain.clone(), only(base()), InProgress),
        ("no model", plain.clone(), World::default(), InProgress),
        ("its model is not ready", plain.clone(), only(unready("False")), InProgress),
        ("its model is stuck", plain.clone(), only(unready("True")), Failed),
        ("its model is an adapter", plain.clone(), only(vec![model("base", "pvc://a/b", Some("x"))]), Failed),
        ("an adapter of another base", with_tone.clone(), only(adapter("other")), Failed),
        ("no profile", json!({"accelerator": {"profiles": ["x"]}}), only(base()), Failed),
        ("a context that is too long", json!({"serving": {"contextLength": 4096}}), only(base()), Failed),
        ("its name is taken", plain.clone(), taken(), Failed),
        ("refused", plain.clone(), refused(), Failed),
        ("made", plain.clone(), made(&plain, &[]).await, InProgress),
        ("its pod starts", plain.clone(), made(&plain, &[json!({})]).await, InProgress),
        ("no node", plain.clone(), made(&plain, &[unscheduled("Insufficient cpu")]).await, InProgress),
        (
            "no claim",
            plain.clone(),
            made(&plain, &[unscheduled("persistentvolumeclaim \"x\" not found")]).await,
            InProgress,
        ),
        (
            "no image for now",
            plain.clone(),
            made(&plain, &[waits("ImagePullBackOff", "i/o timeout")]).await,
            InProgress,
        ),
        (
            "no such image",
            plain.clone(),
            made(&plain, &[waits("ImagePullBackOff", "manifest unknown")]).await,
            Failed,
        ),
        ("out of memory", plain.clone(), made(&plain, &[oom()]).await, Failed),
        ("its worker gives up", plain.clone(), made(&plain, &[says]).await, Failed),
        ("its worker crashes", plain.clone(), made(&plain, &[crash]).await, InProgress),
        ("it answers", plain.clone(), made(&plain, &[ready()]).await, Current),
        ("one of two answers", two.clone(), made(&two, &[ready()]).await, InProgress),
        ("both answer", two.clone(), made(&two, &[ready(), ready()]).await, Current),
        ("one too many", plain.clone(), made(&plain, &[ready(), ready()]).await, InProgress),
        ("the earlier revision answers", plain.clone(), beside(made(&plain, &[json!({})]).await), InProgress),
        ("the new revision fails", plain.clone(), beside(made(&plain, &[oom()]).await), Failed),
        ("its model is gone", plain.clone(), gone(made(&plain, &[ready()]).await), InProgress),
        ("only the gateway reaches it", through.clone(), made(&through, &[ready()]).await, Current),
        ("it is being stopped", stopped.clone(), made(&stopped, &[ready()]).await, InProgress),
        ("it is stopped", stopped.clone(), made(&stopped, &[]).await, Current),
        ("it sleeps", asleep.clone(), scaled(made(&asleep, &[]).await, 0), Current),
        ("it falls asleep", asleep.clone(), scaled(made(&asleep, &[ready()]).await, 0), InProgress),
        ("it is being woken", asleep.clone(), scaled(made(&asleep, &[json!({})]).await, 1), InProgress),
        ("it is awake", asleep.clone(), scaled(made(&asleep, &[ready()]).await, 1), Current),
        ("it is to have more", asleep.clone(), scaled(made(&asleep, &[ready()]).await, 2), InProgress),
    ];
    let mut recorded = Recorded::new(READY);
    let mut expected = vec![("nobody came yet", InProgress)];
    let status = json!({"observedGeneration": -1, "replicas": 0});
    let mut unvisited = serde_json::to_value(service(plain.clone())).expect("JSON");
    unvisited["status"] = status;
    recorded.add("nobody came yet", unvisited);
    for (moment, spec, world, state) in moments {
        recorded.add(moment, after(&service(spec), world).await);
        expected.push((moment, state));
    }
    recorded.hold(&expected);
}
