//! `FineTuneJob`: base model + dataset + method -> a new `Model`, measured before it is called done.
mod status;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    DatasetFormat, Decimal, Duration, Gate, Location, Metric, NameRef, PodOverrides, Schedule,
    scalar::in_range, wording,
};
pub use status::{CheckpointStatus, FineTuneJobStatus, ProgressStatus, RestartStatus};

/// Base model + dataset + method -> a new `Model`.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "lathe.dev", version = "v1alpha1", kind = "FineTuneJob", plural = "finetunejobs", namespaced,
    status = "FineTuneJobStatus", shortname = "ftj", category = "lathe", derive = "PartialEq",
    doc = "Tunes a base Model on a dataset, measures the result and makes a new Model of it.",
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.baseModelRef.name", description = "Base model"),
    printcolumn(name = "Method", type_ = "string", json_path = ".status.method", description = "What is learned, and what is changed"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.summary", description = "Steps done of all"),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.progress.loss", description = "Loss of the last step"),
    printcolumn(name = "Tokens/s", type_ = "string", json_path = ".status.progress.tokensPerSecond", description = "Speed of training"),
    printcolumn(name = "Succeeded", type_ = "string", json_path = ".status.conditions[?(@.type=='Succeeded')].status", description = "Whether it is done"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Succeeded')].reason", description = "Why, or why not yet"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation"),
    validation = Rule::new("self.metadata.name.size() <= 50").message("`metadata.name` must be at most 50 characters, since pods and volumes are named after it")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.baseModelRef == oldSelf.baseModelRef && self.dataset == oldSelf.dataset && self.objective == oldSelf.objective && self.trainable == oldSelf.trainable && self.training == oldSelf.training && self.checkpoint == oldSelf.checkpoint && self.evaluation == oldSelf.evaluation && self.output == oldSelf.output")
    .message("a job must not change but for `suspend`, `budget`, `ttlSecondsAfterFinished`, `accelerator.profiles` and `accelerator.fallbackAfter`; make a new FineTuneJob"))]
#[x_kube(validation = Rule::new("has(self.pod) == has(oldSelf.pod) && (!has(self.pod) || self.pod == oldSelf.pod)")
    .message("`pod` must not change; make a new FineTuneJob").field_path(".pod"))]
#[x_kube(validation = Rule::new("!has(self.evaluation.gates) || self.evaluation.gates.all(g, g.metric in self.evaluation.metrics)")
    .message("every metric of `evaluation.gates` must stand in `evaluation.metrics` too").field_path(".evaluation.gates"))]
#[x_kube(validation = Rule::new("!has(self.evaluation.gates) || self.evaluation.gates.size() == 0 || has(self.dataset.evaluation) || has(self.dataset.holdout)")
    .message("`evaluation.gates` must have rows to measure with; set `dataset.evaluation` or `dataset.holdout`").field_path(".evaluation.gates"))]
pub struct FineTuneJobSpec {
    /// Model to start from.
    pub base_model_ref: NameRef,
    /// Rows to learn from and to measure with.
    pub dataset: DatasetSpec,
    /// What is learned.
    #[serde(default)]
    pub objective: Objective,
    /// What is changed.
    #[serde(default)]
    pub trainable: Trainable,
    /// How it is changed.
    #[serde(default)]
    pub training: TrainingSpec,
    /// How progress is kept.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// What is measured before and after, and what must hold.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// On what it runs.
    #[serde(default)]
    pub accelerator: AcceleratorRequest,
    /// What it may cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// What is made.
    pub output: OutputSpec,
    /// True: state is saved and the pods go, until it is false again.
    #[serde(default)]
    pub suspend: bool,
    /// Seconds after the end when pods and Jobs are removed; the FineTuneJob itself stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// What a user may say about the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOverrides>,
}

/// Rows to learn from and to measure with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.evaluation) && has(self.holdout))")
    .message("`evaluation` and `holdout` must not both be set"))]
#[x_kube(validation = in_range("holdout", "double(self.holdout) > 0.0 && double(self.holdout) <= 0.5")
    .message("`holdout` must be above 0 and at most 0.5"))]
pub struct DatasetSpec {
    /// JSON Lines to learn from. A file that is fetched has at most 16 GiB; one of a volume (`pvc://`) is read in place.
    pub train: Location,
    /// JSON Lines to measure with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Location>,
    /// Share of `train` that is held out for measuring, where `evaluation` is absent, e.g. "0.05".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holdout: Option<Decimal>,
    /// How a row is written.
    #[serde(default)]
    pub format: DatasetFormat,
}

/// What is learned: exactly one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.supervised)")
    .message("`objective` must have exactly one member; allowed is `supervised`"))]
