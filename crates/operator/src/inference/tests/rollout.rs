//! Roll-outs: what is written of two revisions at every moment, and what is not.
use lathe_api::kstatus::{Kstatus, kstatus};

use super::*;

const CANDIDATE: &str = "/apis/apps/v1/namespaces/n/deployments/svc-candidate";

/// A service that tries candidates, and asks for so many replicas.
fn canary(replicas: i32, more: Value) -> InferenceService {
    let steps = json!([{"percent": 10, "after": "1m"}, {"percent": 50, "after": "1m"}]);
    let mut spec = json!({
        "access": "GatewayOnly", "replicas": replicas,
        "rollout": {"strategy": "Canary", "steps": steps, "gates": [{"metric": "ErrorRate", "atMost": "0.1"}]},
    });
    json_patch::merge(&mut spec, &more);
    service(spec)
}

/// What makes another revision of it.
fn other() -> Value {
    json!({"serving": {"maxSequences": 4}})
}

fn checksum(service: &InferenceService) -> String {
    serving(service, &seen(service)).checksum
}

/// A ready pod of the candidate.
fn tried(name: &str, checksum: &str, status: Value) -> Pod {
    let mut pod = pod(name, checksum, status);
    pod.metadata.labels.get_or_insert_default().insert("lathe.dev/track".into(), "candidate".into());
    pod
}

/// A service whose replicas are all ready, before its spec changes.
struct World {
    stable: String,
    children: Children,
    pods: Vec<Pod>,
}

async fn world(replicas: i32) -> (InferenceService, World) {
    let (service, calls) = settled_as(canary(replicas, json!({}))).await;
    let mut children = children(&service, &calls);
    let deployment = children.deployment.as_mut().expect("there");
    deployment.metadata.generation = Some(1);
    deployment.status = Some(object(json!({"observedGeneration": 1})));
    let stable = checksum(&service);
    let pods = (0..replicas).map(|n| pod(&format!("p{n}"), &stable, ready())).collect();
    (service, World { stable, children, pods })
}

fn with_rollout(
    mut service: InferenceService,
    phase: &str,
    step: i32,
    percent: i32,
    stable: &str,
) -> InferenceService {
    let now = Timestamp::now().as_second();
    let short = |checksum: &str| checksum[..10].to_owned();
    let rules = lathe_resolve::pod::checksum(service.spec.rollout.as_ref().expect("rules")).expect("JSON");
    service.status = Some(object(json!({
        "observedGeneration": 1, "revisions": {"stable": short(stable), "candidate": short(&checksum(&service))},
        "rollout": {
            "revision": short(&checksum(&service)), "rules": short(&rules), "phase": phase, "step": step, "percent": percent,
            "since": now, "counted": now, "message": "why",
        },
    })));
    service
}

fn rollout(calls: &[Call]) -> Value {
    sent::<Value>(calls, STATUS)["status"]["rollout"].clone()
}

/// The candidate's Deployment as it is after the calls of a round.
fn made(calls: &[Call]) -> Deployment {
    let mut made: Deployment = sent(calls, &patch(CANDIDATE));
    made.annotations_mut().insert(SCALED.to_owned(), "1".to_owned());
    made.spec.as_mut().expect("a spec").replicas = Some(1);
    made
}

/// Everything that is there two rounds after the spec was changed to this: the candidate's replicas are the scaler's alone.
async fn beside(changed: &InferenceService, world: &World) -> Children {
    let calls = round(changed, world.children.clone(), world.pods.clone(), &[]).await;
    let mut children = world.children.clone();
    children.candidate = Some(made(&calls));
    children.contracts.push(sent(&calls, &patch(&contract(changed))));
    let calls = round(changed, children.clone(), world.pods.clone(), &[]).await;
    children.candidate = Some(made(&calls));
    children
}

#[tokio::test]
async fn a_changed_spec_is_tried_beside_what_runs() {
    let (_, world) = world(2).await;
    let changed = canary(2, other());
    let calls = round(&changed, world.children.clone(), world.pods.clone(), &[]).await;
    let (of_candidate, scaled) = (patch(CANDIDATE), format!("PATCH {CANDIDATE} {SCALER}"));
    let contract = contract(&changed);
    assert_eq!(writes(&calls), [patch(&contract).as_str(), &of_candidate, &scaled, STATUS]);
    let made: Value = sent(&calls, &of_candidate);
    let template = &made["spec"]["template"];
    assert_eq!(made["spec"]["replicas"], 1);
    assert_eq!(template["metadata"]["labels"]["lathe.dev/track"], "candidate");
    assert_eq!(made["spec"]["selector"]["matchLabels"]["lathe.dev/track"], "candidate");
    // By these an EndpointSlice of the service's Service tells its pods from the others.
    assert_eq!(
        (&template["spec"]["hostname"], &template["spec"]["subdomain"]),
        (&json!("candidate"), &json!("svc"))
    );
    assert_eq!(sent::<Value>(&calls, &scaled)["spec"], json!({"replicas": 1}));
    assert_eq!((&rollout(&calls)["phase"], &rollout(&calls)["percent"]), (&json!("Starting"), &json!(0)));
    let status: Value = sent::<Value>(&calls, STATUS)["status"].clone();
    assert_eq!(
        status["revisions"],
        json!({"stable": world.stable[..10], "candidate": checksum(&changed)[..10]})
    );
    assert_eq!(said(&calls, "RolledOut")["reason"], "CanaryStarting");
    assert_eq!(said(&calls, "Ready")["status"], "True");
}

