//! Asking two models the same questions, through the endpoint, as a user's program would.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::target::Target;
use crate::ui;

/// Prints each question, the answers of both models and the reference.
pub fn side_by_side(
    target: &Target,
    namespace: &str,
    service: &str,
    models: [&str; 2],
    questions: &[(String, String)],
) -> Result<()> {
    let mut forward = Ending(target.forward(namespace, service)?);
    let port = port(&mut forward.0)?;
    let width = models.iter().map(|model| model.len()).max().unwrap_or(0).max("reference".len());
    for (question, reference) in questions {
        ui::heading(&format!("  {question}"));
        for model in models {
            ui::heading(&format!("    {model:<width$}  {}", streamed(port, model, question)?));
        }
        ui::heading(&format!("    {:<width$}  {reference}\n", "reference"));
    }
    Ok(())
}

/// One streamed chat completion, put together again.
fn streamed(port: u16, model: &str, question: &str) -> Result<String> {
    let body = json!({
        "model": model, "stream": true, "temperature": 0, "max_tokens": 64,
        "messages": [{"role": "user", "content": question}],
    });
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(60))).build().new_agent();
    let response = agent
        .post(format!("http://127.0.0.1:{port}/v1/chat/completions"))
        .content_type("application/json")
        .send(body.to_string())
        .with_context(|| format!("{model} does not answer"))?;
    let mut answer = String::new();
    let mut ended = false;
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            ended = true;
            break;
        }
        let event: Value = serde_json::from_str(data).context("the stream holds an event that is no JSON")?;
        ensure!(event.get("error").is_none(), "{model}: {}", event["error"]);
        answer.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
    }
    ensure!(ended, "the answer of {model} broke off after {answer:?}");
    Ok(answer)
}

/// The local port that a port-forward chose: `Forwarding from 127.0.0.1:PORT -> 8080`.
fn port(forward: &mut Child) -> Result<u16> {
    let stdout = forward.stdout.as_mut().context("the port-forward has no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    let text = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next());
    text.and_then(|port| port.parse().ok()).with_context(|| format!("kubectl port-forward said {line:?}"))
}

/// A child that ends with its owner.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
