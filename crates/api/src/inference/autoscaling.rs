//! How many replicas a service has, where the tokens that flow decide it: what a user asks for, and what is told of it.
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{Duration, cut, scalar::in_time};

/// As many replicas as a service can ask for, and as many as its status has room for.
pub const MAX_REPLICAS: i32 = 10_000;
/// Most decisions that a status keeps.
pub const MAX_DECISIONS: usize = 10;
/// Longest sentence of a decision, in bytes.
pub const MAX_DECISION_MESSAGE: usize = 200;
/// Most moments of which a status keeps what replicas had counted.
pub const MAX_COUNTED: usize = 6;
/// Longest text of what stands in the way of scaling, in bytes.
pub const MAX_SCALING_MESSAGE: usize = 1000;
/// Seconds before an idle service sleeps, where `scaleToZeroAfter` does not say.
const SLEEPS_AFTER: i64 = 15 * 60;

/// How many replicas there are, by the tokens that flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.minReplicas) || self.minReplicas <= self.maxReplicas")
    .message("`minReplicas` must be at most `maxReplicas`").field_path(".minReplicas"))]
#[x_kube(validation = Rule::new("!has(self.scaleToZeroAfter) || (has(self.minReplicas) && self.minReplicas == 0)")
    .message("`scaleToZeroAfter` must be absent unless `minReplicas` is 0").field_path(".scaleToZeroAfter"))]
#[x_kube(validation = in_time("scaleDownAfter", "10s", "24h")
    .message("`scaleDownAfter` must be at least 10s and at most 24h"))]
#[x_kube(validation = in_time("scaleToZeroAfter", "10s", "168h")
    .message("`scaleToZeroAfter` must be at least 10s and at most 168h"))]
pub struct Autoscaling {
    /// Replicas that there are at least. 0: the service sleeps while nobody asks, and the next request, which the gateway holds
    /// meanwhile, wakes a replica; so with `access: Direct`, where nobody holds it, at least 1.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub min_replicas: i32,
    /// Replicas that there are at most.
    #[schemars(range(min = 1, max = MAX_REPLICAS))]
    pub max_replicas: i32,
    /// How busy replicas are to be: percent of the tokens a second that one replica measured for itself.
    #[serde(default = "seventy")]
    #[schemars(range(min = 1, max = 100))]
    pub target_throughput_percent: i32,
    /// How long fewer replicas must have been enough before the others are given back; never shorter than a replica takes to
    /// start. From "10s" to "24h".
    #[serde(default = "five_minutes")]
    pub scale_down_after: Duration,
    /// How long nobody must have asked before the last replica is given back, with `minReplicas: 0`; absent: 15 minutes. From
    /// "10s" to "168h".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_to_zero_after: Option<Duration>,
}

fn one() -> i32 {
    1
}

fn seventy() -> i32 {
    70
}

fn five_minutes() -> Duration {
    "5m".into()
}

impl Autoscaling {
    /// Seconds before an idle service sleeps; `None`: it never does.
    #[must_use]
    pub fn sleeps_after(&self) -> Option<i64> {
        let said = self.scale_to_zero_after.as_ref().and_then(Duration::seconds);
        (self.min_replicas == 0).then(|| said.unwrap_or(SLEEPS_AFTER))
    }

    /// `replicas`, within the bounds.
    #[must_use]
    pub fn bounded(&self, replicas: i32) -> i32 {
        replicas.min(self.max_replicas).max(self.min_replicas)
    }
}

/// A change of the number of replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecisionStatus {
    /// When.
    #[schemars(schema_with = "time")]
    pub time: Time,
    /// Replicas before.
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub from: i32,
    /// Replicas that were asked for.
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub to: i32,
    /// One word for programs: why.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// A sentence for people, with the numbers.
    #[schemars(length(max = 256))]
    pub message: String,
}

impl DecisionStatus {
    /// A decision at a Unix time in seconds; a sentence of more than [`MAX_DECISION_MESSAGE`] bytes is cut, which an ellipsis shows.
    #[must_use]
    pub fn new(seconds: i64, (from, to): (i32, i32), reason: &str, message: &str) -> Self {
        Self {
            time: Time(Timestamp::from_second(seconds).unwrap_or_default()),
            from,
            to,
            reason: reason.to_owned(),
            message: cut(message, MAX_DECISION_MESSAGE),
        }
    }
}

fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time", "description": "When."})
}

