//! What the operator knows of a job.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Duration, NameRef, PlanStatus, conditions, model::ScoreStatus};

/// What the operator knows of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobStatus {
    /// Generation of the spec that this status speaks of; -1 before the first visit.
    #[serde(default = "conditions::unobserved")]
    #[schemars(range(min = -1, max = 9_007_199_254_740_991_i64))]
    pub observed_generation: i64,
    /// Conditions: `Succeeded` is the summary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions::schema")]
    pub conditions: Vec<Condition>,
    /// What is learned and changed, e.g. `supervised/lora`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub method: Option<String>,
    /// Every choice that Lathe made, with the memory table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
    /// Number of the current Job; counts from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub attempt: Option<i32>,
    /// Profiles that were given up, since no pod found room there within `accelerator.fallbackAfter`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub passed_over: Vec<String>,
    /// Start of the first pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// End.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Where training stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// Restarts of the worker, and what they cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<RestartStatus>,
    /// Measurements before and after.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"]))]
    pub scores: Vec<ScoreStatus>,
    /// Seconds in which pods held their devices, in earlier attempts and this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub device_seconds: Option<i64>,
    /// Up to when `deviceSeconds` counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accounted_until: Option<Time>,
    /// What it has cost, with the currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub cost: Option<String>,
    /// Digest of the dataset that was checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    pub dataset_digest: Option<String>,
    /// The Model that was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_ref: Option<NameRef>,
}

/// Where training stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// For people: `120/300 40%`.
    #[serde(default)]
    #[schemars(length(max = 63))]
    pub summary: String,
    /// Optimizer steps done.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub step: i64,
    /// Optimizer steps in all.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub steps: i64,
    /// Tokens seen.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub tokens: i64,
    /// Tokens a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub tokens_per_second: Option<String>,
    /// Loss of the last step, in nats a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub loss: Option<String>,
    /// Time that remains at this speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining: Option<Duration>,
    /// The last checkpoint that was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<CheckpointStatus>,
}

/// A checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointStatus {
    /// Optimizer step after which it was written.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub step: i64,
    /// Digest of its files.
    #[serde(default)]
    #[schemars(length(max = 512))]
    pub digest: String,
}

/// Restarts of the worker, and what they cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestartStatus {
    /// How often it resumed.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub count: i32,
    /// Steps that had to be done again.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub lost_steps: i64,
}
