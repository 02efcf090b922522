//! Admission by a real API server: the CRDs install, valid objects are accepted, bad ones refused with the cause.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use anyhow::{Result, ensure};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use lathe_e2e::Session;
use serde_json::{Value, json};

use crate::{cases, install_crds};

#[tokio::test]
async fn admission_accepts_and_refuses_as_the_rules_say() -> Result<()> {
    let session = Session::begin("lathe-admission").await?;
    session.run(accepts_and_refuses(&session)).await?;
    session.end().await
}

async fn accepts_and_refuses(session: &Session) -> Result<()> {
    install_crds(session).await?;
    let cases = cases()?;
    for (kind, object) in cases["valid"].as_object().unwrap() {
        let api = session.api("lathe.dev/v1alpha1", kind).await?;
        api.create(&PostParams::default(), &serde_json::from_value(object.clone())?).await?;
    }
    let mut wrong = Vec::new();
    let bad = cases["refused"].as_array().unwrap().iter().chain(cases["refusedBySchema"].as_array().unwrap());
    let mut count = 0;
    for case in bad {
        count += 1;
        let said = refusal(session, &cases, case, count).await?;
        if !said.contains(case["because"].as_str().unwrap()) {
            wrong.push(format!("{case}\n  said: {said:?}"));
        }
    }
    for case in cases["accepted"].as_array().unwrap() {
        count += 1;
        let said = refusal(session, &cases, case, count).await?;
        if !said.is_empty() {
            wrong.push(format!("{case}\n  must be accepted, said: {said:?}"));
        }
    }
    ensure!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    // No namespace takes it along.
    let profiles = session.api("lathe.dev/v1alpha1", "AcceleratorProfile").await?;
    let name = cases["valid"]["AcceleratorProfile"]["metadata"]["name"].as_str().unwrap();
    profiles.delete(name, &DeleteParams::default()).await?;
    Ok(())
}

#[tokio::test]
async fn an_object_that_nobody_visited_is_not_current() -> Result<()> {
    let session = Session::begin("lathe-unvisited").await?;
    session
        .run(async {
            install_crds(&session).await?;
            let cases = cases()?;
            for kind in ["Model", "FineTuneJob", "InferenceService"] {
                let made = serde_json::to_value(session.apply(&cases["valid"][kind]).await?)?;
                ensure!(made["status"]["observedGeneration"] == -1, "{kind}: {:#}", made["status"]);
            }
            Ok(())
        })
        .await?;
    session.end().await
}

#[tokio::test]
async fn defaults_are_visible_in_the_stored_object() -> Result<()> {
    let session = Session::begin("lathe-defaults").await?;
    session
        .run(async {
            install_crds(&session).await?;
            let job = json!({
                "apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "least"},
                "spec": {"baseModelRef": {"name": "base"}, "output": {"modelName": "m"},
                    "dataset": {"train": {"uri": "pvc://data/t.jsonl"}}},
            });
            let spec = serde_json::to_value(session.apply(&job).await?)?["spec"].clone();
            ensure!(spec["trainable"]["lora"]["rank"] == 16, "{spec:#}");
            ensure!(spec["training"]["learningRate"] == "2e-4", "{spec:#}");
            ensure!(spec["objective"] == json!({"supervised": {}}), "{spec:#}");
            Ok(())
        })
        .await?;
    session.end().await
}

/// What the API server says to a new object, or to a change of an old one; empty where it takes it.
async fn refusal(session: &Session, cases: &Value, case: &Value, number: usize) -> Result<String> {
    let kind = case["kind"].as_str().unwrap();
    let valid = &cases["valid"][kind];
    let api = session.api("lathe.dev/v1alpha1", kind).await?;
    let fresh = format!("fresh-{number}");
    let named = |mut object: Value| -> Result<DynamicObject> {
        if object["metadata"]["name"] == valid["metadata"]["name"] {
            object["metadata"]["name"] = fresh.clone().into();
        }
        Ok(serde_json::from_value(object)?)
    };
    let answer = if let Some(old) = case.get("old") {
        api.create(&PostParams::default(), &named(merged(valid, old))?).await?;
        let dry = PatchParams { dry_run: true, ..PatchParams::default() };
        api.patch(&fresh, &dry, &Patch::Merge(&case["change"])).await
    } else {
        let dry = PostParams { dry_run: true, field_manager: None };
        api.create(&dry, &named(merged(valid, &case["change"]))?).await
    };
    match answer {
        Ok(_) => Ok(String::new()),
        Err(kube::Error::Api(status)) => Ok(status.message),
        Err(other) => Err(other.into()),
    }
}

fn merged(target: &Value, patch: &Value) -> Value {
    let mut result = target.clone();
    json_patch::merge(&mut result, patch);
    result
}
