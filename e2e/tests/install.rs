//! Lathe comes, is brought to another version, and goes, by Helm and by plain manifests: workers do not notice.
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, LogParams, Patch, PatchParams},
};
use lathe_api::AcceleratorProfile;
use lathe_e2e::{
    RELEASE_NAMESPACE, Session, belongings, install, kubectl, operator, poll, serve, tune, uninstall,
};
use serde_json::json;

const QUESTION: &str = "How much is the red lamp?";
/// What stays when the release goes.
const CRDS: [&str; 4] = [
    "CustomResourceDefinition /acceleratorprofiles.lathe.dev",
    "CustomResourceDefinition /finetunejobs.lathe.dev",
    "CustomResourceDefinition /inferenceservices.lathe.dev",
    "CustomResourceDefinition /models.lathe.dev",
];
const CHANGED_PROFILE: &str = "nvidia-l4";

#[tokio::test]
async fn helm_upgrades_and_uninstalls_without_touching_a_worker() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-install").await?;
    session
        .run(async {
            serves(&session).await?;
            session.apply(&tune::job("long", 60)?).await?;
            tune::past_step(&session, "long", 2).await?;
            let before = workers(&session).await?;
            ensure!(before.len() == 2, "one pod serves and one trains: {before:?}");

            install(&[
                "--set",
                "operator.podLabels.team=ml",
                "--set",
                "operator.log=debug",
                "--set",
                "artifacts.size=2Gi",
            ])?;
            looked_after(&session).await?;
            unchanged(&session, &before, "helm upgrade with other values").await?;
            another_worker_image(&session).await?;
            looked_after(&session).await?;
            unchanged(&session, &before, "a release with another worker image").await?;
            nothing_was_forbidden(&session).await?;

            change_profile(&session).await?;
            uninstall()?;
            left(&session, &["AcceleratorProfile /nvidia-l4"]).await?;
            unchanged(&session, &before, "helm uninstall").await?;
            serve::ask(&session, "shop", "shop", QUESTION).await?;

            install(&[])?;
            rolled_out(&session, &before).await?;
            serve::ask(&session, "shop", "shop", QUESTION).await?;
            let profiles: Api<AcceleratorProfile> = Api::all(session.client.clone());
            let price = profiles.get(CHANGED_PROFILE).await?.spec.price.context("the price is gone")?;
            ensure!(price.per_hour.0 == "0.12", "the user's price was overwritten: {price:?}");
            Ok(())
        })
        .await?;
    session.end().await?;
    uninstall()?;
    left(&session, &["AcceleratorProfile /nvidia-l4"]).await?;
    let profiles: Api<AcceleratorProfile> = Api::all(session.client.clone());
    profiles.delete(CHANGED_PROFILE, &DeleteParams::default()).await?;
    Ok(())
}

#[tokio::test]
async fn plain_manifests_install_the_same_and_go() -> Result<()> {
    uninstall()?;
    // The CRDs that a release left are Helm's until somebody else says more.
    kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "deploy/lathe.yaml"])?;
    let session = Session::begin("lathe-plain").await?;
    session
        .run(async {
            operator::ready(&session).await?;
            serves(&session).await?;
            let before = (operator::pods(&session).await?, workers(&session).await?);
            // The same objects by Kustomize: nothing is left to do.
            kubectl(&["diff", "--server-side", "-f", "deploy/lathe.yaml"])?;
            kubectl(&["diff", "--server-side", "-k", "deploy"])?;
            kubectl(&["apply", "--server-side", "-k", "deploy"])?;
            let after = (operator::pods(&session).await?, workers(&session).await?);
            ensure!(before == after, "applying the same again changed pods: {before:?} {after:?}");
            nothing_was_forbidden(&session).await?;

            kubectl(&["delete", "-f", "deploy/operator.yaml"])?;
            kubectl(&["delete", "acceleratorprofiles", "-l", "app.kubernetes.io/managed-by=lathe"])?;
            left(&session, &[]).await?;
            unchanged(&session, &before.1, "the operator's end").await?;
            serve::ask(&session, "shop", "shop", QUESTION).await.map(drop)
        })
        .await?;
    session.end().await
}

