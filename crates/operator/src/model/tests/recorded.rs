//! A Model at every moment of its life.
use lathe_api::kstatus::Kstatus::{self, Current, Failed, InProgress};

use super::*;
use crate::recorded::Recorded;

fn waiting(container: Value) -> Pod {
    object(json!({
        "metadata": {"name": "m-inspect-x", "namespace": "ns", "uid": "pod-uid",
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "m-inspect", "uid": "job-uid", "controller": true}]},
        "status": {"phase": "Pending", "containerStatuses": [{"name": "worker", "image": "w:1", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"waiting": container}}]},
    }))
}

fn unscheduled(message: &str) -> Pod {
    object(json!({
        "metadata": {"name": "m-inspect-x", "namespace": "ns",
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "m-inspect", "uid": "job-uid", "controller": true}]},
        "status": {"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]},
    }))
}

fn running() -> Pod {
    let mut pod = waiting(json!({"reason": "ContainerCreating"}));
    pod.status.as_mut().expect("a status").phase = Some("Running".to_owned());
    pod
}

fn failed(reason: &str, user: bool) -> Value {
    json!({"outcome": {"failed": {"reason": reason, "message": "what it was. Next: what to do.", "userError": user}}})
}

#[tokio::test]
async fn a_model_is_current_only_where_it_is_ready() {
    let adapter = &[("architecture", json!("LoRA")), ("shape", json!({}))][..];
    let licensed = &[("license", json!("llama3.2")), ("licenseNeedsAcceptance", json!(true))][..];
    let of = |base: &str| json!({"source": {"uri": "pvc://a/b"}, "adapterOf": {"name": base}});
    let gated = json!({"source": {"uri": "pvc://a/b"}, "derivedFrom": {"job": "t", "base": "b", "failedGates": ["BLEU is 3"]}});
    let accepted = json!({"source": {"uri": "pvc://a/b"}, "license": {"accept": "llama3.2"}});
    let none = json!({"source": {"uri": "pvc://a/b"}});
    let (complete, over) =
        (|| job(Some(("Complete", Timestamp::now()))), || job(Some(("Failed", Timestamp::now()))));
    let found = |over: &[(&str, Value)]| (complete(), vec![pod(0, report(over))]);
    let kept = |container: Value| (job(None), vec![waiting(container)]);
    let ready = json!({"observedGeneration": 1, "conditions": [
        {"type": "Ready", "status": "True", "reason": "Inspected", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    let base = || vec![model("base", source(), ready.clone())];
    let backoff = |message: &str| json!({"reason": "ImagePullBackOff", "message": message});

    type Moment = (&'static str, Value, Option<(Job, Vec<Pod>)>, Vec<Model>, Kstatus);
    let moments: Vec<Moment> = vec![
        ("first visit", none.clone(), None, vec![], InProgress),
        ("its pod is made", none.clone(), Some((job(None), vec![])), vec![], InProgress),
        (
            "no node",
            none.clone(),
            Some((job(None), vec![unscheduled("0/1 nodes are available")])),
            vec![],
            InProgress,
        ),
        (
            "no claim",
            none.clone(),
            Some((job(None), vec![unscheduled("persistentvolumeclaim \"x\" not found")])),
            vec![],
            InProgress,
        ),
        ("no image for now", none.clone(), Some(kept(backoff("i/o timeout"))), vec![], InProgress),
        ("no such image", none.clone(), Some(kept(backoff("manifest unknown"))), vec![], Failed),
        (
            "no container",
            none.clone(),
            Some(kept(json!({"reason": "CreateContainerError", "message": "no"}))),
            vec![],
            Failed,
        ),
        ("its pod runs", none.clone(), Some((job(None), vec![running()])), vec![], InProgress),
        ("its pod was lost", none.clone(), Some((complete(), vec![])), vec![], InProgress),
        ("whole weights", none.clone(), Some(found(&[])), vec![], Current),
        ("a licence to accept", none.clone(), Some(found(licensed)), vec![], Failed),
        ("an accepted licence", accepted.clone(), Some(found(licensed)), vec![], Current),
        ("an adapter without a base", none.clone(), Some(found(adapter)), vec![], Failed),
        ("weights with a base", of("base"), Some(found(&[])), base(), Failed),
        ("an adapter of nobody", of("nobody"), Some(found(adapter)), vec![], InProgress),
        (
            "an adapter of what is not ready",
            of("base"),
            Some(found(adapter)),
            vec![model("base", source(), Value::Null)],
            InProgress,
        ),
        (
            "an adapter of an adapter",
            of("base"),
            Some(found(adapter)),
            vec![model("base", of("x"), Value::Null)],
            Failed,
        ),
        ("an adapter", of("base"), Some(found(adapter)), base(), Current),
        ("failed its gates", gated.clone(), Some(found(&[])), vec![], Failed),
        (
            "malformed",
            none.clone(),
            Some((over(), vec![pod(64, failed("MalformedModel", true))])),
            vec![],
            Failed,
        ),
        (
            "its hub is away",
            none.clone(),
            Some((over(), vec![pod(1, failed("SourceUnavailable", false))])),
            vec![],
            InProgress,
        ),
        ("failed without a word", none.clone(), Some((over(), vec![])), vec![], InProgress),
        ("no words", none.clone(), Some((complete(), vec![pod(0, json!("?"))])), vec![], Failed),
        (
            "words of another task",
            none.clone(),
            Some((complete(), vec![pod(0, json!({"outcome": {"evaluated": {}}}))])),
            vec![],
            Failed,
        ),
    ];
    let mut recorded = Recorded::new(READY);
    let mut expected = vec![("nobody came yet", InProgress)];
    let unvisited = json!({"observedGeneration": -1});
    recorded.add("nobody came yet", model("m", none.clone(), unvisited.clone()));
    for (moment, spec, world, others, state) in moments {
        let before = model("m", spec, unvisited.clone());
        let (jobs, pods) = world.map_or((vec![], vec![]), |(job, pods)| (vec![job], pods));
        let (_, status) = round(&before, jobs, pods, others).await;
        let mut after = serde_json::to_value(&before).expect("JSON");
        after["status"] = status.expect("a status");
        recorded.add(moment, after);
        expected.push((moment, state));
    }
    recorded.hold(&expected);
}
