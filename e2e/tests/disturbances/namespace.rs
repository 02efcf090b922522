//! The namespace goes in the middle.
use anyhow::{Result, ensure};
use lathe_e2e::{
    Session, operator,
    serve::service,
    tune::{job, past_step, prepare},
};

use crate::{LONG, begin};

#[tokio::test]
async fn a_namespace_that_goes_while_a_job_trains_leaves_nothing_and_holds_up_nobody() -> Result<()> {
    let session = begin("lathe-doomed").await?;
    session
        .run(async {
            prepare(&session).await?;
            session.apply(&service("shop", &[])?).await?;
            session.apply(&job("long", LONG)?).await?;
            session.wait("InferenceService", "shop", "Ready", "True").await?;
            past_step(&session, "long", 1).await
        })
        .await?;
    let operators = operator::pods(&session).await?;
    session.end().await?;
    let other = Session::begin("lathe-spared").await?;
    other
        .run(async {
            prepare(&other).await?;
            other.wait("Model", "shop-base", "Ready", "True").await?;
            let after = operator::pods(&other).await?;
            ensure!(after == operators, "the operator was restarted: {operators:?}, then {after:?}");
            Ok(())
        })
        .await?;
    other.end().await
}
