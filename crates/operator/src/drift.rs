//! Whether an object of ours still is as we want it: an unchanged one is not written again.
//!
//! A hash of what was applied stands in an annotation, so that a field that is no longer wanted is noticed; what is wanted is
//! also looked for in the live object, so that a change by somebody else is noticed.
use kube::{Resource, ResourceExt as _};
use lathe_api::Quantity;
use lathe_resolve::pod;
use serde::Serialize;
use serde_json::{Value, json};

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

/// True where `live` is what was last applied, whoever may have changed it since.
pub fn is_current<K: Resource>(wanted: &K, live: &K) -> bool {
    wanted.annotations().get(APPLIED) == live.annotations().get(APPLIED)
}

/// True where `wanted`, which is stamped, must be applied.
pub fn differs<K: Resource + Serialize>(wanted: &K, live: Option<&K>) -> bool {
    let Some(live) = live else { return true };
    if !is_current(wanted, live) {
        return true;
    }
    match (serde_json::to_value(wanted), serde_json::to_value(live)) {
        (Ok(wanted), Ok(live)) => !contains(&live, &wanted),
        _ => true,
    }
}

/// Lists in which nothing may stand beside ours: it would run in our pods, or lead to them. What a webhook adds to pods as they
/// are made is not here.
const EXACT: [&str; 6] = ["containers", "env", "initContainers", "ports", "volumeMounts", "volumes"];

/// Of those, the ones whose items are one of several kinds: with a field of another kind beside ours, the API server takes none.
const ONE_KIND: [&str; 2] = ["env", "volumes"];

/// Fields of a pod that are somebody else's where we do not set them.
const OURS_OR_ABSENT: [&str; 8] = [
    "env",
    "envFrom",
    "initContainers",
    "lifecycle",
    "nodeSelector",
    "tolerations",
    "volumeMounts",
    "volumes",
];

/// Fields that the API server takes as one value: what somebody puts into them is put right by applying ours again.
const WHOLE: [&str; 5] = ["ingress", "nodeSelector", "podSelector", "selector", "tolerations"];

/// Operations of a JSON Patch (RFC 6902) that take what is not wanted out of `live`, in an order in which they can be done. To
/// apply what is wanted leaves it there: it is somebody else's.
pub fn surplus<K: Serialize>(wanted: &K, live: &K) -> Vec<Value> {
    let mut found = Vec::new();
    if let (Ok(wanted), Ok(live)) = (serde_json::to_value(wanted), serde_json::to_value(live)) {
        beyond(&wanted, &live, "", &mut found);
    }
    found
}

fn beyond(wanted: &Value, live: &Value, at: &str, found: &mut Vec<Value>) {
    let (Value::Object(wanted), Value::Object(live)) = (wanted, live) else { return };
    let remove = |path: String| json!({"op": "remove", "path": path});
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
                        // Something mounts it: it cannot be away for a moment.
                        Some(wanted) if ONE_KIND.contains(&key.as_str()) && has_more(item, wanted) => {
                            found.push(json!({"op": "replace", "path": path, "value": wanted}));
                        }
                        Some(wanted) => beyond(wanted, item, &path, found),
                        None => found.push(remove(path)),
                    }
                }
            }
            (Some(wanted), live) => beyond(wanted, live, &path, found),
            // A label may have such a name too.
            (None, Value::Array(_) | Value::Object(_)) if OURS_OR_ABSENT.contains(&key.as_str()) => {
                found.push(remove(path));
            }
            (None, _) => {}
        }
    }
}