pub struct Objective {
    /// The answers of the dataset are imitated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervised: Option<Supervised>,
}

impl Default for Objective {
    fn default() -> Self {
        Self { supervised: Some(Supervised {}) }
    }
}

/// Supervised fine-tuning has no settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Supervised {}

/// What is changed: exactly one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.lora) != has(self.full)")
    .message("`trainable` must have exactly one member; allowed are `lora` and `full`"))]
pub struct Trainable {
    /// Low-rank adapters beside frozen weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraTrainable>,
    /// Every weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full: Option<FullTrainable>,
}

impl Default for Trainable {
    fn default() -> Self {
        Self { lora: Some(LoraTrainable::default()), full: None }
    }
}

/// Full fine-tuning has no settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FullTrainable {}

/// Low-rank adapters (LoRA).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = in_range("dropout", "double(self.dropout) < 1.0").message("`dropout` must be below 1"))]
pub struct LoraTrainable {
    /// Rank of the update.
    #[serde(default = "rank")]
    #[schemars(range(min = 1, max = 1024))]
    pub rank: i32,
    /// Scale: the update is alpha / rank times B A.
    #[serde(default = "alpha")]
    #[schemars(range(min = 1, max = 65536))]
    pub alpha: i32,
    /// Share of an adapter's inputs that is dropped in training.
    #[serde(default = "zero")]
    pub dropout: Decimal,
    /// Layers that get adapters: `AllLinear`, or PEFT's names, e.g. `q_proj`.
    #[serde(default = "all_linear")]
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 63)), extend("x-kubernetes-list-type" = "set", "x-kubernetes-validations" = wording::each_matching("^(AllLinear|[a-z][a-z0-9_]*)$", "must be `AllLinear`, or names of linear layers as PEFT has them, e.g. `q_proj`")))]
    pub targets: Vec<String>,
    /// Precision in which the frozen base is held.
    #[serde(default)]
    pub base_precision: BasePrecision,
}

impl Default for LoraTrainable {
    fn default() -> Self {
        Self {
            rank: rank(),
            alpha: alpha(),
            dropout: zero(),
            targets: all_linear(),
            base_precision: BasePrecision::default(),
        }
    }
}

fn rank() -> i32 {
    16
}
fn alpha() -> i32 {
    32
}
fn zero() -> Decimal {
    "0".into()
}
fn all_linear() -> Vec<String> {
    vec!["AllLinear".to_owned()]
}

/// Precision in which a frozen base is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BasePrecision {
    /// bfloat16: 2 bytes a weight.
    #[default]
    BFloat16,
    /// 32-bit: 4 bytes a weight.
    Float32,
}

/// Hyper-parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.epochs) && has(self.steps))")
    .message("`epochs` and `steps` must not both be set"))]
#[x_kube(validation = in_range("learningRate", "double(self.learningRate) > 0.0 && double(self.learningRate) <= 1.0")
    .message("`learningRate` must be above 0 and at most 1; LoRA often takes 2e-4, full tuning 2e-5"))]
#[x_kube(validation = in_range("warmup", "double(self.warmup) <= 1.0")
    .message("`warmup` is a share of all steps and must be at most 1"))]
#[x_kube(validation = Rule::new("self.sequenceLength <= self.batchTokens")
    .message("`batchTokens` must be at least `sequenceLength`, so that one row fits").field_path(".batchTokens"))]
pub struct TrainingSpec {
    /// Passes over the dataset. Where neither `epochs` nor `steps` is set, 3 passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub epochs: Option<i32>,
    /// Optimizer steps, in place of `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub steps: Option<i32>,
    /// Peak learning rate.
    #[serde(default = "learning_rate")]
    pub learning_rate: Decimal,
    /// Course of the learning rate after warm-up.
    #[serde(default)]
    pub schedule: Schedule,
    /// Share of all steps in which the rate rises from zero.
    #[serde(default = "warmup")]
    pub warmup: Decimal,
    /// Tokens in one optimizer step.
    #[serde(default = "batch_tokens")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub batch_tokens: i32,
    /// Tokens of a row, at most; a longer text is split into rows, a longer conversation is cut and counted.
    #[serde(default = "sequence_length")]
    #[schemars(range(min = 8, max = 1_048_576))]
    pub sequence_length: i32,
    /// Decoupled weight decay of AdamW.
    #[serde(default = "zero")]
    pub weight_decay: Decimal,
    /// Norm to which the gradient is clipped; "0" is never.
    #[serde(default = "max_grad_norm")]
    pub max_grad_norm: Decimal,
    /// Seed of order, dropout and fresh adapters.
    #[serde(default = "seed")]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub seed: i64,
}

