//! A JSON object of a request, read field by field so that every refusal names its field.
//!
//! Known fields are kept as the text they came in, unknown ones are skipped: a body costs little more memory than its
//! bytes, and however deep it is nested nothing here recurses.
use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::serve::error::ApiError;

/// Every field that is looked at, of all objects of a request.
const KNOWN: &[&str] = &[
    "audio",
    "best_of",
    "content",
    "dimensions",
    "echo",
    "encoding_format",
    "frequency_penalty",
    "function_call",
    "functions",
    "ignore_eos",
    "include_usage",
    "input",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "modalities",
    "model",
    "n",
    "presence_penalty",
    "prompt",
    "repetition_penalty",
    "response_format",
    "role",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "text",
    "tool_calls",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
    "type",
];

/// The known fields of one object. `null` is the same as absence.
#[derive(Debug)]
pub struct Fields<'a> {
    values: Vec<(&'static str, &'a RawValue)>,
    /// Where the object stands, e.g. `messages[1].`; empty for the body itself.
    prefix: String,
}

impl<'a> Fields<'a> {
    /// Reads a request's body.
    pub fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let Known(values) = serde_json::from_slice(body).map_err(|error| {
            ApiError::invalid(
                Some("invalid_json"),
                format!("The request body could not be parsed as a JSON object: {error}."),
            )
        })?;
        Ok(Fields { values, prefix: String::new() })
    }

    /// Reads an object that is a field's value or an item of a list, named `at` in errors.
    pub fn nested(at: &str, value: &'a RawValue) -> Result<Self, ApiError> {
        if kind(value) != "an object" {
            return Err(wrong_type(at, "an object", value));
        }
        let Known(values) = serde_json::from_str(value.get())
            .map_err(|error| ApiError::field(at, "invalid_value", format!("Invalid '{at}': {error}.")))?;
        Ok(Fields { values, prefix: format!("{at}.") })
    }

    /// A field's value as it came.
    pub fn raw(&self, name: &str) -> Option<&'a RawValue> {
        self.values.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }

    /// The field's whole name.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The field must be there.
    pub fn required(&self, name: &str) -> Result<&'a RawValue, ApiError> {
        let path = self.path(name);
        self.raw(name).ok_or_else(|| {
            let message = format!("Missing required parameter: '{path}'.");
            ApiError::field(path, "missing_required_parameter", message)
        })
    }

    /// true or false.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        let Some(value) = self.raw(name) else { return Ok(false) };
        match value.get() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(wrong_type(&self.path(name), "a boolean", value)),
        }
    }

    /// An integer from `least` to `most`.
    pub fn integer(&self, name: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let path = self.path(name);
        let number = integer(&path, value)?;
        let (side, bound, code) = if number < least {
            ("below minimum", format!(">= {least}"), "integer_below_min_value")
        } else if number > most {
            ("above maximum", format!("<= {most}"), "integer_above_max_value")
        } else {
            return Ok(Some(number));
        };
        let message = format!(
            "Invalid '{path}': integer {side} value. Expected a value {bound}, but got {number} instead."
        );
        Err(ApiError::field(path, code, message))
    }

    /// A number from `least` to `most`.
    pub fn number(&self, name: &str, least: f64, most: f64) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let path = self.path(name);
        let number: f64 = match kind(value) {
            "a number" => {
                serde_json::from_str(value.get()).map_err(|_| wrong_type(&path, "a decimal", value))?
            }
            _ => return Err(wrong_type(&path, "a decimal", value)),
        };
        let (side, bound, code) = if number < least {
            ("below minimum", format!(">= {least}"), "decimal_below_min_value")
        } else if number > most {
            ("above maximum", format!("<= {most}"), "decimal_above_max_value")
        } else {
            return Ok(Some(number));
        };
        let message = format!(
            "Invalid '{path}': decimal {side} value. Expected a value {bound}, but got {number} instead."
        );
        Err(ApiError::field(path, code, message))
    }
}

