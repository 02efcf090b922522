//! Typed, bounded reading of a JSON object, with errors that name the field.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::FileError;

/// A JSON object of a file, and where in the file it stands.
pub(crate) struct Fields<'a> {
    file: &'a str,
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(file: &'a str, value: &'a Value) -> Result<Self, FileError> {
        let map = value.as_object().ok_or_else(|| FileError::malformed(file, "must be a JSON object"))?;
        Ok(Fields { file, path: String::new(), map })
    }

    /// The value of a field; JSON's `null` counts as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field stands there, `null` or not.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, FileError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(name, "an object"))?;
        Ok(Some(Fields { file: self.file, path: format!("{}{name}.", self.path), map }))
    }

    pub(crate) fn integer(
        &self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, FileError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, format!("an integer from {} to {}", range.start(), range.end()))),
        }
    }

    pub(crate) fn required_integer(
        &self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<usize, FileError> {
        let allowed = format!("an integer from {} to {}", range.start(), range.end());
        self.integer(name, range)?.ok_or_else(|| self.wrong(name, allowed))
    }

    /// A number from `range`, whole or not.
    pub(crate) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, FileError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, format!("a number from {:e} to {:e}", range.start(), range.end()))),
        }
    }

    pub(crate) fn required_number(&self, name: &str, range: RangeInclusive<f64>) -> Result<f64, FileError> {
        let allowed = format!("a number from {:e} to {:e}", range.start(), range.end());
        self.number(name, range)?.ok_or_else(|| self.wrong(name, allowed))
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool, FileError> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(name, "true or false")),
        }
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, FileError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, "a string"))
    }

    pub(crate) fn list(&self, name: &str) -> Result<Option<&'a [Value]>, FileError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_array().map(|list| Some(list.as_slice())).ok_or_else(|| self.wrong(name, "a list"))
    }

    pub(crate) fn wrong(&self, name: &str, allowed: impl Into<String>) -> FileError {
        FileError::Field {
            file: self.file.to_owned(),
            field: format!("{}{name}", self.path),
            allowed: allowed.into(),
            found: self.get(name).map_or_else(|| "nothing".to_owned(), shorten),
        }
    }

    pub(crate) fn unsupported(&self, name: &str, supported: &str) -> FileError {
        let value = self.get(name).map_or_else(|| "null".to_owned(), shorten);
        FileError::Unsupported {
            file: self.file.to_owned(),
            what: format!("`{}{name}`: {value}", self.path),
            supported: supported.to_owned(),
        }
    }
}

/// Parses a file as JSON.
pub(crate) fn parse_json(file: &str, bytes: &[u8]) -> Result<Value, FileError> {
    serde_json::from_slice(bytes)
        .map_err(|error| FileError::malformed(file, format!("is not valid JSON: {error}")))
}

/// JSON fit for a message: one line, at most 60 characters.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
