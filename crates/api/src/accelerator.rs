//! `AcceleratorProfile`: a kind of accelerator by name.
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Decimal, Quantity, Toleration, wording};

/// A kind of accelerator by name: how to ask for it, where it is found, what it can do and costs.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "lathe.dev",
    version = "v1alpha1",
    kind = "AcceleratorProfile",
    plural = "acceleratorprofiles",
    shortname = "accel",
    category = "lathe",
    derive = "PartialEq",
    doc = "A kind of accelerator by name: how to ask for it, where it is found, what it can do and costs. The operator applies an embedded catalogue; a field that a user changed stays the user's.",
    printcolumn(
        name = "Resource",
        type_ = "string",
        json_path = ".spec.resource",
        description = "Resource that pods ask for"
    ),
    printcolumn(
        name = "Memory",
        type_ = "string",
        json_path = ".spec.memory",
        description = "Memory of one device"
    ),
    printcolumn(
        name = "Per node",
        type_ = "integer",
        json_path = ".spec.devicesPerNode",
        description = "Devices of one node"
    ),
    printcolumn(
        name = "Price",
        type_ = "string",
        json_path = ".spec.price.perHour",
        description = "Price of one device and hour"
    ),
    printcolumn(
        name = "Runtime",
        type_ = "string",
        json_path = ".spec.runtime",
        description = "Worker build that it needs"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "Time since creation"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.resource == 'cpu' || has(self.memory)")
    .message("`memory` must be set for a device (it may be absent only where `resource` is cpu)").field_path(".memory"))]
#[x_kube(validation = Rule::new("self.resource == 'cpu' ? self.runtime == 'CPU' : self.runtime != 'CPU'")
    .message("`runtime` must be CPU exactly where `resource` is cpu").field_path(".runtime"))]
pub struct AcceleratorProfileSpec {
    /// Extended resource that a pod asks for, e.g. `nvidia.com/gpu`; or `cpu`: then `count` is cores and any node matches.
    #[schemars(
        length(min = 1, max = 317),
        extend("x-kubernetes-validations" = wording::matching("^(cpu|[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)$", "must be `cpu` or an extended resource with its domain, e.g. `nvidia.com/gpu`"))
    )]
    pub resource: String,
    /// Nodes that have it: any of these terms matches. Providers label the same device each in their own way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub node_selector_terms: Vec<NodeSelectorTerm>,
    /// Taints of such nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub tolerations: Vec<Toleration>,
    /// Memory of one device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
    /// Peak memory bandwidth of one device (of one core, where the resource is cpu), in GB/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Decimal>,
    /// Peak dense bfloat16 rate of one device (or core), in TFLOP/s.
    #[serde(default, rename = "computeBF16", skip_serializing_if = "Option::is_none")]
    pub compute_bf16: Option<Decimal>,
    /// Devices of one node.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub devices_per_node: i32,
    /// Price, from which cost is computed; absent: cost is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
    /// Worker build that it needs.
    pub runtime: Runtime,
    /// Worker image, where it is not the operator's own for this runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), extend("x-kubernetes-validations" = wording::matching("^[a-zA-Z0-9][a-zA-Z0-9._:/@-]*$", "must be an image as a pod names it, e.g. `registry.example.com/lathe-worker:1.0`")))]
    pub image: Option<String>,
}

fn one() -> i32 {
    1
}

/// What one device costs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Price {
    /// Price of one device (or core) and hour.
    pub per_hour: Decimal,
    /// ISO 4217 code.
    #[serde(default = "usd")]
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = wording::matching("^[A-Z]{3}$", "must be the three capitals of an ISO 4217 code, e.g. `USD`")))]
    pub currency: String,
}

fn usd() -> String {
    "USD".to_owned()
}

/// Worker build that a device needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Runtime {
    /// Runs everywhere.
    CPU,
    /// NVIDIA. Until this build exists, such a profile needs `image`.
    CUDA,
}

/// Labels of a node, all of which must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelectorTerm {
    /// Requirements, all of which must hold.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub match_expressions: Vec<NodeSelectorRequirement>,
}

/// A requirement on one label of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelectorRequirement {
    /// Key of the label.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// How it is compared.
    pub operator: NodeSelectorOperator,
    /// Values, with `In`, `NotIn`, `Gt` and `Lt`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 63)), extend("x-kubernetes-list-type" = "atomic"))]
    pub values: Vec<String>,
}

/// How a label is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NodeSelectorOperator {
    /// One of the values.
    In,
    /// None of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
    /// Greater than the one value, as a number.
    Gt,
    /// Less than the one value, as a number.
    Lt,
}
