//! The task that a pod is given.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the contract's shape; a worker refuses one that it does not know, and in a version that it knows a field that it
/// does not: to pass over what decides a result would make another result. [`ServedAdapter`] and what it holds is the exception,
/// see [`DesiredAdapters`](crate::DesiredAdapters).
pub const CONTRACT_VERSION: u32 = 1;

/// Everything that a worker needs to know, in one JSON file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Contract {
    /// [`CONTRACT_VERSION`] of the writer.
    pub version: u32,
    /// The object that the pod works for.
    pub object: ObjectRef,
    /// Whose tokens the control port accepts.
    pub trust: Trust,
    /// Where the pod's volumes and secrets are mounted.
    pub mounts: Mounts,
    /// What to do.
    pub task: Task,
}

/// The object on whose behalf a worker runs; its UID is the audience of every token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ObjectRef {
    /// Kind, e.g. `FineTuneJob`.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// Public keys (PEM, SPKI) whose tokens a worker believes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Trust {
    /// The operator's key. Absent for a local run: then the control port listens on loopback only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator_key: Option<String>,
    /// The gateway's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_key: Option<String>,
}

/// Folders that the pod sees.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mounts {
    /// PersistentVolumeClaim name to the folder where it is mounted: `pvc://<claim>/<path>` is `<folder>/<path>`.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
    /// Folder for downloads; may be lost with the pod.
    pub cache: String,
    /// Bytes that it may hold; absent: as many as the disk has. A pod whose folder holds more is evicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_bytes: Option<i64>,
}

/// A `Location` of the API as a pod sees it: the Secret is a mounted folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceRef {
    /// `hf:// s3:// pvc:// https://` address.
    pub uri: String,
    /// Branch, tag or commit (`hf://`), version (`s3://`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `sha256:<hex>` that the content must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Folder of the mounted Secret with the credentials, a file for each key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_dir: Option<String>,
}

/// One task a pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Task {
    /// Tune a model.
    Train(Box<TrainTask>),
    /// Serve a model.
    Serve(ServeTask),
    /// Measure a model.
    Evaluate(EvaluateTask),
    /// Read a model's headers, or repeat a lost summary.
    Inspect(InspectTask),
    /// Check a dataset.
    CheckData(CheckDataTask),
}

/// A model to read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelInput {
    /// Name of the `Model` object (the model id where served).
    pub name: String,
    /// Where its files are.
    pub source: SourceRef,
    /// What its inspection knows of files on a volume: unchanged ones need not be hashed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inspected: Option<Inspected>,
}

/// What an inspection that has hashed a model's files knows of them, beside their digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspected {
    /// `sha256:<hex>` over names, sizes and samples.
    pub fingerprint: String,
    /// `sha256:<hex>` over the files of weights alone.
    pub weights_digest: String,
}

/// A dataset to read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetInput {
    /// Training rows.
    pub train: SourceRef,
    /// Held-out rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<SourceRef>,
    /// Share of the training rows to hold out where `evaluation` is absent (0 to 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holdout: Option<f64>,
    /// How a row is written.
    pub format: DatasetFormat,
}

/// How a dataset's rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DatasetFormat {
    /// Decide by the first row.
    Auto,
    /// `{"messages": [{"role", "content"}]}`
    Chat,
    /// `{"prompt", "completion"}`
    PromptCompletion,
    /// `{"text"}`
    Text,
}

/// Fine-tune `base` on `dataset` and write the result to `output`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainTask {
    /// Counts from 1; a resumed or replaced Job has the next number.
    pub attempt: i32,
    /// [`Identity::inputs`](crate::Identity::inputs) that the result will bear: files that give another one are not those
    /// that were checked. Absent where the base's digest is not known beforehand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<String>,
    /// Model to start from.
    pub base: ModelInput,
    /// Rows to learn from and to measure with.
    pub dataset: DatasetInput,
    /// What is changed.
    pub method: TrainMethod,
    /// How it is changed.
    pub training: TrainingSettings,
    /// How progress is kept.
    pub checkpoint: CheckpointPolicy,
    /// What is measured before and after.
    pub evaluation: EvaluationPolicy,
    /// Where the result goes.
    pub output: OutputTarget,
}

/// What training changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TrainMethod {
    /// Every weight.
    Full {},
    /// Low-rank adapters beside frozen weights (<https://arxiv.org/abs/2106.09685>).
    Lora(LoraSettings),
}

/// Shape of the adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoraSettings {
    /// Rank r.
    pub rank: i32,
    /// Scale: the update is `alpha / rank * B A`.
    pub alpha: i32,
    /// Share of an adapter's inputs that is dropped (0 to below 1).
    pub dropout: f64,
    /// PEFT module names, e.g. `q_proj`; `AllLinear` is resolved before it comes here.
    pub targets: Vec<String>,
    /// Precision in which the frozen base is held.
    pub base_precision: Precision,
}

