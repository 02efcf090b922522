//! On which nodes a pod may run: an accelerator profile as affinity, tolerations and resources.
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use lathe_api::{AcceleratorProfileSpec, CapacityType};

/// Labels by which clouds mark nodes that may be taken back, with the value that says so.
const SPOT: [(&str, &str); 4] = [
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
];
/// Those of them that are taints too.
const SPOT_TAINTS: [(&str, &str); 2] =
    [("cloud.google.com/gke-spot", "true"), ("kubernetes.azure.com/scalesetpriority", "spot")];

/// Devices of a profile.
#[derive(Clone, Copy, Debug)]
pub struct Placement<'a> {
    /// The kind of device.
    pub profile: &'a AcceleratorProfileSpec,
    /// Devices of the pod; cores where the profile's resource is `cpu`.
    pub count: i32,
    /// Nodes of which capacity type.
    pub capacity: CapacityType,
}

impl Placement<'_> {
    /// True where the "device" is the processor itself.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.profile.resource == "cpu"
    }

    /// The device resource, beside CPU and memory.
    pub(super) fn devices(&self) -> BTreeMap<String, Quantity> {
        if self.is_cpu() {
            return BTreeMap::new();
        }
        BTreeMap::from([(self.profile.resource.clone(), Quantity(self.count.to_string()))])
    }

    /// Required node affinity; `None` where any node will do.
    pub(super) fn affinity(&self) -> Option<NodeAffinity> {
        let terms = node_selector_terms(self.profile, self.capacity);
        (!terms.is_empty()).then(|| NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: terms,
            }),
            ..NodeAffinity::default()
        })
    }

    /// The profile's, and the taints of nodes that may be taken back where those are allowed.
    pub(super) fn tolerations(&self) -> Vec<Toleration> {
        let mut all: Vec<Toleration> = self.profile.tolerations.iter().map(Toleration::from).collect();
        if self.capacity != CapacityType::OnDemand {
            all.extend(SPOT_TAINTS.map(|(key, value)| Toleration {
                key: Some(key.to_owned()),
                operator: Some("Equal".to_owned()),
                value: Some(value.to_owned()),
                effect: Some("NoSchedule".to_owned()),
                toleration_seconds: None,
            }));
        }
        all
    }
}

/// The profile's terms (any of them matches) joined with the capacity type: "spot" is one of the clouds' labels, so each
/// term is repeated for each; "on demand" is none of them, which every term can say at once. Empty: any node.
#[must_use]
pub fn node_selector_terms(
    profile: &AcceleratorProfileSpec,
    capacity: CapacityType,
) -> Vec<NodeSelectorTerm> {
    let spot = |operator: &'static str| {
        SPOT.map(move |(key, value)| requirement(key, operator, vec![value.to_owned()]))
    };
    let extra: Vec<Vec<NodeSelectorRequirement>> = match capacity {
        CapacityType::Any => vec![Vec::new()],
        CapacityType::Spot => spot("In").map(|one| vec![one]).to_vec(),
        CapacityType::OnDemand => vec![spot("NotIn").to_vec()],
    };
    let own: Vec<Vec<NodeSelectorRequirement>> = if profile.node_selector_terms.is_empty() {
        vec![Vec::new()]
    } else {
        let term = |t: &lathe_api::NodeSelectorTerm| {
            let expressions = t.match_expressions.iter();
            expressions.map(|e| requirement(&e.key, &format!("{:?}", e.operator), e.values.clone())).collect()
        };
        profile.node_selector_terms.iter().map(term).collect()
    };
    own.iter()
        .flat_map(|own| extra.iter().map(move |extra| [own.as_slice(), extra.as_slice()].concat()))
        .filter(|expressions| !expressions.is_empty())
        .map(|expressions| NodeSelectorTerm { match_expressions: Some(expressions), match_fields: None })
        .collect()
}

/// True where one of the terms matches a node with these labels, as the scheduler decides it; no terms match every node.
#[must_use]
pub fn matches(terms: &[NodeSelectorTerm], labels: &BTreeMap<String, String>) -> bool {
    let holds = |r: &NodeSelectorRequirement| {
        let value = labels.get(&r.key);
        let values = r.values.as_deref().unwrap_or_default();
        let than = || Some((value?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
        match r.operator.as_str() {
            "In" => value.is_some_and(|value| values.contains(value)),
            "NotIn" => value.is_none_or(|value| !values.contains(value)),
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            "Gt" => than().is_some_and(|(own, bound)| own > bound),
            "Lt" => than().is_some_and(|(own, bound)| own < bound),
            _ => false,
        }
    };
    terms.is_empty() || terms.iter().any(|term| term.match_expressions.iter().flatten().all(holds))
}

fn requirement(key: &str, operator: &str, values: Vec<String>) -> NodeSelectorRequirement {
    let values = (!values.is_empty()).then_some(values);
    NodeSelectorRequirement { key: key.to_owned(), operator: operator.to_owned(), values }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn profile(terms: Value) -> AcceleratorProfileSpec {
        serde_json::from_value(json!({
            "resource": "nvidia.com/gpu", "memory": "24Gi", "runtime": "CUDA", "nodeSelectorTerms": terms
        }))
        .expect("a profile")
    }

    #[rstest]
    #[case::one_for_each_label(CapacityType::Any, 2, 1)]
    #[case::each_label_on_each_cloud(CapacityType::Spot, 8, 2)]
    #[case::no_cloud_may_say_spot(CapacityType::OnDemand, 2, 5)]
    fn terms_are_alternatives_and_their_requirements_are_not(
        #[case] capacity: CapacityType,
        #[case] terms: usize,
        #[case] expressions: usize,
    ) {
        let profile = profile(json!([
            {"matchExpressions": [{"key": "a", "operator": "In", "values": ["x"]}]},
            {"matchExpressions": [{"key": "b", "operator": "Exists"}]},
        ]));
        let found = node_selector_terms(&profile, capacity);
        assert_eq!(found.len(), terms);
        assert!(found.iter().all(|t| t.match_expressions.as_ref().is_some_and(|e| e.len() == expressions)));
    }

    #[rstest]
    #[case::alternatives(json!([["a", "In", ["y"]], ["b", "Exists", []]]), true)]
    #[case::neither(json!([["a", "In", ["y"]], ["c", "Exists", []]]), false)]
    #[case::absent_is_not_in(json!([["c", "NotIn", ["x"]]]), true)]
    #[case::greater(json!([["n", "Gt", ["7"]]]), true)]
    #[case::not_less(json!([["n", "Lt", ["8"]]]), false)]
    #[case::any(json!([]), true)]
    fn nodes_match_as_the_scheduler_says(#[case] terms: Value, #[case] expected: bool) {
        let terms = terms.as_array().expect("list").iter();
        let term = |t: &Value| json!({"matchExpressions": [{"key": t[0], "operator": t[1], "values": t[2]}]});
        let terms: Vec<NodeSelectorTerm> =
            terms.map(|t| serde_json::from_value(term(t)).expect("a term")).collect();
        let labels = [("a", "x"), ("b", ""), ("n", "8")];
        let labels = labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(matches(&terms, &labels), expected);
    }

    #[test]
    fn without_terms_any_node_will_do_unless_the_capacity_type_matters() {
        assert!(node_selector_terms(&profile(json!([])), CapacityType::Any).is_empty());
        assert_eq!(node_selector_terms(&profile(json!([])), CapacityType::Spot).len(), SPOT.len());
    }
}