/// Where the scaler stands, so that an operator that starts anew decides as if it had not: its own notes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalingStatus {
    /// Replicas that were asked for last.
    #[serde(default)]
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub replicas: i32,
    /// Why nothing is given back or asked for by the load; absent: nothing stands in the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked: Option<ScalingBlock>,
    /// What the API server says to the write that it refuses, and what to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_SCALING_MESSAGE))]
    pub message: Option<String>,
    /// Seconds that a pod took from being made to being ready, the last one that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86400))]
    pub start_up_seconds: Option<i64>,
    /// What is remembered from one decision to the next.
    #[serde(default)]
    pub memory: ScalingMemory,
    /// What the service's own replicas had counted at some moments of the last minute, oldest first, where they are asked because
    /// everybody asks them directly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_COUNTED), extend("x-kubernetes-list-type" = "atomic"))]
    pub counted: Vec<CountedStatus>,
}

/// What the replicas of a service had counted since their start, summed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CountedStatus {
    /// Hash of which replicas these were.
    #[schemars(length(max = 32))]
    pub replicas: String,
    /// Unix time in seconds.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub at: i64,
    /// Requests that came.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub arrived: i64,
    /// Requests that ended.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub finished: i64,
    /// Prompt tokens that were read.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub prompt: i64,
    /// Tokens that were generated.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub generation: i64,
}

/// Why a load decides nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ScalingBlock {
    /// No gateway has reported lately.
    ReportsLate,
    /// A gateway does not report.
    ReportsMissing,
    /// No replica has measured its throughput yet.
    CapacityUnknown,
    /// The API server refuses the number of replicas that was decided.
    WriteRefused,
}

/// What is remembered from one decision to the next; times are Unix seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScalingMemory {
    /// Last second that was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub seen: Option<i64>,
    /// From then on every second was reported.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub since: i64,
    /// Last second in which there was anything to do.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub busy: i64,
    /// The most replicas that were wanted in each part of the quiet window, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 12), extend("x-kubernetes-list-type" = "atomic"))]
    pub peaks: Vec<ScalingPeak>,
    /// When replicas were last raised, and from how many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raised: Option<ScalingPeak>,
    /// Prompt tokens that were read lately, in thousandths.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub prompt_done: i64,
    /// Tokens that were generated lately, in thousandths.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub generation_done: i64,
    /// Requests that ended lately, in millionths.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub requests_done: i64,
}

/// A number of replicas at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScalingPeak {
    /// Unix time in seconds.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub at: i64,
    /// The number.
    #[schemars(range(min = 0, max = 4_294_967_295_i64))]
    pub replicas: i64,
}

/// What one replica can do when it is fully busy, as it measured itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CapacityStatus {
    /// Revision of the replicas that measured it: of another one, with another model, other settings or another accelerator, it
    /// says nothing.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub revision: String,
    /// Prompt tokens a second while it reads prompts alone.
    #[schemars(length(max = 32))]
    pub prompt: String,
    /// Generated tokens a second with as many sequences as it takes.
    #[schemars(length(max = 32))]
    pub generation: String,
    /// Sequences that it decodes at the same time.
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub sequences: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_may_sleep_does_so_after_fifteen_minutes_unless_it_says_otherwise() {
        let of = |json: serde_json::Value| serde_json::from_value::<Autoscaling>(json).expect("autoscaling");
        assert_eq!(of(serde_json::json!({"maxReplicas": 3})).sleeps_after(), None);
        let sleepy = of(serde_json::json!({"minReplicas": 0, "maxReplicas": 3}));
        assert_eq!(sleepy.sleeps_after(), Some(900));
        assert_eq!((sleepy.bounded(-1), sleepy.bounded(2), sleepy.bounded(9)), (0, 2, 3));
        let sooner = of(serde_json::json!({"minReplicas": 0, "maxReplicas": 3, "scaleToZeroAfter": "1m30s"}));
        assert_eq!(sooner.sleeps_after(), Some(90));
    }

    #[test]
    fn a_long_sentence_is_cut_at_a_character() {
        let message = |text: &str| DecisionStatus::new(1_700_000_000, (1, 2), "OnTarget", text).message;
        let whole = "a".repeat(MAX_DECISION_MESSAGE);
        assert_eq!(message(&whole), whole);
        assert_eq!(message(&format!("{whole}a")), format!("{}…", "a".repeat(MAX_DECISION_MESSAGE - 3)));
        // 197 bytes are room for 98 characters of two, and one byte stays empty.
        assert_eq!(message(&"é".repeat(150)), format!("{}…", "é".repeat(98)));
    }
}
