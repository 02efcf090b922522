//! What a worker says of its work: untrusted, bounded, and cleaned before it is used.
use serde::{Deserialize, Deserializer, Serialize};

use crate::{AdapterStatus, MAX_POINTS, Metric, thinned};

/// Longest report that is read from a worker.
pub const MAX_REPORT_BYTES: usize = 64 * 1024;
/// Longest termination message (the kubelet cuts it here).
pub const MAX_SUMMARY_BYTES: usize = 4 * 1024;
const MAX_TEXT: usize = 512;

/// Answer to `GET /v1/report` on the control port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    /// What the worker is doing.
    pub phase: Phase,
    /// Words for a person, e.g. which file is being fetched.
    #[serde(deserialize_with = "text")]
    pub message: String,
    /// Training progress.
    pub progress: Option<TrainProgress>,
    /// Load of a serving replica.
    pub load: Option<Load>,
    /// Adapters of a serving replica.
    pub adapters: AdapterStatus,
}

/// Last words of a worker: at most [`MAX_SUMMARY_BYTES`], in the termination message and, for
/// `train`, in `summary.json` beside the artefact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
#[allow(clippy::large_enum_variant)] // One a process, at its end.
pub enum Outcome {
    /// A model was tuned, written and measured.
    Trained {
        /// Location of the artefact (`pvc://` or `s3://`), below the contract's destination.
        #[serde(deserialize_with = "text")]
        uri: String,
        /// `sha256:<hex>` of the artefact.
        #[serde(deserialize_with = "text")]
        digest: String,
        /// `sha256:<hex>` of the dataset.
        #[serde(deserialize_with = "text")]
        dataset_digest: String,
        /// Measurements before and after.
        scores: Vec<Score>,
        /// What they are made from.
        #[serde(default)]
        measured: Measured,
        /// Where training ended.
        progress: TrainProgress,
        /// What the artefact is.
        model: InspectReport,
    },
    /// A model was read.
    Inspected(InspectReport),
    /// A dataset was checked and is good.
    DataChecked(CheckDataReport),
    /// A model was measured.
    Evaluated(EvaluateReport),
    /// Stopped by SIGTERM.
    Stopped {
        /// Where training stood; saved where `checkpoint_step` is `step`.
        progress: Option<TrainProgress>,
    },
    /// It failed.
    Failed(Failure),
}

/// One true cause and the next step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// CamelCase reason that becomes a condition's reason.
    #[serde(deserialize_with = "reason")]
    pub reason: String,
    /// What happened and what to do next.
    #[serde(deserialize_with = "text")]
    pub message: String,
    /// True where another try cannot help.
    pub user_error: bool,
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Started, nothing read yet.
    #[default]
    Starting,
    /// Bringing files.
    Fetching,
    /// Reading weights.
    Loading,
    /// Measuring the base.
    EvaluatingBefore,
    /// Optimizer steps.
    Training,
    /// Measuring the result.
    EvaluatingAfter,
    /// Writing the artefact.
    Saving,
    /// Answering requests.
    Serving,
    /// Answering those in flight, taking nothing new.
    Draining,
    /// Over.
    Done,
}

/// Where training stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrainProgress {
    /// Optimizer steps done.
    pub step: i64,
    /// Optimizer steps in all.
    pub steps: i64,
    /// Tokens seen.
    pub tokens: i64,
    /// Tokens a second, over the last steps.
    pub tokens_per_second: f64,
    /// Loss of the last step, in nats a token.
    pub loss: f64,
    /// Seconds that remain at this speed.
    pub remaining_seconds: f64,
    /// Step of the last checkpoint that was written; 0 = none.
    pub checkpoint_step: i64,
    /// Digest of that checkpoint.
    #[serde(deserialize_with = "text")]
    pub checkpoint_digest: String,
    /// Restarts of the worker that this run has seen.
    pub restarts: i32,
    /// Steps that had to be done again after restarts.
    pub lost_steps: i64,
    /// Losses by step for a plot, at most 200 points.
    pub curve: Vec<(i64, f64)>,
}

/// A measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Score {
    /// What was measured.
    pub metric: Metric,
    /// The base's value.
    pub before: Option<f64>,
    /// The tuned model's value.
    pub after: Option<f64>,
}

/// How much of the held-out rows is measured: of many, a fixed choice that is spread over all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Measured {
    /// Held-out rows.
    pub held_out: i64,
    /// Those whose answers' probabilities are measured.
    pub rows: i64,
    /// Those whose questions are asked, for metrics of answers.
    pub questions: i64,
}

