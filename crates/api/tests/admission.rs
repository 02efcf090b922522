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

#[test]
fn each_rule_has_a_refused_object() {
    let cases = cases();
    let reasons: Vec<&str> = cases["refused"]
        .as_array()
        .expect("list")
        .iter()
        .filter_map(|case| case["because"].as_str())
        .collect();
    let mut messages = BTreeSet::new();
    schemas().values().for_each(|schema| collect(schema, &mut messages));
    assert!(messages.len() >= 20, "the rules were not found: {messages:?}");
    let untested: Vec<_> = messages.iter().filter(|m| !reasons.iter().any(|r| m.contains(r))).collect();
    assert!(untested.is_empty(), "rules without a refused object: {untested:#?}");
}

fn collect(schema: &Value, messages: &mut BTreeSet<String>) {
    match schema {
        Value::Object(map) => {
            for rule in map.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten() {
                messages.insert(rule["message"].as_str().unwrap_or("a rule without a message").to_owned());
            }
            map.values().for_each(|child| collect(child, messages));
        }
        Value::Array(items) => items.iter().for_each(|child| collect(child, messages)),
        _ => {}
    }
}