#[tokio::test]
async fn its_share_begins_when_it_is_ready_and_the_stable_revision_gives_up_a_replica_for_it() {
    let (_, world) = world(2).await;
    let changed = canary(2, other());
    let children = beside(&changed, &world).await;
    let changed = with_rollout(changed, "Starting", 1, 0, &world.stable);
    let pods = [world.pods.clone(), vec![tried("c", &checksum(&changed), ready())]].concat();
    let calls = round(&changed, children.clone(), pods.clone(), &[]).await;
    assert_eq!(writes(&calls), [scale().as_str(), STATUS]);
    let scaled: Value = sent(&calls, &scale());
    assert_eq!(scaled["spec"], json!({"replicas": 1}));
    // Two are asked for all the same.
    assert_eq!(scaled["metadata"]["annotations"][SCALED], "2");
    assert_eq!((&rollout(&calls)["phase"], &rollout(&calls)["percent"]), (&json!("Testing"), &json!(10)));
    assert_eq!(said(&calls, "RolledOut")["reason"], "Canary");
    assert_eq!(said(&calls, "Available")["message"], "3 of 2 replicas answer.");
    // What somebody makes of either is set right.
    let mut edited = children;
    for deployment in [&mut edited.deployment, &mut edited.candidate].into_iter().flatten() {
        deployment.spec.as_mut().expect("a spec").template.spec.as_mut().expect("a pod").containers[0]
            .image = Some("other".to_owned());
    }
    let calls = round(&changed, edited, pods, &[]).await;
    assert_eq!(writes(&calls)[..2], [patch(DEPLOYMENT).as_str(), &patch(CANDIDATE)]);
    let image = |path: &str| {
        sent::<Value>(&calls, path)["spec"]["template"]["spec"]["containers"][0]["image"].clone()
    };
    assert_eq!((image(&patch(DEPLOYMENT)), image(&patch(CANDIDATE))), (json!("worker:1"), json!("worker:1")));
    let hash = |path: &str| {
        sent::<Value>(&calls, path)["spec"]["template"]["metadata"]["annotations"]["lathe.dev/contract-checksum"].clone()
    };
    assert_eq!(hash(&patch(DEPLOYMENT)), world.stable.as_str());
}

