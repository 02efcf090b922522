//! Each CEL rule accepts a valid object and refuses a bad one. The same cases run against a real
//! API server in e2e/, which stays the judge.
use std::collections::{BTreeMap, BTreeSet};

use kube::core::cel::Validator;
use serde_json::Value;

const CASES: &str = include_str!("admission.json");

fn cases() -> Value {
    serde_json::from_str(CASES).expect("admission.json is JSON")
}

fn schemas() -> BTreeMap<String, Value> {
    let schema = |crd: Value| {
        let kind = crd["spec"]["names"]["kind"].as_str().expect("kind").to_owned();
        (kind, crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone())
    };
    lathe_api::crds::all().iter().map(|crd| schema(serde_json::to_value(crd).expect("serialises"))).collect()
}

fn merged(target: &Value, patch: &Value) -> Value {
    let mut result = target.clone();
    json_patch::merge(&mut result, patch);
    result
}

fn refusals(schema: &Value, object: &Value, old: Option<&Value>) -> Vec<String> {
    match Validator::new().validate(schema, object, old) {
        Ok(()) => Vec::new(),
        Err(errors) => errors.to_string().lines().map(str::to_owned).collect(),
    }
}

#[test]
fn valid_objects_are_accepted_and_may_be_applied_again() {
    let (cases, schemas) = (cases(), schemas());
    for (kind, object) in cases["valid"].as_object().expect("map") {
        assert_eq!(refusals(&schemas[kind], object, None), [""; 0], "{kind}");
        assert_eq!(refusals(&schemas[kind], object, Some(object)), [""; 0], "{kind} again");
    }
}

#[test]
fn what_may_change_may_change() {
    let (cases, schemas) = (cases(), schemas());
    for case in cases["accepted"].as_array().expect("list") {
        let kind = case["kind"].as_str().expect("kind");
        let old = merged(&cases["valid"][kind], &case["old"]);
        assert_eq!(refusals(&schemas[kind], &merged(&old, &case["change"]), Some(&old)), [""; 0], "{case}");
    }
}

#[test]
fn each_bad_object_is_refused_for_its_own_reason() {
    let (cases, schemas) = (cases(), schemas());
    for case in cases["refused"].as_array().expect("list") {
        let kind = case["kind"].as_str().expect("kind");
        let valid = &cases["valid"][kind];
        let old = case.get("old").map(|patch| merged(valid, patch));
        let object = merged(old.as_ref().unwrap_or(valid), &case["change"]);
        let found = refusals(&schemas[kind], &object, old.as_ref());
        let because = case["because"].as_str().expect("text");
        assert!(found.iter().any(|text| text.contains(because)), "{case}\nfound: {found:#?}");
    }
}

/// By the rule's place, not by its text alone: types that several fields share bring theirs to each.
#[test]
fn each_rule_has_an_accepted_and_a_refused_object() {
    let (cases, schemas) = (cases(), schemas());
    let mut refused = BTreeSet::new();
    for case in cases["refused"].as_array().expect("list") {
        let kind = case["kind"].as_str().expect("kind");
        let old = case.get("old").map(|patch| merged(&cases["valid"][kind], patch));
        let object = merged(old.as_ref().unwrap_or(&cases["valid"][kind]), &case["change"]);
        let told = refusals(&schemas[kind], &object, old.as_ref());
        refused
            .extend(told.iter().map(|line| (kind, line.trim_start_matches([' ', '-']).replace("[0]", "[]"))));
    }
    let mut untested = Vec::new();
    for (kind, schema) in &schemas {
        let mut rules = Vec::new();
        collect(schema, &mut Vec::new(), &mut rules);
        assert!(rules.len() >= 3, "the rules of {kind} were not found: {rules:?}");
        let changed =
            cases["accepted"].as_array().expect("list").iter().filter(|case| case["kind"] == **kind);
        let changed = changed
            .map(|case| merged(&merged(&cases["valid"][kind], &case["old"]), &case["change"]))
            .chain([cases["valid"][kind].clone()])
            .collect::<Vec<_>>();
        for Rule { at, told } in rules {
            let path = at.join(".");
            let never =
                absent(&cases, kind).any(|field| path == field || path.starts_with(&format!("{field}.")));
            if !never && !changed.iter().any(|object| reaches(object, &at)) {
                untested.push(format!("no accepted {kind} reaches {}", at.join(".")));
            }
            if !refused.contains(&(kind.as_str(), told.clone())) {
                untested.push(format!("no {kind} is refused for {told}"));
            }
        }
    }
    assert!(untested.is_empty(), "{untested:#?}");
    for kind in schemas.keys() {
        for field in absent(&cases, kind) {
            let told = |(of, told): &(&str, String)| {
                of == kind && told.starts_with(&format!("{field}: ")) && told.contains("must be absent")
            };
            assert!(refused.iter().any(told), "{kind} is not refused for having {field}");
        }
    }
}

/// Fields of a shared type that must be absent where they stand, so that no accepted object has them.
fn absent<'a>(cases: &'a Value, kind: &str) -> impl Iterator<Item = &'a str> {
    cases["absent"][kind].as_array().into_iter().flatten().filter_map(Value::as_str)
}

#[derive(Debug)]
struct Rule {
    /// Names of the fields that lead to the schema which has the rule; `[]` is an item.
    at: Vec<String>,
    /// The refusal as the validator says it: `spec.field: message`.
    told: String,
}

fn collect(schema: &Value, at: &mut Vec<String>, rules: &mut Vec<Rule>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let field = rule["fieldPath"].as_str().unwrap_or_default();
        let path = (at.join(".") + field).replace(".[]", "[]");
        let path = path.trim_start_matches('.');
        let message = rule["message"].as_str().unwrap_or("a rule without a message");
        let told = if path.is_empty() { message.to_owned() } else { format!("{path}: {message}") };
        rules.push(Rule { at: at.clone(), told });
    }
    let fields = schema["properties"].as_object().into_iter().flatten();
    // Users write no status.
    let fields = fields.filter(|(name, _)| *name != "status").map(|(name, child)| (name.clone(), child));
    let items = schema.get("items").map(|child| ("[]".to_owned(), child));
    for (name, child) in fields.chain(items) {
        at.push(name);
        collect(child, at, rules);
        at.pop();
    }
}

fn reaches(object: &Value, at: &[String]) -> bool {
    let Some((name, rest)) = at.split_first() else { return true };
    match name.as_str() {
        "[]" => object.as_array().is_some_and(|items| items.iter().any(|item| reaches(item, rest))),
        name => object.get(name).is_some_and(|child| reaches(child, rest)),
    }
}
