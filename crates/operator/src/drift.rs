//! Whether an object of ours still is as we want it: an unchanged one is not written again.
//!
//! A hash of what was applied stands in an annotation, so that a field that is no longer wanted is noticed; what is wanted is
//! also looked for in the live object, so that a change by somebody else is noticed.
use kube::{Resource, ResourceExt as _};
use lathe_api::Quantity;
use lathe_resolve::pod;
use serde::Serialize;
use serde_json::Value;

/// Annotation: hash of the object as it was applied.
pub const APPLIED: &str = "lathe.dev/applied";

/// Marks an object with the hash of what it holds.
///
/// # Errors
/// It cannot be written as JSON.
pub fn stamp<K: Resource + Serialize>(mut object: K) -> Result<K, serde_json::Error> {
    let hash = pod::checksum(&object)?;
    object.annotations_mut().insert(APPLIED.to_owned(), hash);
    Ok(object)
}

/// True where `wanted`, which is stamped, must be applied.
pub fn differs<K: Resource + Serialize>(wanted: &K, live: Option<&K>) -> bool {
    let Some(live) = live else { return true };
    if wanted.annotations().get(APPLIED) != live.annotations().get(APPLIED) {
        return true;
    }
    match (serde_json::to_value(wanted), serde_json::to_value(live)) {
        (Ok(wanted), Ok(live)) => !contains(&live, &wanted),
        _ => true,
    }
}

/// True where everything that `wanted` says stands in `live`. The API server adds defaults, leaves out what is empty and
/// writes quantities in its own way; other controllers may add to lists whose items have names.
fn contains(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, value)| live.get(key).map_or(is_empty(value), |live| contains(live, value))),
        (Value::Array(live), Value::Array(wanted)) => {
            let named = !wanted.is_empty() && wanted.iter().all(|item| item.get("name").is_some());
            if named {
                let same = |item: &Value| live.iter().find(|live| live.get("name") == item.get("name"));
                return wanted.iter().all(|item| same(item).is_some_and(|live| contains(live, item)));
            }
            live.len() == wanted.len() && live.iter().zip(wanted).all(|(live, wanted)| contains(live, wanted))
        }
        (Value::String(live), Value::String(wanted)) => {
            live == wanted || quantity(live).is_some_and(|live| quantity(wanted) == Some(live))
        }
        _ => live == wanted,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
        _ => false,
    }
}

/// A quantity in thousandths.
fn quantity(text: &str) -> Option<f64> {
    Some((Quantity::from(text).amount()? * 1000.0).round())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case::defaults_are_added(json!({"a": 1, "b": 2}), json!({"a": 1}), true)]
    #[case::changed(json!({"a": 2}), json!({"a": 1}), false)]
    #[case::gone(json!({}), json!({"a": 1}), false)]
    #[case::empty_is_left_out(json!({}), json!({"a": {"b": ""}, "c": []}), true)]
    #[case::quantity(json!({"m": "1Gi", "c": "1"}), json!({"m": "1024Mi", "c": "1000m"}), true)]
    #[case::other_quantity(json!({"c": "1"}), json!({"c": "999m"}), false)]
    #[case::named_items_beside_ours(json!([{"name": "b"}, {"name": "a", "v": 1}]), json!([{"name": "a"}]), true)]
    #[case::named_item_changed(json!([{"name": "a", "v": 1}]), json!([{"name": "a", "v": 2}]), false)]
    #[case::longer_list(json!(["a", "b"]), json!(["a"]), false)]
    fn what_is_wanted_is_looked_for(#[case] live: Value, #[case] wanted: Value, #[case] expected: bool) {
        assert_eq!(contains(&live, &wanted), expected);
    }

    #[test]
    fn a_field_that_is_no_longer_wanted_is_a_difference() {
        let map = |keys: &[&str]| {
            let data = keys.iter().map(|key| ((*key).to_owned(), "v".to_owned())).collect();
            stamp(ConfigMap { data: Some(data), ..ConfigMap::default() }).unwrap()
        };
        assert!(differs(&map(&["a"]), None));
        assert!(!differs(&map(&["a"]), Some(&map(&["a"]))));
        assert!(differs(&map(&["a"]), Some(&map(&["a", "b"]))));
    }
}
