//! Pods that share a volume which only one node can mount at a time are placed on that node.
//!
//! Each such pod has a label for each such claim, and would rather stand beside pods with the same label. It is a wish with the
//! greatest weight and not a must: the scheduler takes several required terms together (a pod counts only where it matches all
//! of them), so that pods which share some of their claims would never find each other. Where the wish cannot be had, the node
//! says that another one holds the volume.
use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{PodAffinity, PodAffinityTerm, WeightedPodAffinityTerm},
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};

use super::Mounts;

const PREFIX: &str = "claim.lathe.dev/";
const NODE: &str = "kubernetes.io/hostname";

/// A label for each claim that only one node can mount at a time.
pub(super) fn labels(mounts: &Mounts) -> BTreeMap<String, String> {
    mounts.one_node().map(|claim| (label(claim), "true".to_owned())).collect()
}

/// The wish to stand beside pods that share such a claim.
pub(super) fn affinity(mounts: &Mounts) -> Option<PodAffinity> {
    let term = |claim: &str| WeightedPodAffinityTerm {
        weight: 100,
        pod_affinity_term: PodAffinityTerm {
            label_selector: Some(LabelSelector {
                match_labels: Some(BTreeMap::from([(label(claim), "true".to_owned())])),
                match_expressions: None,
            }),
            topology_key: NODE.to_owned(),
            ..PodAffinityTerm::default()
        },
    };
    let terms: Vec<_> = mounts.one_node().map(term).collect();
    (!terms.is_empty()).then(|| PodAffinity {
        preferred_during_scheduling_ignored_during_execution: Some(terms),
        ..PodAffinity::default()
    })
}

/// The claim of such a label (cut where its name is longer than a label's may be); `None` for any other label.
#[must_use]
pub fn claim_of(label: &str) -> Option<&str> {
    label.strip_prefix(PREFIX)
}

fn label(claim: &str) -> String {
    format!("{PREFIX}{}", lathe_api::names::bounded(claim, ""))
}