/// What a model is, from its headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InspectReport {
    /// e.g. `LlamaForCausalLM`; of an adapter: `LoRA`.
    #[serde(deserialize_with = "text")]
    pub architecture: String,
    /// Number of weights.
    pub parameters: i64,
    /// Longest sequence that the model was made for; 0 for an adapter.
    pub context_length: i64,
    /// Bytes by precision.
    pub weights: Vec<WeightBytes>,
    /// `sha256:<hex>` over all files, where they could be hashed without fetching weights, else empty.
    #[serde(deserialize_with = "text")]
    pub digest: String,
    /// `sha256:<hex>` over the files of weights alone, where all files were hashed on a volume, else empty.
    #[serde(deserialize_with = "text")]
    pub weights_digest: String,
    /// `sha256:<hex>` over names, sizes and samples of those files.
    #[serde(deserialize_with = "text")]
    pub fingerprint: String,
    /// Licence that the files name, as an SPDX-like id.
    #[serde(deserialize_with = "text")]
    pub license: String,
    /// True where that licence asks for acceptance.
    pub license_needs_acceptance: bool,
    /// Rank of an adapter; 0 for whole weights.
    pub rank: i64,
    /// Shape that plans are made from.
    pub shape: ModelShapeReport,
}

/// The numbers of `config.json` from which memory and time are planned; all zero for an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelShapeReport {
    /// Entries of the vocabulary.
    pub vocab: i64,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Blocks.
    pub layers: i64,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Width of the MLP.
    pub intermediate: i64,
    /// Output head shares the embedding.
    pub tie_embeddings: bool,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
}

/// Bytes of weights in one precision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WeightBytes {
    /// safetensors dtype, e.g. `BF16`.
    #[serde(deserialize_with = "text")]
    pub precision: String,
    /// Bytes.
    pub bytes: i64,
}

/// What was found in a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CheckDataReport {
    /// Format, e.g. `Chat`.
    #[serde(deserialize_with = "text")]
    pub format: String,
    /// Training rows.
    pub rows: i64,
    /// Tokens of the training rows, after cutting.
    pub tokens: i64,
    /// Tokens of those that are learned (answers).
    pub learned_tokens: i64,
    /// Tokens of the longest row, before cutting.
    pub longest_row: i64,
    /// Rows longer than the sequence length.
    pub over_long_rows: i64,
    /// Rows that stand more than once.
    pub duplicate_rows: i64,
    /// Held-out rows.
    pub evaluation_rows: i64,
    /// Held-out rows that stand in the training rows too.
    pub leaked_rows: i64,
    /// `sha256:<hex>` over the files.
    #[serde(deserialize_with = "text")]
    pub digest: String,
}

/// Result of `evaluate`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EvaluateReport {
    /// Values in `after`.
    pub scores: Vec<Score>,
    /// What they are made from.
    pub measured: Measured,
}

/// Load of a serving replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Load {
    /// Sequences being decoded.
    pub running: i64,
    /// Requests that wait.
    pub waiting: i64,
    /// Share of the key-value cache in use, 0 to 1.
    pub cache_usage: f64,
    /// Prompt tokens that were read a second, over the last 10 s.
    pub prompt_tokens_per_second: f64,
    /// Generated tokens a second, over the last 10 s.
    pub generation_tokens_per_second: f64,
    /// What this replica measured for itself, or learned from its load; absent: nothing yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<ReplicaCapacity>,
    /// Since its start, for whoever sums up what flows without a gateway.
    pub totals: Totals,
}

/// What a replica can do at saturation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaCapacity {
    /// Prompt tokens a second while it reads prompts alone.
    pub prompt: f64,
    /// Generated tokens a second with as many sequences as it takes.
    pub generation: f64,
    /// Sequences that it decodes at the same time.
    pub sequences: u32,
}

/// What a replica did since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Totals {
    /// Requests that came, those that were refused for want of room with them.
    pub arrived: i64,
    /// Of those that were let in, the ones that ended: one that was refused was no work, and says nothing of the work of the others.
    pub finished: i64,
    /// Prompt tokens that were read, those from the cache not with them.
    pub prompt: i64,
    /// Tokens that were generated.
    pub generation: i64,
}

/// Why a worker's or a gateway's words were not believed.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Too long.
    #[error("a report must be at most {limit} bytes (found {found})")]
    TooLong {
        /// Allowed bytes.
        limit: usize,
        /// Bytes that came.
        found: usize,
    },
    /// More of something than was agreed.
    #[error("a list must have at most {limit} entries (found {found})")]
    TooMany {
        /// Allowed entries.
        limit: usize,
        /// Entries that came.
        found: usize,
    },
    /// Not the JSON that was agreed.
    #[error("a report is not what the contract says: {0}")]
    Malformed(#[from] serde_json::Error),
}

impl Report {
    /// Reads a worker's answer; strings are cut to 512 bytes and lose control characters.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        parse(bytes, MAX_REPORT_BYTES)
    }
}

impl Summary {
    /// Reads a worker's last words; strings are cut to 512 bytes and lose control characters.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        parse(bytes, MAX_SUMMARY_BYTES)
    }

    /// JSON of at most [`MAX_SUMMARY_BYTES`], with as many points of the loss curve as fit.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut fitting = self.clone();
        let Some(whole) = curve(&mut fitting.outcome).map(std::mem::take) else {
            return serde_json::to_vec(&fitting).unwrap_or_default();
        };
        // Four digits are more than a plot shows.
        let whole: Vec<_> =
            whole.into_iter().map(|(step, loss)| (step, (loss * 1e4).round() / 1e4)).collect();
        let mut write = |points: usize| {
            curve(&mut fitting.outcome)?.clone_from(&thinned(&whole, points));
            serde_json::to_vec(&fitting).ok().filter(|bytes| points == 0 || bytes.len() <= MAX_SUMMARY_BYTES)
        };
        [MAX_POINTS, 100, 50, 25, 0].into_iter().find_map(&mut write).unwrap_or_default()
    }
}