/// Precision of stored numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Precision {
    /// 32-bit IEEE 754.
    Float32,
    /// bfloat16.
    BFloat16,
    /// 8-bit integers with a scale for each group of 128; for serving.
    Int8,
    /// 4-bit integers with a scale for each group of 128; for serving.
    Int4,
}

/// Hyper-parameters, every default already filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainingSettings {
    /// Passes over the rows; exactly one of `epochs` and `steps` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Optimizer steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<i64>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Course of the learning rate.
    pub schedule: Schedule,
    /// Share of all steps in which the rate rises from zero (0 to 1).
    pub warmup: f64,
    /// Tokens in one optimizer step, at most (rows are never split).
    pub batch_tokens: i64,
    /// Tokens in one forward and backward pass, at most.
    pub micro_batch_tokens: i64,
    /// How the optimizer's moments are held. `Float32` is not written: so a run has the identity that it had when there
    /// was nothing else.
    #[serde(default, skip_serializing_if = "OptimizerState::is_float32")]
    pub optimizer_state: OptimizerState,
    /// Tokens of a row, at most; a longer text is split into rows, a longer conversation is cut and counted.
    pub sequence_length: i64,
    /// Decoupled weight decay of AdamW (<https://arxiv.org/abs/1711.05101>).
    pub weight_decay: f64,
    /// Norm to which the gradient is clipped; 0 = never.
    pub max_grad_norm: f64,
    /// Seed of order, dropout and fresh adapters.
    pub seed: i64,
}

/// How AdamW's two moments are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OptimizerState {
    /// 32-bit IEEE 754.
    #[default]
    Float32,
    /// 8 bits with a scale for each block of 256 (<https://arxiv.org/abs/2110.02861>); where nothing else fits.
    Int8,
}

impl OptimizerState {
    fn is_float32(&self) -> bool {
        *self == OptimizerState::Float32
    }
}

/// Course of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Schedule {
    /// Stays at its peak.
    Constant,
    /// Falls to zero on a line.
    Linear,
    /// Falls to zero on half a cosine.
    Cosine,
}

/// How often and where training state is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckpointPolicy {
    /// Seconds between two checkpoints.
    pub interval_seconds: i64,
    /// Checkpoints that stay; older ones go.
    pub keep: i32,
    /// Folder of checkpoints (`pvc://`). Each run has its own below it, named by the hash of its settings.
    pub destination: SourceRef,
}

/// What is measured, and what must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EvaluationPolicy {
    /// Metrics before and after.
    pub metrics: Vec<Metric>,
    /// Conditions on them.
    #[serde(default)]
    pub gates: Vec<Gate>,
}

/// One enum for metrics everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Metric {
    /// exp of the mean negative log-likelihood of the answers' tokens; lower is better.
    Perplexity,
    /// Corpus BLEU, 13a tokenisation, 0 to 100 (sacreBLEU).
    BLEU,
    /// ROUGE-1 F1, 0 to 1.
    ROUGE1,
    /// ROUGE-2 F1, 0 to 1.
    ROUGE2,
    /// ROUGE-L F1, 0 to 1.
    ROUGEL,
}

impl Metric {
    /// True where a smaller value is the better one.
    #[must_use]
    pub fn lower_is_better(self) -> bool {
        matches!(self, Metric::Perplexity)
    }

    /// Name as written in manifests.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Metric::Perplexity => "Perplexity",
            Metric::BLEU => "BLEU",
            Metric::ROUGE1 => "ROUGE1",
            Metric::ROUGE2 => "ROUGE2",
            Metric::ROUGEL => "ROUGEL",
        }
    }
}

/// A condition that the tuned model must meet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Gate {
    /// What is compared.
    pub metric: Metric,
    /// Lowest allowed value after tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<f64>,
    /// Highest allowed value after tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<f64>,
    /// Least relative improvement over the base (0.1 = 10 % better, in the metric's own direction).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_improvement: Option<f64>,
}

/// Where an artefact goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutputTarget {
    /// Name of the `Model` that will be made.
    pub model_name: String,
    /// Folder below which results go: the artefact to `<model_name>/<hex digits of its digest>/`, its record
    /// (`summary.json`, `report.json`) to `<model_name>/jobs/<uid>/` and `<model_name>/inputs/<hash>/`.
    pub destination: SourceRef,
}

/// Serve one base model and its adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServeTask {
    /// Model id under which the base answers.
    pub model_id: String,
    /// The base.
    pub model: ModelInput,
    /// Adapters that are there from the start; the control port changes them.
    #[serde(default)]
    pub adapters: Vec<ServedAdapter>,
    /// Room for them, and for those that the control port adds.
    #[serde(default)]
    pub adapter_room: AdapterRoom,
    /// Precision of the weights in memory.
    pub weights: Precision,
    /// Longest prompt plus answer, in tokens.
    pub context_length: i64,
    /// Sequences that are decoded at the same time.
    pub max_sequences: i32,
    /// Requests that may wait; one more is refused with 429.
    pub max_waiting: i32,
    /// Tokens of key-value cache.
    pub cache_tokens: i64,
    /// True: anyone in the cluster may ask; false: only requests that the gateway signed.
    pub direct: bool,
    /// Seconds to go on answering after SIGTERM.
    pub drain_seconds: i64,
}

