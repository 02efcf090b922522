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

/// Lists in which nothing may stand beside ours: it would run in our pods, or lead to them. What a webhook adds to pods as they
/// are made is not here.
const EXACT: [&str; 5] = ["containers", "initContainers", "ports", "volumeMounts", "volumes"];

/// JSON pointers of what stands in such lists of `live` and is not wanted, in an order in which they can be removed. To apply what
/// is wanted leaves it there: it is somebody else's.
pub fn surplus<K: Serialize>(wanted: &K, live: &K) -> Vec<String> {
    let mut found = Vec::new();
    if let (Ok(wanted), Ok(live)) = (serde_json::to_value(wanted), serde_json::to_value(live)) {
        beyond(&wanted, &live, "", &mut found);
    }
    found
}

fn beyond(wanted: &Value, live: &Value, at: &str, found: &mut Vec<String>) {
    let (Value::Object(wanted), Value::Object(live)) = (wanted, live) else { return };
    for (key, live) in live {
        let path = format!("{at}/{key}");
        match (wanted.get(key), live) {
            (Some(Value::Array(wanted)), Value::Array(live))
                if EXACT.contains(&key.as_str()) && are_named(wanted) =>
            {
                // From behind, so that what was found keeps its place.
                for (index, item) in live.iter().enumerate().rev() {
                    let path = format!("{path}/{index}");
                    match wanted.iter().find(|wanted| is_same_item(wanted, item)) {
                        Some(wanted) => beyond(wanted, item, &path, found),
                        None => found.push(path),
                    }
                }
            }
            (Some(wanted), live) => beyond(wanted, live, &path, found),
            // Our pods have none.
            (None, Value::Array(_)) if key == "initContainers" => found.push(path),
            (None, _) => {}
        }
    }
}

/// A volume may be mounted at several places.
fn is_same_item(a: &Value, b: &Value) -> bool {
    a.get("name") == b.get("name") && a.get("mountPath") == b.get("mountPath")
}

fn are_named(items: &[Value]) -> bool {
    !items.is_empty() && items.iter().all(|item| item.get("name").is_some())
}

/// True where everything that `wanted` says stands in `live`. The API server adds defaults, leaves out what is empty and
/// writes quantities in its own way; other controllers may add to lists whose items have names.
fn contains(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, value)| live.get(key).map_or(is_empty(value), |live| contains(live, value))),
        (Value::Array(live), Value::Array(wanted)) => {
            if are_named(wanted) {
                let same = |item: &Value| live.iter().find(|live| is_same_item(live, item));
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

    #[rstest]
    #[case::nothing(json!({}), &[])]
    #[case::a_container(json!({"spec": {"containers": [{"name": "x"}, worker(), {"name": "y"}]}}), &["/spec/containers/2", "/spec/containers/0"])]
    #[case::a_container_before(json!({"spec": {"initContainers": [{"name": "x"}]}}), &["/spec/initContainers"])]
    #[case::a_volume(json!({"spec": {"volumes": [{"name": "contract"}, {"name": "x"}]}}), &["/spec/volumes/1"])]
    #[case::a_port_and_a_mount(
        json!({"spec": {"containers": [{"name": "worker", "ports": [{"containerPort": 22}, {"name": "http"}],
            "volumeMounts": [{"name": "contract", "mountPath": "/c"}, {"name": "contract", "mountPath": "/d"}]}]}}),
        &["/spec/containers/0/ports/0", "/spec/containers/0/volumeMounts/1"])]
    #[case::what_others_may_add(json!({"spec": {"tolerations": [{"key": "x"}], "containers": [{"name": "worker", "env": [{"name": "A"}]}]}}), &[])]
    fn what_is_not_ours_is_found(#[case] over: Value, #[case] expected: &[&str]) {
        let wanted = json!({"spec": {"containers": [worker()], "volumes": [{"name": "contract"}]}});
        let mut live = wanted.clone();
        json_patch::merge(&mut live, &over);
        let found = surplus(&wanted, &live);
        assert_eq!(found, expected);
        let removals: Vec<Value> = found.iter().map(|path| json!({"op": "remove", "path": path})).collect();
        json_patch::patch(&mut live, &serde_json::from_value::<json_patch::Patch>(json!(removals)).unwrap())
            .unwrap();
        assert_eq!(surplus(&wanted, &live), [""; 0]);
        assert_eq!(live["spec"]["volumes"], wanted["spec"]["volumes"]);
    }

    fn worker() -> Value {
        json!({"name": "worker", "ports": [{"name": "http"}], "volumeMounts": [{"name": "contract", "mountPath": "/c"}]})
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
