//! A request's JSON to a [`Request`], or to [`embeddings::Embeddings`], in which every number is bounded: the one place where
//! what clients send is judged.
mod embeddings;
mod fields;
mod sampling;

use std::borrow::Cow;

use lathe_engine::files::Message;
use serde_json::value::RawValue;

use super::error::ApiError;
pub use embeddings::{Content, Encoding, Input, embeddings};
use fields::{Fields, counted, kind, list, string, wrong_type};
pub use sampling::Settings;

const MAX_MESSAGES: usize = 4096;
const MAX_PARTS: usize = 1024;

/// A request for one answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The model id as the client wrote it.
    pub model: String,
    /// What to answer.
    pub prompt: Prompt,
    /// How.
    pub settings: Settings,
    /// Send the answer as it grows.
    pub stream: bool,
    /// End a stream with the counts of tokens.
    pub include_usage: bool,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A conversation, for the model's chat template.
    Chat(Vec<Message>),
    /// Plain text.
    Text(String),
    /// Tokens, checked against the vocabulary by the reader.
    Tokens(Vec<u32>),
}

/// Reads the body of `POST /v1/chat/completions`. `context` is the most tokens that an answer can have.
pub fn chat(body: &[u8], context: usize) -> Result<Request, ApiError> {
    let fields = Fields::parse(body)?;
    let model = model(&fields)?;
    let items = list("messages", fields.required("messages")?, MAX_MESSAGES)?;
    let messages =
        items.into_iter().enumerate().map(|(at, item)| message(at, item)).collect::<Result<_, _>>()?;
    sampling::refuse_unsupported(&fields, true)?;
    let (stream, include_usage) = stream(&fields)?;
    let settings = Settings::read(&fields, context, None)?;
    Ok(Request { model, prompt: Prompt::Chat(messages), settings, stream, include_usage })
}

/// Reads the body of `POST /v1/completions`; its answers have 16 tokens where nothing else is asked for.
pub fn completion(body: &[u8], context: usize) -> Result<Request, ApiError> {
    let fields = Fields::parse(body)?;
    let model = model(&fields)?;
    let prompt = prompt(fields.required("prompt")?, context)?;
    sampling::refuse_unsupported(&fields, false)?;
    let (stream, include_usage) = stream(&fields)?;
    let settings = Settings::read(&fields, context, Some(16))?;
    Ok(Request { model, prompt, settings, stream, include_usage })
}

fn model(fields: &Fields) -> Result<String, ApiError> {
    let name = string("model", fields.required("model")?)?;
    if name.is_empty() {
        let message = "Invalid 'model': empty string. Expected the id of a model, see GET /v1/models.";
        return Err(ApiError::field("model", "empty_string", message));
    }
    Ok(name.into_owned())
}

fn message(at: usize, item: &RawValue) -> Result<Message, ApiError> {
    let path = format!("messages[{at}]");
    let fields = Fields::nested(&path, item)?;
    let role_path = fields.path("role");
    let role = match &*string(&role_path, fields.required("role")?)? {
        // OpenAI's newer name of the same role; templates know the older one.
        "developer" => "system",
        "system" => "system",
        "user" => "user",
        "assistant" => "assistant",
        other => {
            let other: String = other.chars().take(40).collect();
            let message = format!(
                "Invalid value: '{other}'. Supported values are: 'system', 'developer', 'user' and 'assistant'."
            );
            return Err(ApiError::field(role_path, "invalid_value", message));
        }
    };
    if fields.raw("tool_calls").is_some() {
        return Err(unsupported(&fields.path("tool_calls")));
    }
    let content = content(&fields.path("content"), fields.required("content")?)?;
    Ok(Message { role: role.to_owned(), content })
}

/// A string, or a list of `{"type": "text", "text": ...}`, which are joined by line ends.
fn content(path: &str, value: &RawValue) -> Result<String, ApiError> {
    match kind(value) {
        "a string" => string(path, value).map(Cow::into_owned),
        "an array" => {
            let parts = list(path, value, MAX_PARTS)?;
            let texts =
                parts.into_iter().enumerate().map(|(at, part)| text_part(&format!("{path}[{at}]"), part));
            Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        _ => Err(wrong_type(path, "a string or an array of text parts", value)),
    }
}

fn text_part(path: &str, part: &RawValue) -> Result<String, ApiError> {
    let fields = Fields::nested(path, part)?;
    let type_path = fields.path("type");
    let kind = string(&type_path, fields.required("type")?)?;
    if kind != "text" {
        let kind: String = kind.chars().take(40).collect();
        let message =
            format!("Invalid value: '{kind}'. This model reads text alone: the supported value is 'text'.");
        return Err(ApiError::field(type_path, "invalid_value", message));
    }
    string(&fields.path("text"), fields.required("text")?).map(Cow::into_owned)
}

/// A string, a list of tokens, or a list of one of either.
fn prompt(value: &RawValue, context: usize) -> Result<Prompt, ApiError> {
    const EXPECTED: &str = "a string, an array of tokens, or an array of one of either";
    match kind(value) {
        "a string" => string("prompt", value).map(|text| Prompt::Text(text.into_owned())),
        "an array" => {
            let (items, total) = counted("prompt", value, context)?;
            match (kind(items[0]), items.as_slice()) {
                ("a number", _) => prompt_tokens("prompt", &items, total, context),
                ("a string", [text]) => string("prompt[0]", text).map(|text| Prompt::Text(text.into_owned())),
                ("an array", [inner]) => {
                    let (items, total) = counted("prompt[0]", inner, context)?;
                    prompt_tokens("prompt[0]", &items, total, context)
                }
                ("a string" | "an array", _) => Err(ApiError::field(
                    "prompt",
                    "unsupported_value",
                    "Invalid 'prompt': several prompts in one request are not supported; send one request for each.",
                )),
                _ => Err(wrong_type("prompt[0]", "a string or a token", items[0])),
            }
        }
        _ => Err(wrong_type("prompt", EXPECTED, value)),
    }
}

fn prompt_tokens(path: &str, items: &[&RawValue], total: usize, context: usize) -> Result<Prompt, ApiError> {
    if total > items.len() {
        return Err(ApiError::context_exceeded("prompt", context, total, None));
    }
    tokens(path, items).map(Prompt::Tokens)
}

fn tokens(path: &str, items: &[&RawValue]) -> Result<Vec<u32>, ApiError> {
    let token = |(at, item): (usize, &&RawValue)| {
        let path = format!("{path}[{at}]");
        let number = fields::integer(&path, item)?;
        u32::try_from(number).map_err(|_| {
            let message = format!("Invalid '{path}': {number} is not a token of this model.");
            ApiError::field(path, "invalid_value", message)
        })
    };
    items.iter().enumerate().map(token).collect()
}

fn stream(fields: &Fields) -> Result<(bool, bool), ApiError> {
    let stream = fields.flag("stream")?;
    let Some(options) = fields.raw("stream_options") else { return Ok((stream, false)) };
    if !stream {
        let message = "The 'stream_options' parameter is only allowed when 'stream' is enabled.";
        return Err(ApiError::field("stream_options", "invalid_value", message));
    }
    Ok((true, Fields::nested("stream_options", options)?.flag("include_usage")?))
}

fn unsupported(path: &str) -> ApiError {
    let message = format!("Unsupported parameter: '{path}' is not supported by this server; leave it out.");
    ApiError::field(path, "unsupported_parameter", message)
}

#[cfg(test)]
mod tests;
