//! The main job on a real node: tune, serve, ask.
use anyhow::{Context, Result, ensure};
use kube::{ResourceExt, api::ListParams};
use lathe_e2e::{
    Session,
    gateway::{Gateway, forget_keys, key, question},
    install, operator, quickstart,
};
use serde_json::{Value, json};

fn score(object: &Value, metric: &str, which: &str) -> f64 {
    let scores = object["status"]["scores"].as_array().cloned().unwrap_or_default();
    let found = scores.iter().find(|s| s["metric"] == metric).and_then(|s| s[which].as_str()?.parse().ok());
    found.unwrap_or(f64::NAN)
}

#[tokio::test]
async fn a_model_is_tuned_served_and_asked() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-main-job").await?;
    session
        .run(async {
            // Before the gateway: one that runs hears of a key within a minute only.
            let key = key(&session.client, "main-job", &session.namespace).await?;
            install(&["--set", "gateway.enabled=true"])?;
            apply(&session).await?;
            let job = session.wait("FineTuneJob", "support-tone", "Succeeded", "True").await?;
            ensure!(
                score(&job, "ROUGEL", "after") > score(&job, "ROUGEL", "before") + 0.2,
                "no gain: {:#}",
                job["status"]["scores"]
            );
            let model = session.wait("Model", "shop-support", "Ready", "True").await?;
            ensure!(model["spec"]["derivedFrom"]["job"] == "support-tone", "lineage: {:#}", model["spec"]);
            ensure!(
                model["metadata"]["ownerReferences"].is_null(),
                "deleting the job would delete the model"
            );
            let service = session.wait("InferenceService", "shop", "Ready", "True").await?;
            let url = service["status"]["url"].as_str().context("no url")?;
            ensure!(url == "http://lathe-gateway.lathe-system.svc/v1", "{url}");
            let gateway = Gateway::find(&session.client).await?;
            let plain = gateway.chat(&question("shop", true), &key).await?;
            let tuned = gateway.chat(&question("shop-support", true), &key).await?;
            ensure!(
                tuned.starts_with("Thank you for asking!") && !plain.starts_with("Thank you"),
                "{plain:?} {tuned:?}"
            );
            settled(&session).await
        })
        .await?;
    forget_keys(&session.client).await?;
    session.end().await?;
    // Without the flag the gateway goes with the upgrade.
    install(&[])
}

/// The quick-start as it stands, but for replicas that come and go by themselves.
async fn apply(session: &Session) -> Result<()> {
    for mut object in quickstart()? {
        if object["kind"] == "InferenceService" {
            object["spec"].as_object_mut().context("a service without a spec")?.remove("autoscaling");
        }
        session.apply(&object).await?;
    }
    Ok(())
}

/// A second reconcile of a settled object writes nothing; applying the same manifests again changes nothing.
async fn settled(session: &Session) -> Result<()> {
    let before = versions(session).await?;
    apply(session).await?;
    operator::kill(session).await?;
    // What comes after the restart is looked at after all that was there before.
    let probe = json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": PROBE},
        "spec": {"source": {"uri": "pvc://quickstart/model"}}});
    session.apply(&probe).await?;
    session.wait("Model", PROBE, "Ready", "True").await?;
    let after = versions(session).await?;
    ensure!(before == after, "changed by a restart and a second apply:\n{before:#?}\n{after:#?}");
    Ok(())
}

const PROBE: &str = "after-the-restart";

type Version = (&'static str, String, Option<String>, Option<i64>);

async fn versions(session: &Session) -> Result<Vec<Version>> {
    let mut all = Vec::new();
    for (api_version, kind) in [
        ("lathe.dev/v1alpha1", "FineTuneJob"),
        ("lathe.dev/v1alpha1", "Model"),
        ("lathe.dev/v1alpha1", "InferenceService"),
        ("lathe.dev/v1alpha1", "AcceleratorProfile"),
        ("batch/v1", "Job"),
        ("apps/v1", "Deployment"),
        ("v1", "ConfigMap"),
        ("v1", "Service"),
        ("v1", "PersistentVolumeClaim"),
        ("policy/v1", "PodDisruptionBudget"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
    ] {
        for object in session.api(api_version, kind).await?.list(&ListParams::default()).await? {
            let name = object.name_any();
            if !name.contains(PROBE) {
                // A service's status tells its load, which goes back to nothing.
                let version = object.resource_version().filter(|_| kind != "InferenceService");
                all.push((kind, name, version, object.metadata.generation));
            }
        }
    }
    Ok(all)
}