fn has_more(live: &Value, wanted: &Value) -> bool {
    let (Value::Object(live), Value::Object(wanted)) = (live, wanted) else { return false };
    live.iter().any(|(key, value)| !wanted.contains_key(key) && !is_empty(value))
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
        (Value::Object(live), Value::Object(wanted)) => wanted.iter().all(|(key, wanted)| {
            let Some(live) = live.get(key) else { return is_empty(wanted) };
            contains(live, wanted) && (!WHOLE.contains(&key.as_str()) || contains(wanted, live))
        }),
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
    #[case::one_label_more(json!({"selector": {"a": "b", "c": "d"}}), json!({"selector": {"a": "b"}}), false)]
    #[case::one_expression_more(
        json!({"podSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "x", "operator": "Exists"}]}}),
        json!({"podSelector": {"matchLabels": {"a": "b"}}}), false)]
    #[case::fewer_peers(json!({"ingress": [{"ports": [1], "from": [{}]}]}), json!({"ingress": [{"ports": [1]}]}), false)]
    #[case::peers_of_other_namespaces(
        json!({"ingress": [{"from": [{"podSelector": {"a": "b"}, "namespaceSelector": {"c": "d"}}]}]}),
        json!({"ingress": [{"from": [{"podSelector": {"a": "b"}}]}]}), false)]
    #[case::one_toleration_more(json!({"tolerations": [{"key": "a"}, {"key": "b"}]}), json!({"tolerations": [{"key": "a"}]}), false)]
    fn what_is_wanted_is_looked_for(#[case] live: Value, #[case] wanted: Value, #[case] expected: bool) {
        assert_eq!(contains(&live, &wanted), expected);
    }

    #[rstest]
    #[case::nothing(json!({}), json!([]))]
    #[case::a_container(
        json!({"spec": {"containers": [{"name": "x"}, worker(), {"name": "y"}]}}),
        json!([remove("/spec/containers/2"), remove("/spec/containers/0")]))]
    #[case::a_container_before(json!({"spec": {"initContainers": [{"name": "x"}]}}), json!([remove("/spec/initContainers")]))]
    #[case::a_volume(
        json!({"spec": {"volumes": [{"name": "contract", "configMap": {}}, {"name": "x"}]}}),
        json!([remove("/spec/volumes/1")]))]
    #[case::a_volume_of_another_kind(
        json!({"spec": {"volumes": [{"name": "contract", "hostPath": {"path": "/"}}]}}),
        json!([{"op": "replace", "path": "/spec/volumes/0", "value": {"name": "contract", "configMap": {}}}]))]
    #[case::a_port_and_a_mount(
        json!({"spec": {"containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}], "ports": [{"containerPort": 22}, {"name": "http"}],
            "volumeMounts": [{"name": "contract", "mountPath": "/c"}, {"name": "contract", "mountPath": "/d"}]}]}}),
        json!([remove("/spec/containers/0/ports/0"), remove("/spec/containers/0/volumeMounts/1")]))]
    #[case::environment(
        json!({"spec": {"containers": [with_env(json!([{"name": "A", "value": "1"}, {"name": "LD_PRELOAD", "value": "x"}]))]}}),
        json!([remove("/spec/containers/0/env/1")]))]
    #[case::environment_of_another_kind(
        json!({"spec": {"containers": [with_env(json!([{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]))]}}),
        json!([{"op": "replace", "path": "/spec/containers/0/env/0", "value": {"name": "A", "value": "1"}}]))]
    #[case::a_place(
        json!({"spec": {"tolerations": [{"key": "x"}], "nodeSelector": {"a": "b"}}}),
        json!([remove("/spec/nodeSelector"), remove("/spec/tolerations")]))]
    #[case::what_others_may_add(json!({"metadata": {"labels": {"env": "test"}}, "spec": {"dnsPolicy": "Default"}}), json!([]))]
    fn what_is_not_ours_is_found(#[case] over: Value, #[case] expected: Value) {
        let wanted = json!({"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [worker()], "volumes": [{"name": "contract", "configMap": {}}]}});
        let mut live = wanted.clone();
        json_patch::merge(&mut live, &over);
        let found = Value::from(surplus(&wanted, &live));
        assert_eq!(found, expected);
        json_patch::patch(&mut live, &serde_json::from_value::<json_patch::Patch>(found).unwrap()).unwrap();
        assert!(surplus(&wanted, &live).is_empty());
        assert_eq!(live["spec"]["volumes"], wanted["spec"]["volumes"]);
    }

    fn remove(path: &str) -> Value {
        json!({"op": "remove", "path": path})
    }

    fn with_env(env: Value) -> Value {
        let mut worker = worker();
        worker["env"] = env;
        worker
    }

    fn worker() -> Value {
        json!({"name": "worker", "env": [{"name": "A", "value": "1"}], "ports": [{"name": "http"}], "volumeMounts": [{"name": "contract", "mountPath": "/c"}]})
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
