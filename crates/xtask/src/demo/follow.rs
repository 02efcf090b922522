//! Following a job and a service until they are done, or cannot be.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use super::target::Target;
use crate::ui;

const PATIENCE: Duration = Duration::from_secs(900);
const PAUSE: Duration = Duration::from_millis(700);

/// Shows a FineTuneJob's progress until it has succeeded. Returns its scores as a table.
pub fn job(target: &Target, namespace: &str, name: &str) -> Result<String> {
    let step = ui::step(format!("finetunejob/{name}"));
    let mut said = String::new();
    let done = wait(target, namespace, &format!("finetunejob/{name}"), "Succeeded", |object| {
        let now = progress(&object["status"]["progress"]).unwrap_or_else(|| cause(object, "Succeeded"));
        if now != said {
            ui::note(&now);
            said = now;
        }
    });
    let object = match done {
        Ok(object) => object,
        Err(error) => bail!(
            "{error}\n{}",
            target.kubectl(&["--namespace", namespace, "describe", "finetunejob", name]).unwrap_or_default()
        ),
    };
    step.done(&cause(&object, "Succeeded"));
    Ok(table(&object["status"]["scores"]))
}

/// "step 40/84 47%, loss 1.2055, 10994 tokens/s, 9s left"; what is not known is left out. None before the first plan.
fn progress(progress: &Value) -> Option<String> {
    progress["steps"].as_i64().filter(|steps| *steps > 0)?;
    let part =
        |key: &str, before: &str, after: &str| Some(format!("{before}{}{after}", progress[key].as_str()?));
    let parts = [
        part("summary", "step ", ""),
        part("loss", "loss ", ""),
        part("tokensPerSecond", "", " tokens/s"),
        part("remaining", "", " left"),
    ];
    Some(parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

/// Waits until an InferenceService answers with all of its models.
pub fn service(target: &Target, namespace: &str, name: &str) -> Result<()> {
    let step = ui::step(format!("inferenceservice/{name}"));
    let mut said = String::new();
    let object = wait(target, namespace, &format!("inferenceservice/{name}"), "Ready", |object| {
        let now = cause(object, "Ready");
        if now != said {
            ui::note(&now);
            said = now;
        }
    })?;
    step.done(object["status"]["url"].as_str().unwrap_or_default());
    Ok(())
}

/// Polls until the condition is True; ends with an error when the object is stalled.
fn wait(
    target: &Target,
    namespace: &str,
    what: &str,
    condition: &str,
    mut show: impl FnMut(&Value),
) -> Result<Value> {
    let started = Instant::now();
    let mut last = String::new();
    while started.elapsed() < PATIENCE {
        if let Some(object) = target.get(namespace, what)? {
            show(&object);
            let current = object["status"]["observedGeneration"] == object["metadata"]["generation"];
            if current && status(&object, condition) == Some("True") {
                return Ok(object);
            }
            last = cause(&object, condition);
            if current && status(&object, "Stalled") == Some("True") {
                bail!("{what} is stalled: {last}");
            }
        }
        sleep(PAUSE);
    }
    bail!("{what} is not {condition} after {} minutes: {last}", PATIENCE.as_secs() / 60)
}

fn condition<'a>(object: &'a Value, name: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == name)
}

fn status<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    condition(object, name)?["status"].as_str()
}

fn cause(object: &Value, name: &str) -> String {
    let Some(found) = condition(object, name) else { return "waiting for the operator".to_owned() };
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    format!("{}: {}", text("reason"), text("message"))
}

fn table(scores: &Value) -> String {
    let mut text = format!("  {:<12}{:>10}{:>10}", "score", "before", "after");
    for score in scores.as_array().into_iter().flatten() {
        let value = |key: &str| score[key].as_str().unwrap_or("-").to_owned();
        text.push_str(&format!("\n  {:<12}{:>10}{:>10}", value("metric"), value("before"), value("after")));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_step_leaves_nothing_to_be_waited_for() {
        let told = |remaining: Value| {
            progress(
                &json!({"steps": 84, "summary": "84/84 100%", "loss": "0.1055", "tokensPerSecond": "10994",
                "remaining": remaining}),
            )
        };
        assert_eq!(told(Value::Null).expect("a line"), "step 84/84 100%, loss 0.1055, 10994 tokens/s");
        assert_eq!(
            told(json!("2s")).expect("a line"),
            "step 84/84 100%, loss 0.1055, 10994 tokens/s, 2s left"
        );
        assert_eq!(progress(&json!({})), None);
    }
}
