//! The rules for our schemas (Kubernetes API conventions and our own), counted over every CRD: 0 violations.
use serde_json::Value;

const MAX_CRD_BYTES: usize = 256 * 1024;

#[test]
fn the_schemas_keep_every_rule() {
    let mut violations = Vec::new();
    for crd in lathe_api::crds::all() {
        let crd = serde_json::to_value(crd).expect("serialises");
        violations.extend(crd_violations(&crd));
    }
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}

#[test]
fn the_rules_see_what_they_forbid() {
    let bad = serde_json::json!({
        "type": "object", "description": "d",
        "properties": {
            "free": {"type": "string", "description": "d"},
            "count": {"type": "integer", "format": "uint32", "description": "d"},
            "share": {"type": "number", "description": "d"},
            "list": {"type": "array", "description": "d", "items": {"type": "string", "maxLength": 1}},
            "silent": {"type": "boolean"},
            "any": {"x-kubernetes-preserve-unknown-fields": true, "description": "d"},
            "map": {"type": "object", "description": "d", "additionalProperties": {"type": "string", "maxLength": 1}},
        }
    });
    let mut found = Vec::new();
    field(&bad, ".spec", true, &mut found);
    let expected = [
        "maxLength",
        "unsigned",
        "minimum",
        "floats",
        "maxItems",
        "list-type",
        "description",
        "type",
        "maxProperties",
    ];
    for word in expected {
        assert!(found.iter().any(|f: &String| f.contains(word)), "{word} was not seen in {found:#?}");
    }
}

fn crd_violations(crd: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let name = crd["metadata"]["name"].as_str().unwrap_or("?").to_owned();
    let spec = &crd["spec"];
    let mut rule = |holds: bool, text: &str| {
        if !holds {
            found.push(format!("{name}: {text}"));
        }
    };
    rule(crd.to_string().len() < MAX_CRD_BYTES, "must stay well under 256 KiB");
    rule(
        spec["names"]["categories"] == serde_json::json!(["lathe"]),
        "must be in the category `lathe` alone",
    );
    rule(spec["versions"].as_array().map(Vec::len) == Some(1), "must have one version");
    let version = &spec["versions"][0];
    let columns = version["additionalPrinterColumns"].as_array().cloned().unwrap_or_default();
    rule(columns.iter().any(|c| c["name"] == "Age"), "must have the column Age");
    rule(columns.iter().all(|c| c["description"].is_string()), "every column must have a description");
    let root = &version["schema"]["openAPIV3Schema"];
    let status = &root["properties"]["status"];
    if status.is_object() {
        rule(version["subresources"]["status"].is_object(), "must have the status subresource");
        rule(status["default"]["observedGeneration"] == -1, "status must default to observedGeneration -1");
        rule(status["properties"]["observedGeneration"].is_object(), "status must have observedGeneration");
        let conditions = &status["properties"]["conditions"];
        rule(conditions["x-kubernetes-list-type"] == "map", "conditions must be a map by type");
        rule(status["properties"].get("phase").is_none(), "status must not have a phase");
        rule(columns.iter().any(|c| c["name"] == "Reason"), "must have the column Reason");
    }
    for part in ["spec", "status"] {
        if root["properties"][part].is_object() {
            field(&root["properties"][part], &format!("{name}.{part}"), part == "spec", &mut found);
        }
    }
    found
}

fn field(schema: &Value, path: &str, in_spec: bool, found: &mut Vec<String>) {
    let mut rule = |holds: bool, text: &str| {
        if !holds {
            found.push(format!("{path}: {text}"));
        }
    };
    let has = |key: &str| schema.get(key).is_some();
    let is_item = path.ends_with("[]") || path.ends_with("{}");
    rule(
        is_item || schema["description"].as_str().is_some_and(|d| !d.trim().is_empty()),
        "must have a description",
    );
    rule(!schema.to_string().contains("secretKeyRef"), "must not reference a Secret's key");
    let format = schema["format"].as_str().unwrap_or_default();
    rule(!format.starts_with("uint"), "must not be unsigned");
    rule(schema["nullable"] != true || !in_spec, "must not be nullable in spec");
    match schema["type"].as_str() {
        Some("string") => {
            let bounded = has("maxLength") || has("enum") || format == "date-time";
            rule(bounded, "must have maxLength, an enum or a date-time format");
        }
        Some("integer") => rule(has("minimum") && has("maximum"), "must have a minimum and a maximum"),
        Some("number") => rule(false, "floats are not allowed"),
        Some("boolean") => {}
        Some("array") => {
            rule(has("maxItems"), "must have maxItems");
            rule(has("x-kubernetes-list-type"), "must have x-kubernetes-list-type");
            field(&schema["items"], &format!("{path}[]"), in_spec, found);
        }
        Some("object") => {
            if let Some(values) = schema.get("additionalProperties") {
                rule(has("maxProperties"), "must have maxProperties");
                field(values, &format!("{path}{{}}"), in_spec, found);
            }
            for (name, child) in schema["properties"].as_object().into_iter().flatten() {
                field(child, &format!("{path}.{name}"), in_spec, found);
            }
        }
        _ => rule(false, "must have a type that is checked"),
    }
}