/// How many adapters a worker holds, and how large one may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AdapterRoom {
    /// Adapters.
    pub slots: i32,
    /// Largest rank.
    pub rank: i32,
}

impl Default for AdapterRoom {
    fn default() -> Self {
        Self { slots: 4, rank: 32 }
    }
}

/// An adapter and the id under which it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServedAdapter {
    /// Model id.
    pub model_id: String,
    /// Its files.
    pub model: ModelInput,
}

/// Measure a model without changing it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EvaluateTask {
    /// The base.
    pub base: ModelInput,
    /// An adapter on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<ModelInput>,
    /// Rows to measure with (`evaluation`, or the holdout of `train`).
    pub dataset: DatasetInput,
    /// What is measured.
    pub metrics: Vec<Metric>,
    /// Tokens of a row, at most.
    pub sequence_length: i64,
}

/// Read a model's headers: no weights are fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InspectTask {
    /// The model's files, or with `summary_of` the folder `<destination>/<model_name>` of that job's output.
    pub source: SourceRef,
    /// UID of a FineTuneJob whose summary is repeated from the report beside its artefact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary_of: Option<String>,
}

/// Check a dataset before an accelerator is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckDataTask {
    /// The rows.
    pub dataset: DatasetInput,
    /// The model whose tokenizer and template count the tokens.
    pub model: ModelInput,
    /// Tokens of a row, at most.
    pub sequence_length: i64,
    /// What the held-out rows must be able to tell.
    #[serde(default)]
    pub evaluation: EvaluationPolicy,
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::{AdapterState, DesiredAdapters, Report};

    fn adapters() -> Value {
        let inspected = json!({"fingerprint": "f", "weightsDigest": "w"});
        json!([{"modelId": "tuned", "model": {"name": "tuned", "source": {"uri": "pvc://a/b"}, "inspected": inspected}}])
    }

    fn contract() -> Value {
        json!({
            "version": CONTRACT_VERSION, "trust": {}, "mounts": {"claims": {}, "cache": "/c"},
            "object": {"kind": "InferenceService", "namespace": "n", "name": "s", "uid": "u"},
            "task": {"serve": {"modelId": "base", "model": {"name": "base", "source": {"uri": "pvc://a/b"}},
                "adapters": adapters(), "adapterRoom": {"slots": 1, "rank": 8}, "weights": "BFloat16", "contextLength": 8,
                "maxSequences": 1, "maxWaiting": 1, "cacheTokens": 8, "direct": true, "drainSeconds": 1}},
        })
    }

    /// `value` with a field of a later release at a pointer.
    fn newer(mut value: Value, pointer: &str) -> Value {
        value.pointer_mut(pointer).expect("there")["ofALaterRelease"] = json!(true);
        value
    }

    #[rstest]
    #[case::set("")]
    #[case::adapter("/adapters/0")]
    #[case::model("/adapters/0/model")]
    #[case::source("/adapters/0/model/source")]
    #[case::inspected("/adapters/0/model/inspected")]
    fn a_worker_understands_the_adapters_of_a_later_operator(#[case] pointer: &str) {
        let said = json!({"adapters": adapters()});
        let read = |value: Value| serde_json::from_value::<DesiredAdapters>(value).expect("understood");
        assert_eq!(read(newer(said.clone(), pointer)), read(said));
    }

    #[rstest]
    #[case::contract("", false)]
    #[case::mounts("/mounts", false)]
    #[case::trust("/trust", false)]
    #[case::task("/task/serve", false)]
    #[case::room("/task/serve/adapterRoom", false)]
    // A later operator writes them into the contract that the pods have.
    #[case::adapter("/task/serve/adapters/0", true)]
    #[case::adapters_source("/task/serve/adapters/0/model/source", true)]
    fn a_contract_says_nothing_that_its_worker_does_not_know(
        #[case] pointer: &str,
        #[case] understood: bool,
    ) {
        let read = |value: Value| serde_json::from_value::<Contract>(value);
        let plain = read(contract()).expect("understood");
        let found = read(newer(contract(), pointer));
        assert_eq!(found.is_ok(), understood, "{found:?}");
        assert!(found.is_err() || found.is_ok_and(|found| found == plain));
    }

    #[test]
    fn an_operator_understands_the_adapters_of_a_later_worker() {
        let entry = json!({"modelId": "tuned", "state": "Ready", "ofALaterRelease": true});
        let report =
            json!({"adapters": {"adapters": [entry], "ofALaterRelease": true}, "ofALaterRelease": true});
        let report = Report::parse(report.to_string().as_bytes()).expect("understood");
        assert_eq!(report.adapters.adapters[0].state, AdapterState::Ready);
    }
}
