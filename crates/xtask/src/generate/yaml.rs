//! YAML from JSON, with keys in their own order: enough for Kubernetes manifests that we write ourselves.
use std::fmt::Write as _;

use serde_json::Value;

/// One document, ending with a line break.
pub fn document(value: &Value) -> String {
    let mut text = String::new();
    block(value, 0, &mut text);
    text
}

fn block(value: &Value, indent: usize, out: &mut String) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) => {
            for (key, child) in map {
                let _ = write!(out, "{pad}{}:", scalar(&Value::String(key.clone())));
                nested(child, indent + 2, out);
            }
        }
        Value::Array(items) => {
            for item in items {
                if is_leaf(item) {
                    let _ = writeln!(out, "{pad}- {}", scalar(item));
                    continue;
                }
                let mut inner = String::new();
                block(item, indent + 2, &mut inner);
                let _ = write!(out, "{pad}- {}", inner.trim_start_matches(' '));
            }
        }
        leaf => {
            let _ = writeln!(out, "{pad}{}", scalar(leaf));
        }
    }
}

fn nested(child: &Value, indent: usize, out: &mut String) {
    if is_leaf(child) {
        let _ = writeln!(out, " {}", scalar(child));
    } else {
        out.push('\n');
        block(child, indent, out);
    }
}

fn is_leaf(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => true,
    }
}

/// JSON scalars are YAML scalars; a plain word needs no quotes.
fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) if is_plain(text) => text.clone(),
        other => other.to_string(),
    }
}

fn is_plain(text: &str) -> bool {
    let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
        && !reserved.contains(&text.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::document;

    #[test]
    fn words_stay_plain_and_everything_else_is_quoted() {
        let value = json!({
            "kind": "Model", "on": "yes", "text": "a: b", "number": "1", "empty": {}, "none": [],
            "list": [1, "x", {"a": 1, "b": [true]}],
        });
        let expected = "empty: {}\nkind: Model\nlist:\n  - 1\n  - x\n  - a: 1\n    b:\n      - true\nnone: []\nnumber: \"1\"\n\"on\": \"yes\"\ntext: \"a: b\"\n";
        assert_eq!(document(&value), expected);
    }
}