impl Default for TrainingSpec {
    fn default() -> Self {
        Self {
            epochs: None,
            steps: None,
            learning_rate: learning_rate(),
            schedule: Schedule::default(),
            warmup: warmup(),
            batch_tokens: batch_tokens(),
            sequence_length: sequence_length(),
            weight_decay: zero(),
            max_grad_norm: max_grad_norm(),
            seed: seed(),
        }
    }
}

fn learning_rate() -> Decimal {
    "2e-4".into()
}
fn warmup() -> Decimal {
    "0.03".into()
}
fn batch_tokens() -> i32 {
    16384
}
fn sequence_length() -> i32 {
    1024
}
fn max_grad_norm() -> Decimal {
    "1".into()
}
fn seed() -> i64 {
    42
}

/// How progress is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.destination) || !has(self.destination.digest)")
    .message("`destination.digest` must be absent: nothing is there yet").field_path(".destination.digest"))]
#[x_kube(validation = Rule::new("!has(self.destination) || self.destination.uri.startsWith('pvc://')")
    .message("`destination.uri` must begin with pvc://, since checkpoints are written where they can be renamed").field_path(".destination.uri"))]
pub struct CheckpointSpec {
    /// Time between two checkpoints.
    #[serde(default = "interval")]
    pub interval: Duration,
    /// Checkpoints that stay.
    #[serde(default = "keep")]
    #[schemars(range(min = 1, max = 100))]
    pub keep: i32,
    /// Where they go; absent: the artefact volume of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<Location>,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { interval: interval(), keep: keep(), destination: None }
    }
}

fn interval() -> Duration {
    "5m".into()
}
fn keep() -> i32 {
    2
}

/// What is measured before and after, and what must hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationSpec {
    /// Metrics; measured only where the dataset has held-out rows.
    #[serde(default = "metrics")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "set"))]
    pub metrics: Vec<Metric>,
    /// Conditions that the tuned model must meet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub gates: Vec<Gate>,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self { metrics: metrics(), gates: Vec::new() }
    }
}

fn metrics() -> Vec<Metric> {
    vec![Metric::Perplexity]
}

/// On what it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.strategy == oldSelf.strategy && self.capacityType == oldSelf.capacityType && has(self.count) == has(oldSelf.count) && (!has(self.count) || self.count == oldSelf.count)")
    .message("`accelerator` must not change but for `profiles` and `fallbackAfter`; make a new FineTuneJob"))]
pub struct AcceleratorRequest {
    /// AcceleratorProfiles that may be used; empty: any that fits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "atomic", "x-kubernetes-validations" = wording::object_names()))]
    pub profiles: Vec<String>,
    /// How one of them is chosen.
    #[serde(default)]
    pub strategy: AcceleratorStrategy,
    /// How long a first pod may find no room before the next profile that fits is tried; absent: for ever. A job whose pod has
    /// run keeps its profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback_after: Option<Duration>,
    /// Nodes of which capacity type may be used.
    #[serde(default)]
    pub capacity_type: CapacityType,
    /// Devices (cores where the profile is a CPU); absent: computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub count: Option<i32>,
}

/// How a profile is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AcceleratorStrategy {
    /// The first that fits, in the order of `profiles`.
    #[default]
    InOrder,
    /// The one with the least cost.
    Cheapest,
    /// The one with the least time.
    Fastest,
}

/// Capacity type of nodes (Karpenter's and the providers' labels).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CapacityType {
    /// Any.
    #[default]
    Any,
    /// Nodes that may be taken back at any time.
    Spot,
    /// Nodes that stay.
    OnDemand,
}

/// What a job may cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.maxCost) || has(self.maxDuration)")
    .message("`budget` must have `maxCost` or `maxDuration`"))]
pub struct Budget {
    /// Money, in the profile's currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cost: Option<Decimal>,
    /// Time in which pods ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_duration: Option<Duration>,
}

/// What is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.destination) || !has(self.destination.digest)")
    .message("`destination.digest` must be absent: the result's digest is in its Model").field_path(".destination.digest"))]
#[x_kube(validation = Rule::new("!has(self.destination) || self.destination.uri.startsWith('pvc://') || self.destination.uri.startsWith('s3://')")
    .message("`destination.uri` must begin with pvc:// or s3://: hf:// and https:// can only be read").field_path(".destination.uri"))]
pub struct OutputSpec {
    /// Name of the Model that is made.
    #[schemars(length(min = 1, max = 63), extend("x-kubernetes-validations" = wording::object_name()))]
    pub model_name: String,
    /// Where its files go; absent: the artefact volume of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<Location>,
}
