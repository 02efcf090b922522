//! Which claims only one node can mount at a time, and which of them a pod uses.
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{ResourceExt as _, runtime::reflector::Store};
use lathe_api::names;
use lathe_resolve::pod;

use crate::context::ArtifactVolume;

/// The claims of a namespace that only one node can mount at a time; `artifacts` is how the one that we make will be.
pub fn one_node(
    store: &Store<PersistentVolumeClaim>,
    namespace: &str,
    artifacts: &ArtifactVolume,
) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut seen_artifacts = false;
    for claim in store.state().iter().filter(|claim| claim.namespace().as_deref() == Some(namespace)) {
        let modes = claim.spec.as_ref().and_then(|spec| spec.access_modes.as_deref()).unwrap_or_default();
        seen_artifacts |= claim.name_any() == names::ARTIFACTS_CLAIM;
        if !modes.is_empty() && modes.iter().all(|mode| is_one_node(mode)) {
            found.insert(claim.name_any());
        }
    }
    if !seen_artifacts && is_one_node(&artifacts.access_mode) {
        found.insert(names::ARTIFACTS_CLAIM.to_owned());
    }
    found
}

fn is_one_node(mode: &str) -> bool {
    mode.starts_with("ReadWriteOnce")
}

/// ", where the ReadWriteOnce volume data is", from a pod's labels; empty where it uses none.
pub fn words(labels: Option<&BTreeMap<String, String>>) -> String {
    let claims: Vec<&str> = labels.into_iter().flatten().filter_map(|(key, _)| pod::claim_of(key)).collect();
    match claims.as_slice() {
        [] => String::new(),
        [claim] => format!(", where the ReadWriteOnce volume {claim} is"),
        several => format!(", where the ReadWriteOnce volumes {} are", several.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::testing::{filled, object};

    #[rstest]
    #[case::as_it_is(Some("ReadWriteMany"), "ReadWriteOnce", &["data"])]
    #[case::as_it_will_be(None, "ReadWriteOnce", &["data", "lathe-artifacts"])]
    #[case::as_it_will_be_for_all(None, "ReadWriteMany", &["data"])]
    fn claims_of_one_node(
        #[case] artifacts: Option<&str>,
        #[case] access_mode: &str,
        #[case] expected: &[&str],
    ) {
        let claim = |name: &str, namespace: &str, modes: &[&str]| -> PersistentVolumeClaim {
            object(
                json!({"metadata": {"name": name, "namespace": namespace}, "spec": {"accessModes": modes}}),
            )
        };
        let mut all = vec![
            claim("data", "ns", &["ReadWriteOnce"]),
            claim("shared", "ns", &["ReadWriteOnce", "ReadWriteMany"]),
            claim("foreign", "other", &["ReadWriteOnce"]),
        ];
        all.extend(artifacts.map(|mode| claim("lathe-artifacts", "ns", &[mode])));
        let volume =
            ArtifactVolume { size: "1Gi".into(), storage_class: None, access_mode: access_mode.into() };
        assert_eq!(one_node(&filled(all), "ns", &volume).into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_pod_tells_its_volumes() {
        let labels = |names: &[&str]| names.iter().map(|n| ((*n).to_owned(), "true".to_owned())).collect();
        assert_eq!(words(Some(&labels(&["team"]))), "");
        let two = labels(&["claim.lathe.dev/a", "claim.lathe.dev/b", "team"]);
        assert_eq!(words(Some(&two)), ", where the ReadWriteOnce volumes a, b are");
    }
}
