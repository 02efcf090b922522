//! Small types that several kinds share: numbers as text, references, locations, plans.
use std::borrow::Cow;

use kube::{KubeSchema, core::cel::Rule};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::wording;

/// What a [`Decimal`] is.
const DECIMAL: &str = "^[0-9]{1,12}([.][0-9]{1,12})?([eE]-?[0-9]{1,2})?$";
/// What a [`Duration`] is.
const DURATION: &str = "^([0-9]{1,6}(s|m|h)){1,3}$";

/// The rule that a [`Decimal`] field of an object is in a range, e.g. `double(self.warmup) <= 1.0`. What is no number is
/// refused by the field's own rule, and here not turned into one.
pub(crate) fn in_range(field: &str, range: &str) -> Rule {
    Rule::new(format!("!has(self.{field}) || !self.{field}.matches('{DECIMAL}') || ({range})"))
        .field_path(format!(".{field}"))
}

/// The rule that a [`Duration`] field of an object is from `least` to `most`. What is no duration is refused by the field's own rule.
pub(crate) fn in_time(field: &str, least: &str, most: &str) -> Rule {
    let is = format!("duration(self.{field})");
    let holds = format!("{is} >= duration('{least}') && {is} <= duration('{most}')");
    Rule::new(format!("!has(self.{field}) || !self.{field}.matches('{DURATION}') || ({holds})"))
        .field_path(format!(".{field}"))
}

macro_rules! text_scalar {
    ($(#[$doc:meta])* $name:ident, $pattern:expr, $must:literal, $description:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn inline_schema() -> bool {
                true
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "type": "string", "maxLength": 32, "description": $description,
                    "x-kubernetes-validations": wording::matching($pattern, $must)
                })
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_scalar!(
    /// A number with a fraction, written as text so that no reader rounds it.
    Decimal,
    DECIMAL,
    "must be a number without a sign, as text: e.g. \"0.05\" or \"2e-4\"",
    "A number as text, e.g. \"0.05\" or \"2e-4\"."
);
text_scalar!(
    /// A Kubernetes quantity.
    Quantity,
    r"^[0-9]{1,15}([.][0-9]{1,9})?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$",
    "must be a number with no unit or one of m, k, Ki, M, Mi, G, Gi, T, Ti: e.g. \"80Gi\" or \"500m\"",
    "A quantity, e.g. \"80Gi\" or \"500m\"."
);
text_scalar!(
    /// A duration in Go's notation.
    Duration,
    DURATION,
    "must be numbers with the units h, m and s: e.g. \"90s\", \"10m\" or \"1h30m\"",
    "A duration, e.g. \"90s\", \"10m\" or \"1h30m\"."
);

impl Decimal {
    /// The number. The schema has checked the text; what came another way may be no number.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        self.0.parse().ok().filter(|v: &f64| v.is_finite())
    }
}

impl Duration {
    /// Whole seconds.
    #[must_use]
    pub fn seconds(&self) -> Option<i64> {
        let mut total: i64 = 0;
        let mut rest = self.0.as_str();
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit())?;
            let number: i64 = rest.get(..digits)?.parse().ok()?;
            let unit = match rest.as_bytes().get(digits)? {
                b's' => 1,
                b'm' => 60,
                b'h' => 3600,
                _ => return None,
            };
            total = total.checked_add(number.checked_mul(unit)?)?;
            rest = rest.get(digits + 1..)?;
        }
        Some(total)
    }
}

impl Quantity {
    /// Whole units (bytes, cores rounded up).
    #[must_use]
    pub fn value(&self) -> Option<i64> {
        let value = self.amount()?.ceil();
        (value <= 9.007_199_254_740_992e15).then_some(value as i64)
    }

    /// The number with its suffix applied.
    #[must_use]
    pub fn amount(&self) -> Option<f64> {
        let split = self.0.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(self.0.len());
        let number: f64 = self.0.get(..split)?.parse().ok()?;
        let scale = match self.0.get(split..)? {
            "" => 1.0,
            "m" => 1e-3,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            "Ki" => 1024.0,
            "Mi" => 1024.0_f64.powi(2),
            "Gi" => 1024.0_f64.powi(3),
            "Ti" => 1024.0_f64.powi(4),
            _ => return None,
        };
        Some(number * scale)
    }
}

/// Names an object of the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NameRef {
    /// Name of the object, in this namespace.
    #[schemars(length(min = 1, max = 253), extend("x-kubernetes-validations" = wording::object_name()))]
    pub name: String,
}

