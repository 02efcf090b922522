//! One row: JSON to a checked [`Example`].

use lathe_engine::files::Message;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// One example to learn from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Example {
    /// A conversation; the assistant's turns are learned.
    Chat(Vec<Message>),
    /// A text and how it goes on; the continuation is learned.
    PromptCompletion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// A text, all of it learned.
    Text(String),
}

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `{"messages": [{"role", "content"}]}`
    Chat,
    /// `{"prompt", "completion"}`
    PromptCompletion,
    /// `{"text"}`
    Text,
}

impl Format {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Format::Chat => "Chat",
            Format::PromptCompletion => "PromptCompletion",
            Format::Text => "Text",
        }
    }

    /// The format of a row by its fields.
    pub(super) fn detect(row: &Map<String, Value>) -> Result<Format, String> {
        if row.contains_key("messages") {
            Ok(Format::Chat)
        } else if row.contains_key("prompt") && row.contains_key("completion") {
            Ok(Format::PromptCompletion)
        } else if row.contains_key("text") {
            Ok(Format::Text)
        } else {
            let names: Vec<_> = row.keys().take(8).map(|name| format!("`{}`", shorten(name))).collect();
            let found = if names.is_empty() { "no field".to_owned() } else { names.join(", ") };
            Err(format!(
                "a row must have `messages`, or `prompt` and `completion`, or `text` (found {found})"
            ))
        }
    }
}

impl Example {
    /// Checks a row; the error names the field, what is allowed and what was found.
    pub(super) fn parse(row: &Map<String, Value>, format: Format) -> Result<Example, String> {
        match format {
            Format::Chat => chat(row),
            Format::PromptCompletion => {
                let prompt = text(row.get("prompt"), "prompt")?.to_owned();
                let completion = filled(row.get("completion"), "completion")?.to_owned();
                Ok(Example::PromptCompletion { prompt, completion })
            }
            Format::Text => Ok(Example::Text(filled(row.get("text"), "text")?.to_owned())),
        }
    }

    /// A hash of the example's content, the same for rows that differ only in how their JSON is written.
    pub fn hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        match self {
            Example::Chat(messages) => {
                add("chat");
                for message in messages {
                    add(&message.role);
                    add(&message.content);
                }
            }
            Example::PromptCompletion { prompt, completion } => {
                add("completion");
                add(prompt);
                add(completion);
            }
            Example::Text(text) => {
                add("text");
                add(text);
            }
        }
        hash.finalize().into()
    }
}

/// Each answer is found by writing out the conversation up to it, so the work grows with the square of their number.
const MAX_MESSAGES: usize = 1024;

fn chat(row: &Map<String, Value>) -> Result<Example, String> {
    if row.get("tools").is_some_and(|tools| !tools.is_null()) {
        return Err("`tools` is not supported; leave it out".to_owned());
    }
    let value = row.get("messages");
    let list = value.and_then(Value::as_array).ok_or_else(|| wrong("messages", "a list", value))?;
    if list.is_empty() {
        return Err("`messages` must have at least one message (found none)".to_owned());
    }
    if list.len() > MAX_MESSAGES {
        let found = list.len();
        return Err(format!(
            "`messages` must have at most {MAX_MESSAGES} messages (found {found}); split the conversation"
        ));
    }
    let messages =
        list.iter().enumerate().map(|(at, value)| message(at, value)).collect::<Result<Vec<_>, _>>()?;
    if !messages.iter().any(|message| message.role == "assistant") {
        return Err("`messages` must have a message of the assistant to learn (found none)".to_owned());
    }
    Ok(Example::Chat(messages))
}

fn message(at: usize, value: &Value) -> Result<Message, String> {
    let here = format!("messages[{at}]");
    let fields =
        value.as_object().ok_or_else(|| wrong(&here, "an object with `role` and `content`", Some(value)))?;
    let role_field = format!("{here}.role");
    let role = text(fields.get("role"), &role_field)?;
    if !["system", "user", "assistant"].contains(&role) {
        let role = shorten(role);
        return Err(format!(
            "`{role_field}` must be \"system\", \"user\" or \"assistant\" (found \"{role}\")"
        ));
    }
    for name in ["tool_calls", "function_call", "audio"] {
        if fields.get(name).is_some_and(|value| !value.is_null()) {
            return Err(format!("`{here}.{name}` is not supported; only `role` and `content` are learned"));
        }
    }
    let content = text(fields.get("content"), &format!("{here}.content"))?;
    Ok(Message { role: role.to_owned(), content: content.to_owned() })
}

fn filled<'a>(value: Option<&'a Value>, field: &str) -> Result<&'a str, String> {
    let found = text(value, field)?;
    if found.is_empty() { Err(format!("`{field}` must not be empty")) } else { Ok(found) }
}

fn text<'a>(value: Option<&'a Value>, field: &str) -> Result<&'a str, String> {
    value.and_then(Value::as_str).ok_or_else(|| wrong(field, "a string", value))
}

fn wrong(field: &str, allowed: &str, found: Option<&Value>) -> String {
    format!("`{field}` must be {allowed} (found {})", kind(found))
}

/// A value's type in words; its content may be private and stays out of messages.
pub(super) fn kind(value: Option<&Value>) -> &'static str {
    match value {
        None => "nothing",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a string",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(30).flat_map(char::escape_debug).collect()
}
