//! What a controller remembers of objects that are there, by UID: one of the same name made later is another object.
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use kube::{Resource, ResourceExt as _};

/// A value of each object; an object of which nothing is remembered has the default.
#[derive(Debug)]
pub struct Memory<V>(Mutex<HashMap<Key, Known<V>>>);

/// Namespace and name.
type Key = (String, String);

#[derive(Debug, Default)]
struct Known<V> {
    uid: Option<String>,
    value: V,
}

impl<V> Default for Memory<V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V: Default + PartialEq> Memory<V> {
    /// Reads and changes what is known of this object. What is the default afterwards takes no room.
    pub fn with<K: Resource, T>(&self, object: &K, change: impl FnOnce(&mut V) -> T) -> T {
        let (key, uid) = ((object.namespace().unwrap_or_default(), object.name_any()), object.uid());
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = all.remove(&key).filter(|known| known.uid == uid).unwrap_or_default();
        known.uid = uid;
        let told = change(&mut known.value);
        if known.value != V::default() {
            all.insert(key, known);
        }
        told
    }

    /// The object is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::*;
    use crate::testing::object;

    #[test]
    fn each_object_has_its_own_until_it_is_gone() {
        let one = |name: &str, uid: &str| -> ConfigMap {
            object(json!({"metadata": {"namespace": "ns", "name": name, "uid": uid}}))
        };
        let memory = Memory::<u32>::default();
        let add = |object: &ConfigMap| {
            memory.with(object, |count| {
                *count += 1;
                *count
            })
        };
        assert_eq!([add(&one("a", "1")), add(&one("a", "1")), add(&one("b", "2"))], [1, 2, 1]);
        assert_eq!(add(&one("a", "3")), 1, "another object of the same name");
        memory.forget("ns", "a");
        assert_eq!(add(&one("a", "3")), 1);
        memory.with(&one("a", "3"), |count| *count = 0);
        memory.forget("ns", "b");
        assert!(memory.0.lock().unwrap().is_empty());
    }
}
