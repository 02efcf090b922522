//! Texts of a form: rules, and no `pattern`s, whose refusals would show a regular expression where a user wants words.
//! (Editors, which read patterns alone, say nothing.)
use serde_json::{Value, json};

const OBJECT_NAME: &str = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$";
const OBJECT_NAME_WORDS: &str =
    "lower-case letters, digits, `-` and `.`, beginning and ending with a letter or digit";

/// The validations of a string that must match `pattern` (RE2, without quotes and backslashes); `must` says so in words.
pub(crate) fn matching(pattern: &str, must: &str) -> Value {
    json!([{"rule": format!("self.matches('{pattern}')"), "message": must}])
}

/// The validations of a list of strings, each of which must match `pattern`.
pub(crate) fn each_matching(pattern: &str, must: &str) -> Value {
    json!([{"rule": format!("self.all(text, text.matches('{pattern}'))"), "message": must}])
}

/// The name of an object.
pub(crate) fn object_name() -> Value {
    matching(OBJECT_NAME, &format!("must be an object's name: {OBJECT_NAME_WORDS}"))
}

/// A list of names of objects.
pub(crate) fn object_names() -> Value {
    each_matching(OBJECT_NAME, &format!("must be names of objects, each {OBJECT_NAME_WORDS}"))
}

/// A digest.
pub(crate) fn digest() -> Value {
    matching("^sha256:[0-9a-f]{64}$", "must be `sha256:` and 64 hexadecimal digits in lower case")
}