/// The losses of a training.
fn curve(outcome: &mut Outcome) -> Option<&mut Vec<(i64, f64)>> {
    match outcome {
        Outcome::Trained { progress, .. } | Outcome::Stopped { progress: Some(progress) } => {
            Some(&mut progress.curve)
        }
        _ => None,
    }
}

pub(crate) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, ReportError> {
    if bytes.len() > limit {
        return Err(ReportError::TooLong { limit, found: bytes.len() });
    }
    Ok(serde_json::from_slice(bytes)?)
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let raw = String::deserialize(deserializer)?;
    Ok(display_text(&raw))
}

/// Fit for status and logs: no control characters, at most 512 bytes, cut at a character.
fn display_text(raw: &str) -> String {
    let mut clean: String = raw.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if clean.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT - '…'.len_utf8()).rev().find(|&i| clean.is_char_boundary(i)).unwrap_or(0);
        clean.truncate(end);
        clean.push('…');
    }
    clean
}

/// A condition's reason: CamelCase, or `WorkerFailed` where a worker says something else.
fn reason<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let raw = String::deserialize(deserializer)?;
    let fits = raw.len() <= 64
        && raw.starts_with(|c: char| c.is_ascii_uppercase())
        && raw.chars().all(|c| c.is_ascii_alphanumeric());
    Ok(if fits { raw } else { "WorkerFailed".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_a_worker_are_cleaned_and_cut() {
        let long = "é".repeat(600);
        let json = serde_json::json!({"phase": "Training", "message": format!("a\nb\u{1b}[31m{long}")});
        let report = Report::parse(json.to_string().as_bytes()).expect("parses");
        assert!(report.message.starts_with("a b [31m"));
        assert!(report.message.len() <= MAX_TEXT && report.message.ends_with('…'));
    }

    #[test]
    fn a_report_that_is_too_long_is_refused_unread() {
        let bytes = vec![b' '; MAX_REPORT_BYTES + 1];
        assert!(matches!(Report::parse(&bytes), Err(ReportError::TooLong { .. })));
    }

    #[test]
    fn a_reason_that_is_no_condition_reason_is_replaced() {
        let json = br#"{"outcome":{"failed":{"reason":"../x","message":"m","userError":false}}}"#;
        let Outcome::Failed(failure) = Summary::parse(json).expect("parses").outcome else {
            panic!("not a failure")
        };
        assert_eq!(failure.reason, "WorkerFailed");
    }

    #[test]
    fn the_longest_summary_fits_a_termination_message() {
        let score = |metric| Score {
            metric,
            before: Some(-1.234_567_890_123e-10),
            after: Some(1.234_567_890_123e-10),
        };
        let text = "\u{1F600}".repeat(128);
        let summary = Summary {
            outcome: Outcome::Trained {
                uri: text,
                digest: format!("sha256:{}", "f".repeat(64)),
                dataset_digest: format!("sha256:{}", "f".repeat(64)),
                scores: [Metric::Perplexity, Metric::BLEU, Metric::ROUGE1, Metric::ROUGE2, Metric::ROUGEL]
                    .map(score)
                    .to_vec(),
                measured: Measured { held_out: i64::MAX, rows: 1000, questions: 64 },
                progress: TrainProgress {
                    curve: vec![(i64::MAX, 0.123_456_789); 200],
                    ..TrainProgress::default()
                },
                model: InspectReport {
                    weights: vec![WeightBytes { precision: "BF16".into(), bytes: i64::MAX }; 8],
                    ..InspectReport::default()
                },
            },
        };
        let bytes = summary.to_bytes();
        let written: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        assert!(written["outcome"]["trained"]["datasetDigest"].is_string(), "{written}");
        assert!(bytes.len() <= MAX_SUMMARY_BYTES, "{} bytes", bytes.len());
        Summary::parse(&bytes).expect("reads back");
    }

    #[test]
    fn last_words_have_as_much_of_the_curve_as_fits() {
        let told = |points: i64, digits: f64| {
            let curve =
                (1..=points).map(|step| (step * 1_000_000_000, 1.0 / 3.0 + digits * step as f64)).collect();
            let progress = Some(TrainProgress { curve, ..TrainProgress::default() });
            let bytes = Summary { outcome: Outcome::Stopped { progress } }.to_bytes();
            assert!(bytes.len() <= MAX_SUMMARY_BYTES, "{} bytes", bytes.len());
            match Summary::parse(&bytes).expect("reads back").outcome {
                Outcome::Stopped { progress: Some(progress) } => progress.curve,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(told(3, 0.0), [(1_000_000_000, 0.3333), (2_000_000_000, 0.3333), (3_000_000_000, 0.3333)]);
        let long = told(200, 1e-4);
        assert_eq!((long.len(), long[0].0, long[99].0), (100, 1_000_000_000, 200_000_000_000));
    }
}