#[tokio::test]
async fn a_candidate_that_crashes_says_why_and_takes_nothing_away() {
    let (_, world) = world(1).await;
    let changed = with_rollout(canary(1, other()), "Starting", 1, 0, &world.stable);
    let crash = json!({"phase": "Running", "containerStatuses": [{"name": "worker", "image": "i:1", "imageID": "", "ready": false,
        "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]});
    let pods = [world.pods.clone(), vec![tried("c", &checksum(&changed), crash)]].concat();
    let calls = round(&changed, world.children, pods, &[]).await;
    assert_eq!(said(&calls, "RolledOut")["reason"], "OutOfMemory");
    assert_eq!(said(&calls, "Stalled")["reason"], "OutOfMemory");
    assert_eq!(said(&calls, "Ready")["status"], "True");
    assert!(!writes(&calls).contains(&patch(DEPLOYMENT).as_str()), "{:?}", writes(&calls));
}

#[tokio::test]
async fn one_that_failed_goes_and_nothing_else_changes() {
    let (_, world) = world(1).await;
    let changed = with_rollout(canary(1, other()), "Failed", 1, 0, &world.stable);
    let mut children = beside(&canary(1, other()), &world).await;
    let delete = format!("DELETE {CANDIDATE}");
    let pods = [world.pods.clone(), vec![tried("c", &checksum(&changed), ready())]].concat();
    let calls = round(&changed, children.clone(), pods, &[]).await;
    assert_eq!(writes(&calls), [delete.as_str(), STATUS]);
    assert_eq!(said(&calls, "RolledOut")["reason"], "GateFailed");
    assert_eq!(said(&calls, "RolledOut")["message"], "why");
    assert_eq!(said(&calls, "Stalled")["status"], "True");
    assert_eq!(said(&calls, "Ready")["status"], "True");
    let mut told = serde_json::to_value(&changed).expect("JSON");
    told["status"] = sent::<Value>(&calls, STATUS)["status"].clone();
    assert_eq!(kstatus(&told), Kstatus::Failed);
    // Its contract goes with its last pod; then there is nothing to do.
    children.candidate = None;
    let contract = format!("DELETE {}", contract(&changed));
    let calls = round(&changed, children.clone(), world.pods.clone(), &[]).await;
    assert_eq!(writes(&calls), [contract.as_str(), STATUS]);
    children.contracts.pop();
    let mut changed = changed;
    changed.status = Some(object(sent::<Value>(&calls, STATUS)["status"].clone()));
    assert!(round(&changed, children, world.pods, &[]).await.is_empty());
}

#[tokio::test]
async fn a_promoted_one_goes_on_until_the_replicas_are_what_it_is() {
    let (_, world) = world(2).await;
    let changed = with_rollout(canary(2, other()), "Promoting", 2, 50, &world.stable);
    let mut children = beside(&canary(2, other()), &world).await;
    let new = checksum(&changed);
    let pods = [world.pods.clone(), vec![tried("c", &new, ready())]].concat();
    let calls = round(&changed, children.clone(), pods, &[]).await;
    assert_eq!(writes(&calls), [patch(DEPLOYMENT).as_str(), &scale(), STATUS]);
    let taken: Deployment = sent(&calls, &patch(DEPLOYMENT));
    assert_eq!(build::revision(&taken), Some(new.as_str()));
    assert_eq!(sent::<Value>(&calls, &scale())["spec"], json!({"replicas": 2}));
    assert_eq!(rollout(&calls)["phase"], "Promoting");
    assert_eq!(said(&calls, "RolledOut")["reason"], "RollingOut");
    // All replicas are ready: it goes, and what it has shown is told.
    let live = children.deployment.as_mut().expect("there");
    *live = taken;
    live.annotations_mut().insert(SCALED.to_owned(), "2".to_owned());
    live.metadata.generation = Some(2);
    live.status = Some(object(json!({"observedGeneration": 2})));
    live.spec.as_mut().expect("a spec").replicas = Some(2);
    let replaced: Vec<Pod> = (0..2).map(|n| pod(&format!("n{n}"), &new, ready())).collect();
    let with_candidate = [replaced.clone(), vec![tried("c", &new, ready())]].concat();
    let calls = round(&changed, children.clone(), with_candidate, &[]).await;
    assert!(writes(&calls).contains(&format!("DELETE {CANDIDATE}").as_str()), "{:?}", writes(&calls));
    assert_eq!((&rollout(&calls)["phase"], &rollout(&calls)["percent"]), (&json!("Promoted"), &json!(0)));
    children.candidate = None;
    let calls = round(&changed, children, replaced, &[]).await;
    assert_eq!(said(&calls, "RolledOut")["status"], "True");
    assert_eq!(said(&calls, "RolledOut")["message"], "every replica is as the spec says: why");
}

#[rstest]
#[case::taken_back(json!({}), false)]
#[case::to_something_else(json!({"serving": {"maxSequences": 8}}), true)]
#[tokio::test]
async fn a_change_of_the_spec_ends_the_candidate_of_the_one_before(#[case] spec: Value, #[case] again: bool) {
    let (_, world) = world(1).await;
    let before = with_rollout(canary(1, other()), "Testing", 1, 10, &world.stable);
    let mut children = beside(&canary(1, other()), &world).await;
    let old = tried("c", &checksum(&before), ready());
    let mut changed = canary(1, spec);
    changed.status = before.status.clone();
    let pods = [world.pods.clone(), vec![old]].concat();
    let calls = round(&changed, children.clone(), pods.clone(), &[]).await;
    let own = |call: &&str| call.contains("svc-candidate");
    assert_eq!(writes(&calls).into_iter().filter(own).collect::<Vec<_>>(), [format!("DELETE {CANDIDATE}")]);
    assert!(!writes(&calls).contains(&patch(DEPLOYMENT).as_str()));
    assert_eq!(rollout(&calls)["phase"], if again { json!("Starting") } else { Value::Null });
    // Pods of two candidates are never there at once.
    children.candidate = None;
    let calls = round(&changed, children.clone(), pods, &[]).await;
    assert!(!writes(&calls).iter().any(own), "{:?}", writes(&calls));
    let calls = round(&changed, children, world.pods, &[]).await;
    assert_eq!(writes(&calls).contains(&patch(CANDIDATE).as_str()), again);
}

#[rstest]
#[case::stopped(0, 0)]
#[case::nothing_works(1, 0)]
#[tokio::test]
async fn without_anything_to_compare_with_it_is_rolled_out_at_once(
    #[case] replicas: i32,
    #[case] pods: usize,
) {
    let (_, world) = world(replicas).await;
    let changed = canary(replicas, other());
    let pods = world.pods.into_iter().take(pods).collect();
    let calls = round(&changed, world.children, pods, &[]).await;
    assert!(writes(&calls).contains(&patch(DEPLOYMENT).as_str()));
    assert!(!writes(&calls).iter().any(|call| call.contains("svc-candidate")));
    assert_eq!(rollout(&calls), Value::Null);
}

#[rstest]
#[case::by_default(json!({}), "RollingUpdate", Some((1, 0)))]
#[case::recreate(json!({"rollout": {"strategy": "Recreate"}}), "Recreate", None)]
#[tokio::test]
async fn the_deployment_has_the_strategy_that_the_spec_names(
    #[case] spec: Value,
    #[case] type_: &str,
    #[case] numbers: Option<(i32, i32)>,
) {
    let calls = round(&service(spec), Children::default(), Vec::new(), &[]).await;
    let strategy = &sent::<Value>(&calls, &patch(DEPLOYMENT))["spec"]["strategy"];
    assert_eq!(strategy["type"], type_);
    let told =
        strategy.get("rollingUpdate").map(|told| (told["maxSurge"].clone(), told["maxUnavailable"].clone()));
    assert_eq!(told, numbers.map(|(surge, unavailable)| (json!(surge), json!(unavailable))));
}

/// Of a service whose only device its own replica holds.
#[tokio::test]
async fn where_no_device_is_free_an_old_replica_goes_before_a_new_one_comes() {
    let on = |sequences: i32| {
        service(json!({"accelerator": {"profiles": ["gpu"]}, "serving": {"maxSequences": sequences}}))
    };
    let (was, calls) = settled_as(on(16)).await;
    let mut children = children(&was, &calls);
    children.deployment.as_mut().expect("there").status = Some(object(json!({"observedGeneration": 1})));
    let changed = on(4);
    let unscheduled = json!({"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "1 Insufficient nvidia.com/gpu"}]});
    let old = pod("old", &checksum(&was), ready());
    let new = pod("new", &checksum(&changed), unscheduled);
    let devices = |on_node: &str| {
        let node = json!({"metadata": {"name": "a", "labels": {"gpu": "L4"}}, "status": {"allocatable": {"nvidia.com/gpu": on_node}}});
        let holds = json!({
            "metadata": {"namespace": "n", "name": "old", "labels": {"lathe.dev/name": "svc"}},
            "spec": {"nodeName": "a", "containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
        });
        let list = |kind: &str, item: Value| json!({"apiVersion": "v1", "kind": kind, "metadata": {}, "items": [item]});
        [
            ("GET /api/v1/nodes", 200, list("NodeList", node)),
            ("GET /api/v1/pods", 200, list("PodList", holds)),
        ]
    };
    let both = vec![old.clone(), new.clone()];
    let strategy = |calls: &[Call]| {
        sent::<Value>(calls, &patch(DEPLOYMENT))["spec"]["strategy"]["rollingUpdate"].clone()
    };
    // There is one more: it only has to be waited for.
    let calls = round(&changed, children.clone(), both.clone(), &devices("2")).await;
    assert_eq!(strategy(&calls), json!({"maxSurge": 1, "maxUnavailable": 0}));
    let calls = round(&changed, children.clone(), both.clone(), &devices("1")).await;
    assert_eq!(strategy(&calls), json!({"maxSurge": 0, "maxUnavailable": 1}));
    let said_so = said(&calls, "RolledOut");
    assert_eq!(said_so["reason"], "RollingOut");
    assert!(
        said_so["message"].as_str().is_some_and(|words| words.contains("no device is free for one more")),
        "{said_so}"
    );
    assert_eq!(said(&calls, "Ready")["status"], "True");
    // It stays so until the last old one is gone, and then new ones come first again.
    let taken: Deployment = sent(&calls, &patch(DEPLOYMENT));
    let live = children.deployment.as_mut().expect("there");
    *live = taken;
    live.annotations_mut().insert(SCALED.to_owned(), "1".to_owned());
    let starts = pod("new", &checksum(&changed), json!({"phase": "Running"}));
    let calls = round(&changed, children.clone(), vec![old, starts.clone()], &[]).await;
    assert!(!writes(&calls).contains(&patch(DEPLOYMENT).as_str()), "{:?}", writes(&calls));
    let calls = round(&changed, children, vec![starts], &[]).await;
    assert_eq!(strategy(&calls), json!({"maxSurge": 1, "maxUnavailable": 0}));
}
