//! Asking two models the same questions, as a user's program would.

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::gateway::{Asked, Gateway};
use crate::ui;

/// Prints each question, the answers of both models and the reference.
///
/// # Errors
/// A model does not answer.
pub fn side_by_side(gateway: &Gateway, models: [&str; 2], questions: &[(String, String)]) -> Result<()> {
    let width = models.iter().map(|model| model.len()).max().unwrap_or(0).max("reference".len());
    for (question, reference) in questions {
        ui::heading(&format!("  {question}"));
        for model in models {
            ui::heading(&format!("    {model:<width$}  {}", answer(gateway, model, question)?));
        }
        ui::heading(&format!("    {:<width$}  {reference}\n", "reference"));
    }
    Ok(())
}

fn answer(gateway: &Gateway, model: &str, question: &str) -> Result<String> {
    let body = json!({
        "model": model, "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": question}],
    });
    match gateway.ask(body).with_context(|| format!("{model} does not answer"))? {
        Asked::Answered(answer) => Ok(answer.text),
        Asked::SentAway => bail!("{model} has no room, though nobody else asks"),
    }
}
