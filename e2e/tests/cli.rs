//! The `lathe` command against a real cluster, with the user's kubeconfig and nothing else.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use anyhow::{Result, ensure};
use lathe_e2e::{Session, install, programs::program, quickstart, serve};
use serde_json::Value;
use tokio::process::Command;

/// What a command said.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

async fn lathe(session: &Session, args: &[&str]) -> Result<Said> {
    let mut command = Command::new(program("lathe")?);
    command.args(args).args(["--namespace", &session.namespace]);
    let output = command.output().await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Said { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) })
}

#[tokio::test]
async fn status_logs_and_chat_speak_of_a_service_and_of_what_is_wrong() -> Result<()> {
    install(&[])?;
    let session = Session::begin("lathe-cli").await?;
    session
        .run(async {
            let empty = lathe(&session, &["status"]).await?;
            ensure!(
                empty.code == Some(0) && empty.out.contains("Nothing of Lathe"),
                "{} {}",
                empty.out,
                empty.err
            );
            for mut object in quickstart()? {
                match object["kind"].as_str() {
                    // Only what is wrong with it is of interest here.
                    Some("FineTuneJob") => {
                        object["spec"]["dataset"]["train"]["uri"] =
                            "pvc://quickstart/data/nothing.jsonl".into();
                    }
                    Some("InferenceService") => object = serve::service("shop", &[])?,
                    _ => {}
                }
                session.apply(&object).await?;
            }
            session.wait("InferenceService", "shop", "Ready", "True").await?;
            session.wait("FineTuneJob", "support-tone", "Stalled", "True").await?;
            told(&session).await?;
            logs(&session).await?;
            chat(&session).await
        })
        .await?;
    session.end().await
}

async fn told(session: &Session) -> Result<()> {
    let all = lathe(session, &["status"]).await?;
    let line =
        |name: &str| all.out.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    ensure!(line("model/shop-base").contains("Ready"), "{}", all.out);
    ensure!(line("inferenceservice/shop").contains("Ready"), "{}", all.out);
    ensure!(line("finetunejob/support-tone").contains("Stuck"), "{}", all.out);
    let one = lathe(session, &["status", "ftj/support-tone"]).await?;
    ensure!(one.out.contains("nothing.jsonl") && one.out.contains("DatasetValid"), "{}", one.out);
    let json = lathe(session, &["status", "-o", "json"]).await?;
    let objects: Vec<Value> = serde_json::from_str(&json.out)?;
    ensure!(objects.len() == 3 && objects.iter().all(|object| object["reason"].is_string()), "{}", json.out);
    let missing = lathe(session, &["status", "model/nobody"]).await?;
    ensure!(missing.code == Some(64) && missing.err.contains("there are: shop-base"), "{}", missing.err);
    Ok(())
}

async fn logs(session: &Session) -> Result<()> {
    let service = lathe(session, &["logs", "inferenceservice/shop"]).await?;
    ensure!(
        service.code == Some(0) && service.out.contains("serving `shop`"),
        "{} {}",
        service.out,
        service.err
    );
    let none = lathe(session, &["logs", "finetunejob/support-tone", "--task", "train"]).await?;
    ensure!(none.code == Some(64) && none.err.contains("nothing.jsonl"), "{} {}", none.out, none.err);
    Ok(())
}

async fn chat(session: &Session) -> Result<()> {
    let question = "How much is the red lamp?";
    let answer = lathe(session, &["chat", "shop", question, "--temperature", "0"]).await?;
    ensure!(answer.code == Some(0) && answer.out.contains("euros"), "{} {}", answer.out, answer.err);
    let refused = lathe(session, &["chat", "shop", question, "--model", "nobody"]).await?;
    ensure!(refused.code == Some(64) && refused.err.contains("nobody"), "{} {}", refused.out, refused.err);
    let missing = lathe(session, &["chat", "nobody", question]).await?;
    ensure!(
        missing.code == Some(64) && missing.err.contains("there are: shop"),
        "{} {}",
        missing.out,
        missing.err
    );
    Ok(())
}
