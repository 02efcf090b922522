//! `InferenceService`: a model and its adapters behind an OpenAI-compatible endpoint.
mod autoscaling;
mod rollout;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{NameRef, PlanStatus, PodOverrides, conditions, wording};
pub use autoscaling::{
    Autoscaling, CapacityStatus, CountedStatus, DecisionStatus, MAX_COUNTED, MAX_DECISION_MESSAGE,
    MAX_DECISIONS, MAX_REPLICAS, MAX_SCALING_MESSAGE, ScalingBlock, ScalingMemory, ScalingPeak,
    ScalingStatus,
};
pub use rollout::{
    EndedStatus, MAX_ROLLOUT_MESSAGE, RevisionsStatus, Rollout, RolloutGate, RolloutMetric, RolloutPhase,
    RolloutStatus, RolloutStep, RolloutStrategy,
};

/// A model and its adapters behind an OpenAI-compatible endpoint.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "lathe.dev", version = "v1alpha1", kind = "InferenceService", plural = "inferenceservices", namespaced,
    status = "InferenceServiceStatus", shortname = "lsvc", category = "lathe", derive = "PartialEq",
    doc = "Serves a Model and its adapters behind an OpenAI-compatible endpoint.",
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicas", label_selector_path = ".status.selector"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.modelRef.name", description = "Base model"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.readyReplicas", description = "Replicas that are ready"),
    printcolumn(name = "Tokens/s", type_ = "string", json_path = ".status.throughput.generation", description = "Generated tokens a second"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status", description = "Whether it answers"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason", description = "Why, or why not"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url", description = "Address of the endpoint"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation"),
    validation = Rule::new("self.metadata.name.size() <= 50 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("`metadata.name` must be at most 50 lower-case letters, digits and `-`, beginning with a letter, since a Service is named after it")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.adapterRefs) || self.adapterRefs.all(a, a.name != self.modelRef.name)")
    .message("`adapterRefs` must not name the model of `modelRef`").field_path(".adapterRefs"))]
#[x_kube(validation = Rule::new("!has(self.autoscaling) || !has(self.access) || self.access != 'Direct' || !has(self.autoscaling.minReplicas) || self.autoscaling.minReplicas >= 1")
    .message("`minReplicas` must be at least 1 with `access: Direct`, where nobody holds a request until a replica is awake")
    .field_path(".autoscaling.minReplicas"))]
#[x_kube(validation = Rule::new("!has(self.rollout) || !has(self.rollout.strategy) || self.rollout.strategy != 'Canary' || !has(self.access) || self.access != 'Direct'")
    .message("`strategy` must not be Canary with `access: Direct`, where nobody shares requests out between two revisions")
    .field_path(".rollout.strategy"))]
pub struct InferenceServiceSpec {
    /// Base Model. Changing it is a roll-out.
    pub model_ref: NameRef,
    /// Adapters on it; each is a model id at the endpoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub adapter_refs: Vec<NameRef>,
    /// How it is held in memory.
    #[serde(default)]
    pub serving: ServingSpec,
    /// On what it runs.
    #[serde(default)]
    pub accelerator: ServeAccelerator,
    /// Replicas; 0 stops the service. With `autoscaling` it is only how many a new service begins with, within the bounds.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub replicas: i32,
    /// How many replicas there are, by the tokens that flow; absent: as many as `replicas` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// Who may ask. GatewayOnly: whoever has a key of the gateway, through it alone, so that the installation needs one
    /// (`gateway.enabled` of the chart). Direct: every pod of the cluster, without a key. Changing it is a roll-out.
    #[serde(default)]
    pub access: Access,
    /// How running replicas are replaced where the spec changes what they are made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// What a user may say about the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOverrides>,
}

fn one() -> i32 {
    1
}

/// How a model is held in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServingSpec {
    /// Precision of the weights.
    #[serde(default)]
    pub weights: WeightPrecision,
    /// Longest prompt plus answer, in tokens; absent: the model's own, at most 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pub context_length: Option<i32>,
    /// Sequences that are decoded at the same time.
    #[serde(default = "max_sequences")]
    #[schemars(range(min = 1, max = 1024))]
    pub max_sequences: i32,
}

