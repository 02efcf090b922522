//! A FineTuneJob at every moment of its life.
use lathe_api::{
    conditions::SUCCEEDED,
    kstatus::Kstatus::{self, Current, Failed, InProgress},
};

use super::{super::*, *};
use crate::{recorded::Recorded, testing::sent};

/// The object after a round in this world.
async fn after(tuned: &FineTuneJob, world: World) -> Value {
    let (calls, done) = reconcile(tuned, world, &[]).await;
    done.expect("a round");
    let written: Value = sent(&calls, STATUS);
    let mut object = serde_json::to_value(tuned).expect("JSON");
    object["status"] = written["status"].clone();
    object
}

fn pending(job: &str, status: Value) -> Pod {
    let mut all = json!({"phase": "Pending"});
    json_patch::merge(&mut all, &status);
    pod(job, all)
}

fn unscheduled(job: &str, message: &str) -> Pod {
    pending(
        job,
        json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]}),
    )
}

fn waiting(job: &str, reason: &str, message: &str) -> Pod {
    pending(
        job,
        json!({"containerStatuses": [{"name": "worker", "image": "w:1", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": reason, "message": message}}}]}),
    )
}

#[tokio::test]
async fn a_job_is_current_only_where_it_succeeded() {
    let base = || vec![model("base", json!({}))];
    let with = |more: Model| vec![model("base", json!({})), more];
    let unready = || vec![model("base", json!({"status": {"conditions": []}}))];
    let an_adapter = || vec![model("base", json!({"spec": {"adapterOf": {"name": "x"}}}))];
    let fresh = json!({"observedGeneration": -1});
    let known = json!({"observedGeneration": 1, "datasetDigest": digest('d'), "attempt": 1, "plan": {"profile": "cpu", "count": 1}});
    let started = {
        let mut started = known.clone();
        started["startTime"] = json!("2026-01-01T00:30:00Z");
        started
    };
    let check = |over: Value, pods: Vec<Pod>| World {
        jobs: vec![job("t-check-data", "check-data", over)],
        pods,
        models: base(),
        ..World::default()
    };
    let train = |over: Value, pods: Vec<Pod>| World {
        jobs: vec![job("t-1", "train", over)],
        pods,
        models: base(),
        ..World::default()
    };
    let only = |models: Vec<Model>| World { models, ..World::default() };
    let runs = || pod("t-1", json!({"phase": "Running", "startTime": "2026-01-01T00:30:00Z"}));
    let gate = |metric: &str| json!({"evaluation": {"gates": [{"metric": "Perplexity", "atMost": metric}]}});
    let done = || said("t-1", 0, trained(json!({})));
    let transient = json!({"failed": {"reason": "SourceUnavailable", "message": "m", "userError": false}});
    let plain = json!({});

    type Moment = (&'static str, Value, Value, World, Kstatus);
    let moments: Vec<Moment> = vec![
        ("no model", plain.clone(), fresh.clone(), World::default(), InProgress),
        ("its model is not ready", plain.clone(), fresh.clone(), only(unready()), InProgress),
        ("its model is an adapter", plain.clone(), fresh.clone(), only(an_adapter()), Failed),
        ("no profile", json!({"accelerator": {"profiles": ["x"]}}), fresh.clone(), only(base()), Failed),
        ("too large", json!({"pod": {"memory": "300Mi"}}), fresh.clone(), only(base()), Failed),
        ("the name is taken", plain.clone(), fresh.clone(), only(with(model("out", json!({})))), Failed),
        ("suspended before it began", json!({"suspend": true}), fresh.clone(), only(base()), InProgress),
        ("first visit", plain.clone(), fresh.clone(), only(base()), InProgress),
        (
            "its check finds no node",
            plain.clone(),
            fresh.clone(),
            check(json!({}), vec![unscheduled("t-check-data", "no cpu")]),
            InProgress,
        ),
        (
            "its check finds no claim",
            plain.clone(),
            fresh.clone(),
            check(json!({}), vec![unscheduled("t-check-data", "persistentvolumeclaim \"x\" not found")]),
            InProgress,
        ),
        (
            "bad rows",
            plain.clone(),
            fresh.clone(),
            check(ended("Failed"), vec![said("t-check-data", 64, failed("MalformedRow"))]),
            Failed,
        ),
        (
            "rows that are away",
            plain.clone(),
            fresh.clone(),
            check(ended("Failed"), vec![said("t-check-data", 1, transient)]),
            InProgress,
        ),
        (
            "good rows",
            plain.clone(),
            fresh.clone(),
            check(ended("Complete"), vec![said("t-check-data", 0, checked())]),
            InProgress,
        ),
        ("its pod is made", plain.clone(), known.clone(), train(json!({}), vec![]), InProgress),
        (
            "no node",
            plain.clone(),
            known.clone(),
            train(json!({}), vec![unscheduled("t-1", "Insufficient cpu")]),
            InProgress,
        ),
        (
            "no image for now",
            plain.clone(),
            known.clone(),
            train(json!({}), vec![waiting("t-1", "ImagePullBackOff", "i/o timeout")]),
            InProgress,
        ),
        (
            "no such image",
            plain.clone(),
            known.clone(),
            train(json!({}), vec![waiting("t-1", "ImagePullBackOff", "manifest unknown")]),
            Failed,
        ),
        ("it runs", plain.clone(), started.clone(), train(json!({}), vec![runs()]), InProgress),
        ("suspended", json!({"suspend": true}), started.clone(), train(json!({}), vec![runs()]), InProgress),
        (
            "over its budget",
            json!({"budget": {"maxCost": "1"}}),
            started.clone(),
            train(json!({}), vec![runs()]),
            Failed,
        ),
        ("its report is lost", plain.clone(), started.clone(), train(ended("Complete"), vec![]), InProgress),
        ("done", plain.clone(), started.clone(), train(ended("Complete"), vec![done()]), Current),
        (
            "done, and a gate holds",
            gate("6"),
            started.clone(),
            train(ended("Complete"), vec![done()]),
            Current,
        ),
        (
            "done, and a gate fails",
            gate("4"),
            started.clone(),
            train(ended("Complete"), vec![done()]),
            Failed,
        ),
        (
            "failed by its input",
            plain.clone(),
            started.clone(),
            train(ended("Failed"), vec![said("t-1", 64, failed("LossNotFinite"))]),
            Failed,
        ),
        ("failed without a word", plain.clone(), started.clone(), train(ended("Failed"), vec![]), Failed),
    ];
    let mut recorded = Recorded::new(SUCCEEDED);
    let mut expected = vec![("nobody came yet", InProgress)];
    recorded.add("nobody came yet", tune(json!({}), fresh.clone()));
    for (moment, spec, status, world, state) in moments {
        recorded.add(moment, after(&tune(spec, status), world).await);
        expected.push((moment, state));
    }
    recorded.hold(&expected);
}