#[tokio::test]
async fn an_operator_of_one_namespace_needs_no_more_than_that() -> Result<()> {
    uninstall()?;
    let session = Session::begin("lathe-one-namespace").await?;
    session
        .run(async {
            install(&["--set", "namespaces={lathe-one-namespace}", "--set", "readNodes=false"])?;
            let profiles = ["--field-manager=lathe-catalogue", "-f", "deploy/profiles.yaml"];
            kubectl(&[&["apply", "--server-side"][..], &profiles[..]].concat())?;
            serves(&session).await?;
            nothing_was_forbidden(&session).await
        })
        .await?;
    uninstall()?;
    session.end().await?;
    // Profiles are whoever's who applied them.
    kubectl(&["delete", "-f", "deploy/profiles.yaml"])?;
    left(&session, &[]).await
}

/// The quick-start's base model is served, and answers.
async fn serves(session: &Session) -> Result<()> {
    tune::prepare(session).await?;
    session.apply(&serve::service("shop", &[])?).await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    serve::ask(session, "shop", "shop", QUESTION).await.map(drop)
}

/// Pods that serve or train, as they must not change.
async fn workers(session: &Session) -> Result<Vec<(String, Option<String>, i32)>> {
    let pods = tune::pods(session, "lathe.dev/task in (serve, train)").await?;
    Ok(pods.iter().map(tune::identity).collect())
}

async fn unchanged(session: &Session, before: &[(String, Option<String>, i32)], what: &str) -> Result<()> {
    let after = workers(session).await?;
    ensure!(before == after, "{what} changed workers:\n{before:?}\n{after:?}");
    Ok(())
}

/// The operator that runs now has looked: it alone writes the progress of the job, which the worker tells it.
async fn looked_after(session: &Session) -> Result<()> {
    operator::ready(session).await?;
    let jobs = session.api("lathe.dev/v1alpha1", "FineTuneJob").await?;
    let step = jobs.get("long").await?.data["status"]["progress"]["step"].as_i64().unwrap_or(0);
    tune::past_step(session, "long", step + 1).await
}

/// Keys are new after an uninstall: the service has pods that believe them, the training goes on as it was.
async fn rolled_out(session: &Session, before: &[(String, Option<String>, i32)]) -> Result<()> {
    poll("pods that believe the new keys", || async {
        let after = workers(session).await?;
        let kept = after.iter().filter(|pod| before.contains(pod)).count();
        Ok((after.len() == 2 && kept == 1).then_some(()))
    })
    .await?;
    session.wait("InferenceService", "shop", "Ready", "True").await?;
    let trains = tune::pods(session, "lathe.dev/task=train").await?;
    ensure!(
        trains.iter().map(tune::identity).all(|pod| before.contains(&pod)),
        "helm install after uninstall changed the training: {before:?} {trains:?}"
    );
    Ok(())
}

/// What an upgrade to a release with a new worker does to the operator.
async fn another_worker_image(session: &Session) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    let image = json!([{"name": "LATHE_WORKER_IMAGE", "value": "ghcr.io/lathe-dev/lathe-worker:next"}]);
    let patch = json!({"spec": {"template": {"spec": {"containers": [{"name": "operator", "env": image}]}}}});
    deployments.patch("lathe-operator", &PatchParams::default(), &Patch::Strategic(patch)).await?;
    Ok(())
}

/// A price that somebody set.
async fn change_profile(session: &Session) -> Result<()> {
    let profiles: Api<AcceleratorProfile> = Api::all(session.client.clone());
    let price = Patch::Merge(json!({"spec": {"price": {"perHour": "0.12"}}}));
    profiles.patch(CHANGED_PROFILE, &PatchParams::apply("somebody"), &price).await?;
    Ok(())
}

/// Nothing of the release is left but the CRDs and these.
async fn left(session: &Session, more: &[&str]) -> Result<()> {
    let mut expected = [more, &CRDS].concat();
    expected.sort_unstable();
    let found = belongings(&session.client).await?;
    ensure!(found == expected, "left behind: {found:#?}\nexpected: {expected:#?}");
    Ok(())
}

/// The operator's rights are all that it needs.
async fn nothing_was_forbidden(session: &Session) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(session.client.clone(), RELEASE_NAMESPACE);
    for pod in pods.list(&ListParams::default()).await? {
        let log = pods.logs(&pod.name_any(), &LogParams::default()).await?;
        // A namespace that ends takes nothing from anybody.
        let refused: Vec<&str> = log
            .lines()
            .filter(|line| {
                line.to_ascii_lowercase().contains("forbidden") && !line.contains("being terminated")
            })
            .collect();
        ensure!(refused.is_empty(), "the operator's rights are too few:\n{}", refused.join("\n"));
    }
    Ok(())
}
