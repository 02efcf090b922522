//! `Model`: a set of weights with a name.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Decimal, Location, Metric, NameRef, PodOverrides, conditions, wording};

/// A set of weights with a name: where they are, under which licence, where they came from.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "lathe.dev", version = "v1alpha1", kind = "Model", plural = "models", namespaced, status = "ModelStatus",
    category = "lathe", derive = "PartialEq",
    doc = "A set of weights with a name. A FineTuneJob reads one and makes one; an InferenceService serves one.",
    printcolumn(name = "Architecture", type_ = "string", json_path = ".status.architecture", description = "Architecture that config.json names"),
    printcolumn(name = "Parameters", type_ = "string", json_path = ".status.parameters", description = "Number of weights"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size", description = "Bytes of all weights"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status", description = "Whether it can be used"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason", description = "Why, or why not"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation"),
    validation = Rule::new("self.metadata.name.size() <= 63").message("`metadata.name` must be at most 63 characters")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.source == oldSelf.source")
    .message("`source` must not change; make a new Model, so that lineage stays true").field_path(".source"))]
#[x_kube(validation = Rule::new("has(self.adapterOf) == has(oldSelf.adapterOf) && (!has(self.adapterOf) || self.adapterOf == oldSelf.adapterOf)")
    .message("`adapterOf` must not change; make a new Model").field_path(".adapterOf"))]
#[x_kube(validation = Rule::new("has(self.derivedFrom) == has(oldSelf.derivedFrom)")
    .message("`derivedFrom` must not come or go; it is written by the job that made the model").field_path(".derivedFrom"))]
#[x_kube(validation = Rule::new("has(self.pod) == has(oldSelf.pod) && (!has(self.pod) || self.pod == oldSelf.pod)")
    .message("`pod` must not change; make a new Model").field_path(".pod"))]
pub struct ModelSpec {
    /// Where the files are, in Hugging Face layout.
    pub source: Location,
    /// Licence that the user accepts; needed when the files name one that asks for acceptance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<LicenseSpec>,
    /// Base Model, where this one is an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_of: Option<NameRef>,
    /// What made this model; written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub derived_from: Option<DerivedFrom>,
    /// What happens to the files when the Model is deleted.
    #[serde(default)]
    pub reclaim_policy: ReclaimPolicy,
    /// What a user may say about the pod that reads what the model is. Those that tune or serve it have their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOverrides>,
}

/// Acceptance of a licence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LicenseSpec {
    /// Identifier of the licence that is accepted, as the model's files name it, e.g. `llama3.2`.
    #[schemars(length(min = 1, max = 64))]
    pub accept: String,
}

/// Lineage of a model that a job made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.job == oldSelf.job && self.base == oldSelf.base && has(self.datasetDigest) == has(oldSelf.datasetDigest) && (!has(self.datasetDigest) || self.datasetDigest == oldSelf.datasetDigest) && has(self.inputsHash) == has(oldSelf.inputsHash) && (!has(self.inputsHash) || self.inputsHash == oldSelf.inputsHash)")
    .message("`derivedFrom` must not change but for `failedGates`; it is written by the job that made the model"))]
#[x_kube(validation = Rule::new("!has(self.failedGates) || (has(oldSelf.failedGates) && self.failedGates == oldSelf.failedGates)")
    .message("`failedGates` must not change; remove it to use the model all the same").field_path(".failedGates"))]
pub struct DerivedFrom {
    /// Name of the FineTuneJob.
    #[schemars(length(min = 1, max = 253))]
    pub job: String,
    /// Name of the base Model.
    #[schemars(length(min = 1, max = 253))]
    pub base: String,
    /// Digest of the dataset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128), extend("x-kubernetes-validations" = wording::digest()))]
    pub dataset_digest: Option<String>,
    /// Hash of everything that decides the result; an equal job adopts this model instead of tuning again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 16, max = 64), extend("x-kubernetes-validations" = wording::matching("^[0-9a-f]+$", "must be hexadecimal digits in lower case")))]
    pub inputs_hash: Option<String>,
    /// Gates of that job that the model did not pass, with their numbers. While they stand here the model is not Ready, so
    /// that nothing serves it by accident; whoever wants to use it all the same removes the field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 512)), extend("x-kubernetes-list-type" = "atomic"))]
    pub failed_gates: Vec<String>,
}

/// What happens to the files of a deleted Model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReclaimPolicy {
    /// They stay.
    #[default]
    Retain,
}

/// What the operator knows of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// Generation of the spec that this status speaks of; -1 before the first visit.
    #[serde(default = "conditions::unobserved")]
    #[schemars(range(min = -1, max = 9_007_199_254_740_991_i64))]
    pub observed_generation: i64,
    /// Conditions: `Ready` is the summary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions::schema")]
    pub conditions: Vec<Condition>,
    /// Architecture, e.g. `LlamaForCausalLM`; of an adapter: `LoRA`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub architecture: Option<String>,
    /// Number of weights, e.g. `1.24B`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub parameters: Option<String>,
    /// Longest sequence that the model was made for, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_073_741_824))]
    pub context_length: Option<i64>,
    /// Bytes of all weights, e.g. `2.5Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub size: Option<String>,
    /// Bytes of the weights by precision.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["precision"]))]
    pub weights: Vec<WeightStatus>,
    /// Digest over all files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub digest: Option<String>,
    /// Digest over the files of weights alone, where they lie on a volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub weights_digest: Option<String>,
    /// Digest over names, sizes and samples of files on a volume: while it stays, they need not be hashed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub fingerprint: Option<String>,
    /// Licence that the files name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub license: Option<String>,
    /// True where that licence asks for acceptance.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub license_needs_acceptance: bool,
    /// Rank of an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub rank: Option<i32>,
    /// The numbers of `config.json` from which memory and time are planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<ShapeStatus>,
    /// Measurements by the job that made the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"]))]
    pub scores: Vec<ScoreStatus>,
}

/// Bytes of weights in one precision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WeightStatus {
    /// safetensors dtype, e.g. `BF16`.
    #[schemars(length(max = 64))]
    pub precision: String,
    /// Bytes.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub bytes: i64,
}

/// A measurement before and after tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScoreStatus {
    /// What was measured.
    pub metric: Metric,
    /// The base's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Decimal>,
    /// The tuned model's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Decimal>,
}

/// The numbers of `config.json` from which memory and time are planned.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShapeStatus {
    /// Entries of the vocabulary.
    #[schemars(range(min = 0, max = 16_777_216))]
    pub vocab: i64,
    /// Width of the residual stream.
    #[schemars(range(min = 0, max = 1_048_576))]
    pub hidden: i64,
    /// Blocks.
    #[schemars(range(min = 0, max = 65536))]
    pub layers: i64,
    /// Query heads.
    #[schemars(range(min = 0, max = 65536))]
    pub heads: i64,
    /// Key and value heads.
    #[schemars(range(min = 0, max = 65536))]
    pub kv_heads: i64,
    /// Width of a head.
    #[schemars(range(min = 0, max = 65536))]
    pub head_dim: i64,
    /// Width of the MLP.
    #[schemars(range(min = 0, max = 4_194_304))]
    pub intermediate: i64,
    /// The output head shares the embedding.
    #[serde(default)]
    pub tie_embeddings: bool,
    /// Query, key and value projections have biases.
    #[serde(default)]
    pub qkv_bias: bool,
}
