//! How running replicas are replaced: what a user asks for, and what is told of it.
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Decimal, Duration, Metric,
    scalar::{in_range, in_time},
};

/// Longest sentence of a roll-out, in bytes.
pub const MAX_ROLLOUT_MESSAGE: usize = 1000;

/// How running replicas are replaced where the spec changes what they are made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.strategy) && self.strategy == 'Canary') == (has(self.steps) && self.steps.size() > 0)")
    .message("`steps` must be set with `strategy: Canary`, and absent without it").field_path(".steps"))]
#[x_kube(validation = Rule::new("!has(self.gates) || self.gates.size() == 0 || (has(self.strategy) && self.strategy == 'Canary')")
    .message("`gates` must be absent without `strategy: Canary`, where nothing is compared").field_path(".gates"))]
#[x_kube(validation = Rule::new("!has(self.steps) || [0, 1, 2, 3, 4, 5, 6, 7, 8].all(i, i + 1 >= self.steps.size() || self.steps[i].percent < self.steps[i + 1].percent)")
    .message("each of `steps` must have a higher `percent` than the one before, so that nobody goes back and forth").field_path(".steps"))]
pub struct Rollout {
    /// How.
    #[serde(default)]
    pub strategy: RolloutStrategy,
    /// How many of the users the candidate gets, and for how long, one step after the other; with Canary alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub steps: Vec<RolloutStep>,
    /// What the candidate must hold in every step, each metric once; with Canary alone. One that does not hold removes the
    /// candidate, and the stable revision goes on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"]))]
    pub gates: Vec<RolloutGate>,
}

impl Rollout {
    /// The step of this number, counted from 1, or the last one where there are fewer by now, with its own number; `None`: there are
    /// no steps.
    #[must_use]
    pub fn step(&self, number: i32) -> Option<(i32, &RolloutStep)> {
        let at = usize::try_from(number).unwrap_or(1).clamp(1, self.steps.len().max(1));
        Some((i32::try_from(at).ok()?, self.steps.get(at - 1)?))
    }
}

/// How running replicas are replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutStrategy {
    /// A new replica is made, and when it is ready an old one goes. Where no device is free for one more, an old one goes first.
    #[default]
    RollingUpdate,
    /// All old replicas go before a new one is made; the gateway holds requests meanwhile.
    Recreate,
    /// A candidate runs beside the stable revision and gets a share of the users, in steps; then the replicas are replaced as
    /// with RollingUpdate.
    Canary,
}

/// A share of the users for a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = in_time("after", "10s", "168h").message("`after` must be at least 10s and at most 168h"))]
pub struct RolloutStep {
    /// Percent of the users whom the candidate answers: of the keys, or of what requests name as `user`.
    #[schemars(range(min = 1, max = 100))]
    pub percent: i32,
    /// How long the step lasts at least; longer while there are too few requests to judge a gate. From "10s" to "168h".
    pub after: Duration,
}

/// A condition that the candidate must hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(self.metric in ['ErrorRate', 'TimeToFirstToken', 'Perplexity']) ? (has(self.atMost) && !has(self.atLeast)) : (has(self.atLeast) && !has(self.atMost))")
    .message("a gate must have `atMost` alone for ErrorRate, TimeToFirstToken and Perplexity, and `atLeast` alone for all others"))]
#[x_kube(validation = in_range("atMost", "self.metric != 'ErrorRate' || double(self.atMost) <= 1.0")
    .message("`atMost` of ErrorRate is a share of the requests; it must be at most 1"))]
pub struct RolloutGate {
    /// What is compared.
    pub metric: RolloutMetric,
    /// Highest allowed value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<Decimal>,
    /// Lowest allowed value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<Decimal>,
}

/// What a gate compares. Of the requests that the candidate answered in a step, or a score of the Model that it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutMetric {
    /// Share of the requests that ended with an error of the server or a lost replica, 0 to 1.
    ErrorRate,
    /// Seconds from when the replica is asked to the first token of a streamed answer, on the average.
    TimeToFirstToken,
    /// Tokens a second of a streamed answer after its first, on the average.
    TokensPerSecond,
    /// The Model's score after its training: `status.scores` of it. So are those below.
    Perplexity,
    /// As Perplexity.
    BLEU,
    /// As Perplexity.
    ROUGE1,
    /// As Perplexity.
    ROUGE2,
    /// As Perplexity.
    ROUGEL,
}

impl RolloutMetric {
    /// The Model's score; `None`: it is measured of requests.
    #[must_use]
    pub fn score(self) -> Option<Metric> {
        match self {
            Self::ErrorRate | Self::TimeToFirstToken | Self::TokensPerSecond => None,
            Self::Perplexity => Some(Metric::Perplexity),
            Self::BLEU => Some(Metric::BLEU),
            Self::ROUGE1 => Some(Metric::ROUGE1),
            Self::ROUGE2 => Some(Metric::ROUGE2),
            Self::ROUGEL => Some(Metric::ROUGEL),
        }
    }
}

/// Revisions that run, by the beginnings of their checksums; a revision's ConfigMap ends with the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RevisionsStatus {
    /// The one that the service's replicas are of, or become.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub stable: Option<String>,
    /// The one that is tried beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub candidate: Option<String>,
}

/// Where a roll-out with a candidate stands, so that an operator that starts anew decides as if it had not; gateways share requests
/// out by it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// The revision that is or was tried.
    #[schemars(length(max = 32))]
    pub revision: String,
    /// Hash of the `spec.rollout` that it began with: one that failed is tried again where that changes.
    #[schemars(length(max = 32))]
    pub rules: String,
    /// Where it stands.
    pub phase: RolloutPhase,
    /// The step, counted from 1.
    #[schemars(range(min = 1, max = 10))]
    pub step: i32,
    /// Percent of the users whom the candidate answers at present.
    #[schemars(range(min = 0, max = 100))]
    pub percent: i32,
    /// When the step began: Unix time in seconds.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub since: i64,
    /// Up to then requests of the step are counted: Unix time in seconds.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub counted: i64,
    /// How requests to the candidate ended in the step.
    #[serde(default)]
    pub candidate: EndedStatus,
    /// How requests to the stable revision ended in the step.
    #[serde(default)]
    pub stable: EndedStatus,
    /// What came of it, with the numbers; absent while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

/// Where a roll-out with a candidate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutPhase {
    /// No pod of the candidate is ready yet, so that nobody is sent to it.
    Starting,
    /// It answers its share of the users.
    Testing,
    /// It has held every gate: the service's replicas become what it is, and it answers its share meanwhile.
    Promoting,
    /// The service's replicas are what it was.
    Promoted,
    /// It has not held a gate.
    Failed,
}

/// Requests that ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EndedStatus {
    /// Requests.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub requests: i64,
    /// Of them, those with an error of the server or a lost replica.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub errors: i64,
    /// Streamed answers that had a first token.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub streams: i64,
    /// Milliseconds to their first tokens, summed.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub first_token_millis: i64,
    /// Their tokens after the first.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub tokens: i64,
    /// Milliseconds in which those came, summed.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub decode_millis: i64,
}
