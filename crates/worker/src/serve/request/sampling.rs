//! How an answer is chosen and where it ends.
use lathe_engine::Sampling;
use serde_json::Value;

use super::fields::{Fields, kind, list, string, wrong_type};
use super::unsupported;
use crate::serve::error::ApiError;

/// As OpenAI.
const MAX_STOPS: usize = 4;
const MAX_STOP_BYTES: usize = 1024;

/// The bounded settings of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Tokens that the client allows the answer.
    pub max_tokens: Option<usize>,
    /// Tokens where the client says nothing; `None`: whatever the context leaves.
    pub default_tokens: Option<usize>,
    /// Divides the logits, 0 to 2.
    pub temperature: f32,
    /// Above 0, at most 1.
    pub top_p: f32,
    /// 0 for all.
    pub top_k: usize,
    /// Equal seeds give equal answers; `None`: another each time.
    pub seed: Option<u64>,
    /// Texts at which the answer ends, none of them empty.
    pub stop: Vec<String>,
    /// Go on behind the model's own end of an answer (as vLLM, for measurements).
    pub ignore_eos: bool,
}

impl Settings {
    pub(super) fn read(
        fields: &Fields,
        context: usize,
        default_tokens: Option<usize>,
    ) -> Result<Self, ApiError> {
        let top_p = fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0) as f32;
        Ok(Settings {
            max_tokens: max_tokens(fields, context)?,
            default_tokens,
            temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32,
            // 0 is allowed by OpenAI and means the likeliest token alone.
            top_p: top_p.max(f32::MIN_POSITIVE),
            // -1 is vLLM's word for all.
            top_k: fields.integer("top_k", -1, 1 << 24)?.unwrap_or(0).max(0) as usize,
            seed: fields.integer("seed", i64::MIN, i64::MAX)?.map(i64::cast_unsigned),
            stop: stop(fields)?,
            ignore_eos: fields.flag("ignore_eos")?,
        })
    }

    /// What the engine is told; `random` is the seed where the client gave none.
    pub fn sampling(&self, random: u64) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            seed: self.seed.unwrap_or(random),
        }
    }
}

fn max_tokens(fields: &Fields, context: usize) -> Result<Option<usize>, ApiError> {
    let most = i64::try_from(context).unwrap_or(i64::MAX);
    let old = fields.integer("max_tokens", 1, most)?;
    let new = fields.integer("max_completion_tokens", 1, most)?;
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        let message =
            "Setting 'max_tokens' and 'max_completion_tokens' to different values is not supported.";
        return Err(ApiError::field("max_tokens", "invalid_parameter_combination", message));
    }
    Ok(new.or(old).map(|tokens| tokens as usize))
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let Some(value) = fields.raw("stop") else { return Ok(Vec::new()) };
    let texts = match kind(value) {
        "a string" => vec![("stop".to_owned(), string("stop", value)?)],
        // OpenAI takes an empty list for none.
        "an array" if value.get()[1..].trim_start().starts_with(']') => return Ok(Vec::new()),
        "an array" => {
            let items = list("stop", value, MAX_STOPS)?.into_iter().enumerate();
            items
                .map(|(at, item)| {
                    let path = format!("stop[{at}]");
                    string(&path, item).map(|text| (path, text))
                })
                .collect::<Result<_, _>>()?
        }
        _ => return Err(wrong_type("stop", "a string or an array of strings", value)),
    };
    for (path, text) in &texts {
        if text.is_empty() || text.len() > MAX_STOP_BYTES {
            let message =
                format!("Invalid '{path}': a stop string must have between 1 and {MAX_STOP_BYTES} bytes.");
            return Err(ApiError::field(path, "invalid_value", message));
        }
    }
    Ok(texts.into_iter().map(|(_, text)| text.into_owned()).collect())
}

/// Refuses what would change the answer and is not built; a value that means "not used" passes.
pub(super) fn refuse_unsupported(fields: &Fields, chat: bool) -> Result<(), ApiError> {
    fields.number("presence_penalty", -2.0, 2.0)?;
    fields.number("frequency_penalty", -2.0, 2.0)?;
    if let Some(n) = fields.integer("n", 1, 128)?
        && n != 1
    {
        let message = format!("Invalid 'n': {n} answers to one request are not supported; 'n' must be 1.");
        return Err(ApiError::field("n", "unsupported_value", message));
    }
    let zero = |value: &Value| value.as_f64() == Some(0.0);
    let one = |value: &Value| value.as_f64() == Some(1.0);
    let empty = |value: &Value| {
        value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(serde_json::Map::is_empty)
    };
    let off = |value: &Value| *value == Value::Bool(false);
    let plain_text = |value: &Value| value["type"] == "text";
    let text_only = |value: &Value| *value == serde_json::json!(["text"]);
    let none = |value: &Value| matches!(value.as_str(), Some("none" | "auto"));
    let never = |_: &Value| false;
    let blank = |value: &Value| value.as_str() == Some("");
    type Unused<'a> = &'a dyn Fn(&Value) -> bool;
    let both: [(&str, Unused); 5] = [
        ("presence_penalty", &zero),
        ("frequency_penalty", &zero),
        ("repetition_penalty", &one),
        ("min_p", &zero),
        ("logit_bias", &empty),
    ];
    let chat_only: [(&str, Unused); 9] = [
        ("logprobs", &off),
        ("top_logprobs", &zero),
        ("tools", &empty),
        ("tool_choice", &none),
        ("functions", &empty),
        ("function_call", &none),
        ("response_format", &plain_text),
        ("modalities", &text_only),
        ("audio", &never),
    ];
    let completion_only: [(&str, Unused); 4] =
        [("logprobs", &never), ("best_of", &one), ("echo", &off), ("suffix", &blank)];
    let rest: &[(&str, Unused)] = if chat { &chat_only } else { &completion_only };
    for (name, unused) in both.iter().chain(rest) {
        // Neutral values are short; a long one is in use whatever it says, and is not worth its memory.
        let short = |raw: &&serde_json::value::RawValue| raw.get().len() <= 256;
        let Some(raw) = fields.raw(name) else { continue };
        let value = Some(raw).filter(short).and_then(|raw| serde_json::from_str(raw.get()).ok());
        if !value.is_some_and(|value| unused(&value)) {
            return Err(unsupported(name));
        }
    }
    Ok(())
}