/// A string's text.
pub fn string<'a>(path: &str, value: &'a RawValue) -> Result<Cow<'a, str>, ApiError> {
    if kind(value) != "a string" {
        return Err(wrong_type(path, "a string", value));
    }
    let text = value.get();
    let inner = &text[1..text.len() - 1];
    if !inner.contains('\\') {
        return Ok(Cow::Borrowed(inner));
    }
    serde_json::from_str(text)
        .map(Cow::Owned)
        .map_err(|error| ApiError::field(path, "invalid_value", format!("Invalid '{path}': {error}.")))
}

/// A whole number.
pub fn integer(path: &str, value: &RawValue) -> Result<i64, ApiError> {
    serde_json::from_str(value.get()).map_err(|_| wrong_type(path, "an integer", value))
}

/// A list of 1 to `most` items, as they came.
pub fn list<'a>(path: &str, value: &'a RawValue, most: usize) -> Result<Vec<&'a RawValue>, ApiError> {
    let (items, total) = counted(path, value, most)?;
    if total > most {
        let message = format!(
            "Invalid '{path}': array too long. Expected an array with at most {most} items, but got {total} items \
             instead."
        );
        return Err(ApiError::field(path, "array_above_max_length", message));
    }
    Ok(items)
}

/// The first `most` items of a list that is not empty, and how many there are.
pub fn counted<'a>(
    path: &str,
    value: &'a RawValue,
    most: usize,
) -> Result<(Vec<&'a RawValue>, usize), ApiError> {
    if kind(value) != "an array" {
        return Err(wrong_type(path, "an array", value));
    }
    let Bounded { items, total } = Bounded::read(value, most)
        .map_err(|error| ApiError::field(path, "invalid_value", format!("Invalid '{path}': {error}.")))?;
    if total == 0 {
        let message = format!("Invalid '{path}': empty array. Expected an array with at least 1 item.");
        return Err(ApiError::field(path, "empty_array", message));
    }
    Ok((items, total))
}

/// What a JSON value is.
pub fn kind(value: &RawValue) -> &'static str {
    match value.get().as_bytes().first() {
        Some(b'"') => "a string",
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    }
}

/// The refusal of a value of another type.
pub fn wrong_type(path: &str, expected: &str, found: &RawValue) -> ApiError {
    let found = match kind(found) {
        "a number" if expected == "an integer" => "a number that is none",
        other => other,
    };
    let message = format!("Invalid type for '{path}': expected {expected}, but got {found} instead.");
    ApiError::field(path, "invalid_type", message)
}

/// The known fields of an object in the order they came, without those that are null.
struct Known<'a>(Vec<(&'static str, &'a RawValue)>);

impl<'de> Deserialize<'de> for Known<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Known<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut values: Vec<(&'static str, &'de RawValue)> = Vec::new();
                let mut seen = 0u64;
                while let Some(key) = map.next_key::<String>()? {
                    let Some(at) = KNOWN.iter().position(|known| *known == key) else {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    };
                    if seen & (1 << at) != 0 {
                        return Err(A::Error::custom(format_args!("the field `{key}` stands twice")));
                    }
                    seen |= 1 << at;
                    let value = map.next_value::<&'de RawValue>()?;
                    if value.get() != "null" {
                        values.push((KNOWN[at], value));
                    }
                }
                Ok(Known(values))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

const _: () = assert!(KNOWN.len() <= 64, "`seen` has 64 bits");

/// The first items of a list; the rest is counted and skipped.
struct Bounded<'a> {
    items: Vec<&'a RawValue>,
    total: usize,
}

impl<'a> Bounded<'a> {
    fn read(value: &'a RawValue, most: usize) -> serde_json::Result<Self> {
        struct Items(usize);
        impl<'de> Visitor<'de> for Items {
            type Value = Bounded<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut items = Vec::new();
                while items.len() < self.0 {
                    match list.next_element()? {
                        Some(item) => items.push(item),
                        None => return Ok(Bounded { total: items.len(), items }),
                    }
                }
                let mut total = items.len();
                while list.next_element::<IgnoredAny>()?.is_some() {
                    total += 1;
                }
                Ok(Bounded { items, total })
            }
        }
        serde_json::Deserializer::from_str(value.get()).deserialize_seq(Items(most))
    }
}
