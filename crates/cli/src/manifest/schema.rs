//! The checks of admission, without an API server: the structural schema first, then its CEL rules.
use std::collections::BTreeSet;
use std::sync::LazyLock;

use kube::core::cel::{Validator, apply_defaults};
use lathe_api::{GROUP, VERSION};
use regex::Regex;
use serde_json::{Map, Value};

use crate::failure::{Done, Problem};

/// As many problems are told at once; the others come with the next try.
const MOST_TOLD: usize = 8;

/// A kind's name and its schema.
static SCHEMAS: LazyLock<Vec<(String, Value)>> = LazyLock::new(|| {
    let schema = |crd| {
        let crd = serde_json::to_value(crd).unwrap_or_default();
        let kind = crd["spec"]["names"]["kind"].as_str().unwrap_or_default().to_owned();
        (kind, crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone())
    };
    lathe_api::crds::all().into_iter().map(schema).collect()
});

/// Refuses what the API server would refuse.
///
/// # Errors
/// Every field that is wrong, with what is allowed.
pub fn check(api_version: &str, kind: &str, object: &Value) -> Done<()> {
    let own = format!("{GROUP}/{VERSION}");
    let known: Vec<&str> = SCHEMAS.iter().map(|(kind, _)| kind.as_str()).collect();
    if api_version != own {
        let message = format!("`apiVersion` must be {own} (found {api_version})");
        return Err(Problem::user("InvalidManifest", message));
    }
    let Some((_, schema)) = SCHEMAS.iter().find(|(name, _)| name == kind) else {
        let message = format!("`kind` must be one of {} (found {kind})", known.join(", "));
        return Err(Problem::user("InvalidManifest", message));
    };
    let mut problems = Vec::new();
    name(object, &mut problems);
    // Like the API server: defaults first, so that rules see them.
    let object = apply_defaults(schema, object);
    structure(schema, &object, "", &mut problems);
    if problems.is_empty()
        && let Err(errors) = Validator::new().validate(schema, &object, None)
    {
        problems.extend(errors.iter().map(|error| match error.field_path.as_str() {
            "" => error.message.clone(),
            path => format!("`{path}`: {}", error.message),
        }));
    }
    if problems.is_empty() {
        return Ok(());
    }
    let more = problems.len().saturating_sub(MOST_TOLD);
    problems.truncate(MOST_TOLD);
    let mut message = problems.join("; ");
    if more > 0 {
        message.push_str(&format!("; and {more} more"));
    }
    Err(Problem::user("InvalidManifest", message))
}

/// An RFC 1123 subdomain.
fn name(object: &Value, problems: &mut Vec<String>) {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let label = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        let found = if name.is_empty() { "none".to_owned() } else { format!("{name:?}") };
        problems.push(format!(
            "`metadata.name` must be lower-case letters, digits, `-` and `.`, beginning and ending with a letter or digit (found {found})"
        ));
    }
}

fn structure(schema: &Value, value: &Value, path: &str, problems: &mut Vec<String>) {
    let at = if path.is_empty() { "the object" } else { path };
    let wanted = schema["type"].as_str().unwrap_or_default();
    let fits = match wanted {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64(),
        "number" => value.is_number(),
        _ => true,
    };
    if !fits {
        let hint = match (wanted, value) {
            ("string", Value::Number(_) | Value::Bool(_)) => "; put it in quotes",
            _ => "",
        };
        problems.push(format!("`{at}` must be of type {wanted} (found {}{hint})", short(value)));
        return;
    }
    if let Some(allowed) = schema["enum"].as_array().filter(|allowed| !allowed.contains(value)) {
        let allowed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        problems.push(format!("`{at}` must be one of {} (found {})", allowed.join(", "), short(value)));
        return;
    }
    match value {
        Value::Object(fields) => object(schema, fields, path, problems),
        Value::Array(items) => array(schema, items, path, problems),
        Value::String(text) => string(schema, text, at, problems),
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or_default();
            let (least, most) = (schema["minimum"].as_f64(), schema["maximum"].as_f64());
            if least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most) {
                problems.push(format!("`{at}` must be {} (found {number})", range(least, most)));
            }
        }
        _ => {}
    }
}

fn object(schema: &Value, fields: &Map<String, Value>, path: &str, problems: &mut Vec<String>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            problems.push(format!("`{}` must be set", below(name)));
        }
    }
    if let Some(most) = schema["maxProperties"].as_u64().filter(|most| fields.len() as u64 > *most) {
        problems.push(format!("`{path}` must have at most {most} keys (found {})", fields.len()));
    }
    let known = schema["properties"].as_object();
    for (name, value) in fields {
        // The API server has its own schema for these.
        if path.is_empty() && ["apiVersion", "kind", "metadata", "status"].contains(&name.as_str()) {
            continue;
        }
        if let Some(property) = known.and_then(|known| known.get(name)) {
            structure(property, value, &below(name), problems);
        } else if schema["additionalProperties"].is_object() {
            structure(&schema["additionalProperties"], value, &below(name), problems);
        } else {
            let names = known.into_iter().flat_map(Map::keys).map(String::as_str);
            let names: Vec<&str> = names.filter(|name| !path.is_empty() || *name == "spec").collect();
            problems.push(format!("`{}` is no field; allowed are {}", below(name), names.join(", ")));
        }
    }
}

fn array(schema: &Value, items: &[Value], path: &str, problems: &mut Vec<String>) {
    let (least, most) = (schema["minItems"].as_f64(), schema["maxItems"].as_f64());
    let length = items.len() as f64;
    if least.is_some_and(|least| length < least) || most.is_some_and(|most| length > most) {
        problems.push(format!("`{path}` must have {} items (found {})", range(least, most), items.len()));
        return;
    }
    for (index, item) in items.iter().enumerate() {
        structure(&schema["items"], item, &format!("{path}[{index}]"), problems);
    }
    let keys: Vec<&str> = schema["x-kubernetes-list-map-keys"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let identity = |item: &Value| match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => Some(item.to_string()),
        Some("map") => Some(keys.iter().map(|key| item[key].to_string()).collect::<Vec<_>>().join(", ")),
        _ => None,
    };
    let mut seen = BTreeSet::new();
    for twice in items.iter().filter_map(identity).filter(|id| !seen.insert(id.clone())) {
        problems.push(format!("`{path}` must not have {twice} twice"));
    }
}

fn string(schema: &Value, text: &str, at: &str, problems: &mut Vec<String>) {
    let (least, most) = (schema["minLength"].as_f64(), schema["maxLength"].as_f64());
    let length = text.chars().count();
    if least.is_some_and(|least| (length as f64) < least) || most.is_some_and(|most| length as f64 > most) {
        problems.push(format!("`{at}` must have {} characters (found {length})", range(least, most)));
        return;
    }
    let Some(pattern) = schema["pattern"].as_str() else { return };
    if Regex::new(pattern).is_ok_and(|pattern| !pattern.is_match(text)) {
        let what = schema["description"].as_str().unwrap_or_default();
        problems.push(format!("`{at}` must match {pattern} (found {text:?}). It is: {what}"));
    }
}

fn range(least: Option<f64>, most: Option<f64>) -> String {
    match (least, most) {
        (Some(least), Some(most)) if least == most => format!("exactly {least}"),
        (Some(least), Some(most)) => format!("{least} to {most}"),
        (Some(least), None) => format!("at least {least}"),
        (None, Some(most)) => format!("at most {most}"),
        (None, None) => "another number of".to_owned(),
    }
}

fn short(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a map".to_owned(),
        other => other.to_string().chars().take(80).collect(),
    }
}
