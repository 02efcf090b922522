//! Two replicas of the operator: the one that holds the Lease is killed alone, and another goes on where it stood.
use anyhow::{Result, ensure};
use lathe_e2e::{Session, operator, poll, serve::service, tune::prepare};

use crate::{begin, identities};

#[tokio::test]
async fn another_replica_takes_over_from_the_leader() -> Result<()> {
    let session = begin("lathe-leader").await?;
    session.run(takes_over(&session)).await?;
    session.end().await
}

async fn takes_over(session: &Session) -> Result<()> {
    prepare(session).await?;
    operator::ready(session).await?;
    let first = operator::leader(session).await?;
    let names =
        |pods: Vec<(String, Option<String>, i32)>| pods.into_iter().map(|pod| pod.0).collect::<Vec<_>>();
    let replicas = names(operator::pods(session).await?);
    ensure!(replicas.len() == 2 && replicas.contains(&first), "{first} leads {replicas:?}");
    session.apply(&service("before", &[])?).await?;
    session.wait("InferenceService", "before", "Ready", "True").await?;
    let serving = identities(session, "lathe.dev/name=before").await?;

    operator::kill_one(session, &first).await?;
    session.apply(&service("after", &[])?).await?;
    session.wait("InferenceService", "after", "Ready", "True").await?;
    let second = poll("another leader", || async {
        Ok(operator::leader(session).await.ok().filter(|leader| *leader != first))
    })
    .await?;
    ensure!(names(operator::pods(session).await?).contains(&second), "{second} leads and is no pod");
    ensure!(
        identities(session, "lathe.dev/name=before").await? == serving,
        "the pods of the first service changed"
    );
    Ok(())
}