impl Default for ServingSpec {
    fn default() -> Self {
        Self { weights: WeightPrecision::default(), context_length: None, max_sequences: max_sequences() }
    }
}

fn max_sequences() -> i32 {
    16
}

/// Precision of served weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WeightPrecision {
    /// bfloat16: 2 bytes a weight.
    #[default]
    BFloat16,
    /// 32-bit: 4 bytes a weight.
    Float32,
    /// 8-bit integers with a scale for each 128 weights, rounded when the replica starts: half the memory of BFloat16 and
    /// up to twice its speed, at hardly any loss.
    Int8,
    /// 4-bit integers with a scale for each 128 weights; token vectors and the output head in 8 bits: a third of the memory
    /// of BFloat16. Answers are worse, small models' most: measure before use.
    Int4,
}

/// On what a service runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServeAccelerator {
    /// AcceleratorProfiles that may be used, the first that fits; empty: any that fits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "atomic", "x-kubernetes-validations" = wording::object_names()))]
    pub profiles: Vec<String>,
    /// Devices of a replica (cores where the profile is a CPU); absent: computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub count: Option<i32>,
}

/// Who may ask a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Access {
    /// Whoever has a key of the gateway, through the gateway: the workers refuse everybody else. Without the chart's gateway
    /// (`gateway.enabled`) the service is not served.
    #[default]
    GatewayOnly,
    /// Every pod of the cluster may ask the workers themselves, without a key; the gateway reaches them as well, where there is
    /// one.
    Direct,
}

/// What the operator knows of a service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceServiceStatus {
    /// Generation of the spec that this status speaks of; -1 before the first visit.
    #[serde(default = "conditions::unobserved")]
    #[schemars(range(min = -1, max = 9_007_199_254_740_991_i64))]
    pub observed_generation: i64,
    /// Conditions: `Ready` is the summary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions::schema")]
    pub conditions: Vec<Condition>,
    /// Address inside the cluster. With `access: GatewayOnly` the gateway's, as OpenAI's clients take it
    /// (`http://lathe-gateway.<namespace>.svc/v1`), where models are named `<namespace>/<id>`; with `Direct` that of the service's
    /// own Service, below which `/v1/chat/completions` and the like are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub url: Option<String>,
    /// Ids to name as `model` in a request: the base's and each adapter's that answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 65), inner(length(max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub model_ids: Vec<String>,
    /// Replicas that there are, ready or not: what autoscalers divide a load by.
    #[serde(default)]
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub replicas: i32,
    /// Replicas that are ready.
    #[serde(default)]
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub ready_replicas: i32,
    /// Label selector of the pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,
    /// What flows, summed over the replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throughput: Option<ThroughputStatus>,
    /// What a million tokens cost at this moment's throughput, with the currency, e.g. `1.85 USD`: the profile's price of the devices of
    /// all ready replicas, by the prompt and generated tokens that flow. Absent where the profile has no price, where nothing flows, and
    /// while replicas of an earlier revision answer. Cost over time: the metric `lathe_inferenceservice_cost_per_hour`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub cost_per_million_tokens: Option<String>,
    /// The last changes of the number of replicas, oldest first, with `autoscaling`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub decisions: Vec<DecisionStatus>,
    /// Notes of the scaler, with `autoscaling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingStatus>,
    /// Revisions that run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revisions: Option<RevisionsStatus>,
    /// Notes of the roll-out, with `strategy: Canary`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
    /// Every choice that Lathe made, with the memory table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
}

/// What flows, summed over the replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ThroughputStatus {
    /// Prompt tokens a second.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub prompt: String,
    /// Generated tokens a second.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub generation: String,
    /// Requests that wait.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub waiting: i64,
    /// What one replica can do; absent until one has measured itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_per_replica: Option<CapacityStatus>,
}