/// Where files are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.uri.matches('^(hf|s3|pvc|https)://[^/]')")
    .message("`uri` must begin with hf://, s3://, pvc://<claim>/ or https://; gs:// and oci:// are not supported yet")
    .field_path(".uri"))]
#[x_kube(validation = Rule::new("!self.uri.contains('/../') && !self.uri.endsWith('/..')")
    .message("`uri` must not contain `..`").field_path(".uri"))]
#[x_kube(validation = Rule::new("!self.uri.matches('^[a-z0-9]+://[^/]*@') || self.uri.startsWith('hf://')")
    .message("`uri` must not hold a user name or password; put them into the Secret of `secretRef`").field_path(".uri"))]
#[x_kube(validation = Rule::new("!has(self.revision) || self.uri.startsWith('hf://')")
    .message("`revision` must be absent but for hf://; pin other files by `digest`").field_path(".revision"))]
#[x_kube(validation = Rule::new("!has(self.secretRef) || !self.uri.startsWith('pvc://')")
    .message("`secretRef` must be absent for pvc://, which needs no credentials").field_path(".secretRef"))]
pub struct Location {
    /// Address: `hf://org/name`, `s3://bucket/prefix`, `pvc://claim/path` or `https://host/path`.
    #[schemars(length(min = 6, max = 1024), extend("x-kubernetes-validations" = wording::matching("^[!-~]+$", "must be ASCII without spaces; write other characters percent-encoded")))]
    pub uri: String,
    /// Branch, tag or commit of an `hf://` repository. A commit makes it reproducible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128), extend("x-kubernetes-validations" = wording::matching("^[A-Za-z0-9][A-Za-z0-9._/-]*$", "must be a branch, tag or commit: letters, digits, `.`, `_`, `/` and `-`, beginning with a letter or digit")))]
    pub revision: Option<String>,
    /// Secret with the credentials; mounted into the pod that reads, never read by the operator.
    /// Keys: `token` (hf, https), `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL` (s3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<NameRef>,
    /// Digest that the content must have, `sha256:` and 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128), extend("x-kubernetes-validations" = wording::digest()))]
    pub digest: Option<String>,
}

/// How the rows of a dataset are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DatasetFormat {
    /// Decide by the first row.
    #[default]
    Auto,
    /// `{"messages": [{"role": "user", "content": "..."}, ...]}`; the assistant's turns are learned.
    Chat,
    /// `{"prompt": "...", "completion": "..."}`; the completion is learned.
    PromptCompletion,
    /// `{"text": "..."}`; all of it is learned.
    Text,
}

/// Course of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    /// Stays at its peak.
    Constant,
    /// Falls to zero on a line.
    Linear,
    /// Falls to zero on half a cosine.
    #[default]
    Cosine,
}

/// What can be measured of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Metric {
    /// exp of the mean negative log-likelihood of the answers' tokens; lower is better.
    Perplexity,
    /// Corpus BLEU, 13a tokenisation, 0 to 100, as sacreBLEU computes it.
    BLEU,
    /// ROUGE-1 F1, 0 to 1.
    ROUGE1,
    /// ROUGE-2 F1, 0 to 1.
    ROUGE2,
    /// ROUGE-L F1, 0 to 1.
    ROUGEL,
}

/// A condition that the tuned model must meet before it is called done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.atLeast) || has(self.atMost) || has(self.minImprovement)")
    .message("a gate must have `atLeast`, `atMost` or `minImprovement`"))]
pub struct Gate {
    /// What is compared. It must also stand in `metrics`.
    pub metric: Metric,
    /// Lowest allowed value after tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<Decimal>,
    /// Highest allowed value after tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<Decimal>,
    /// Least relative improvement over the base, in the metric's own direction: "0.1" is 10 % better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_improvement: Option<Decimal>,
}

/// What Lathe chose, and the memory that the choice needs on each device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanStatus {
    /// Accelerator profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub profile: Option<String>,
    /// Devices (cores where the profile is a CPU).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 65536))]
    pub count: Option<i32>,
    /// Rows of the memory table, then what was chosen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub memory: Vec<PlanLine>,
    /// Choices that the spec left open, as `name: value`, e.g. `microBatchTokens: 2048`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub choices: Vec<PlanLine>,
    /// Expected duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Duration>,
    /// Expected cost in the profile's currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub cost: Option<String>,
}

/// A named value of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanLine {
    /// What it is: `weights`, `gradients`, `optimizer`, `activations`, `workspace`, `total`, or a choice.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// Its value: a quantity for memory.
    #[schemars(length(max = 64))]
    pub value: String,
}
