//! What a model is, from its small files and the headers of its weights.
use std::collections::BTreeMap;

use lathe_contract::{InspectReport, InspectTask, ModelShapeReport, Outcome, Phase, SourceRef, WeightBytes};
use lathe_engine::files::{AdapterConfig, ChatTemplate, INDEX, ModelConfig, SINGLE, Tokenizer, parse_index};
use lathe_plan::ModelShape;
use lathe_source::{Headers, Tensor};

use crate::base::weights_digest;
use crate::context::Context;
use crate::failure::{Done, Halt};
use crate::train::record;

/// Licences whose publishers ask everyone to accept them first, by the beginning of their names.
const NEED_ACCEPTANCE: [&str; 8] =
    ["llama", "gemma", "mrl", "mnpl", "mistral-ai", "qwen-research", "tongyi-qianwen", "health-ai-developer"];

/// Reads a model's headers, or repeats a job's last words.
///
/// # Errors
/// The source cannot be read, or is no model that can be used.
pub fn run(context: &Context, task: &InspectTask) -> Done<Outcome> {
    if let Some(uid) = &task.summary_of {
        context.status.phase(Phase::Fetching, "looking for the job's report");
        return record::of_job(context, &task.source, uid);
    }
    context.status.phase(Phase::Fetching, format!("reading the headers of {}", task.source.uri));
    let mut report = inspect(context, &task.source)?;
    if report.fingerprint.is_empty() {
        hash(context, &task.source, &mut report)?;
    }
    Ok(Outcome::Inspected(report))
}

/// Files of a volume are hashed where they are, once: whoever reads them later sees by their fingerprint that they are the same.
fn hash(context: &Context, source: &SourceRef, report: &mut InspectReport) -> Done<()> {
    if !source.uri.starts_with("pvc://") {
        return Ok(());
    }
    let fetched = context.fetch("model", source)?;
    report.digest = fetched.digest.to_string();
    report.weights_digest = weights_digest(&fetched.files);
    report.fingerprint = context.fingerprint("model", source)?;
    Ok(())
}

/// What lies at a location.
///
/// # Errors
/// As [`run`].
pub fn inspect(context: &Context, source: &SourceRef) -> Done<InspectReport> {
    let headers = context.headers("model", source)?;
    let mut report = describe(&headers)?;
    if report.digest.is_empty() {
        hash(context, source, &mut report)?;
    }
    Ok(report)
}

fn describe(headers: &Headers) -> Done<InspectReport> {
    let weights = headers
        .bytes_by_dtype()
        .into_iter()
        .map(|(precision, bytes)| WeightBytes { precision, bytes: signed(bytes) })
        .collect();
    let license = headers.license.clone().unwrap_or_default();
    let mut report = InspectReport {
        parameters: signed(headers.parameters()),
        weights,
        digest: headers.digest.map(|digest| digest.to_string()).unwrap_or_default(),
        license_needs_acceptance: NEED_ACCEPTANCE.iter().any(|name| license.starts_with(name)),
        license,
        ..InspectReport::default()
    };
    if headers.weights.is_empty() {
        return Err(Halt::user(
            "MalformedModel",
            "there are no *.safetensors files",
            "put the weights there",
        ));
    }
    if let Some(adapter) = headers.small.get("adapter_config.json") {
        report.rank = AdapterConfig::parse(adapter)?.lora.rank as i64;
        report.architecture = "LoRA".to_owned();
        return Ok(report);
    }
    let config = ModelConfig::parse(
        small(&headers.small, "config.json")?,
        headers.small.get("generation_config.json").map(Vec::as_slice),
    )?;
    // What would only fail later, on an accelerator.
    Tokenizer::parse(small(&headers.small, "tokenizer.json")?, config.shape.vocab)?;
    let text = |name: &str| headers.small.get(name).map(Vec::as_slice);
    ChatTemplate::parse(text("tokenizer_config.json"), text("chat_template.jinja"))?;
    all_tensors(&config.shape, headers)?;
    report.architecture = config.family.architecture().to_owned();
    report.context_length = config.shape.max_position as i64;
    report.shape = shape_report(&config.shape);
    Ok(report)
}

/// A small file that must be there.
///
/// # Errors
/// It is not.
pub fn small<'a>(files: &'a BTreeMap<String, Vec<u8>>, name: &str) -> Done<&'a [u8]> {
    files.get(name).map(Vec::as_slice).ok_or_else(|| {
        Halt::user("MalformedModel", format!("{name} is missing"), "put all files of the model there")
    })
}

/// Every tensor that the configuration asks for is there in that shape, in the file where whoever loads the model looks.
fn all_tensors(shape: &ModelShape, headers: &Headers) -> Done<()> {
    let index = headers.small.get(INDEX).map(|text| parse_index(text)).transpose()?;
    let malformed = |problem: String| Halt::user("MalformedModel", problem, "replace the model's files");
    let of = |name: &str| -> Done<&Tensor> {
        let missing = || malformed(format!("tensor `{name}` is missing"));
        let (file, known) = match &index {
            None => (SINGLE, format!("and so is {INDEX}")),
            Some(index) => (index.get(name).ok_or_else(missing)?.as_str(), format!("which {INDEX} names")),
        };
        let gone = || malformed(format!("{file} is missing, {known}"));
        let tensors = headers.weights.get(file).ok_or_else(gone)?;
        tensors.get(name).ok_or_else(missing)
    };
    index.iter().flat_map(|index| index.keys()).try_for_each(|name| of(name).map(drop))?;
    for tensor in shape.tensors() {
        let (found, expected) = (of(&tensor.name)?, tensor.shape.iter().map(|&length| length as u64));
        let expected: Vec<u64> = expected.collect();
        if found.shape != expected {
            return Err(malformed(format!(
                "tensor `{}` must have shape {expected:?} (found {:?}): configuration and weights disagree",
                tensor.name, found.shape
            )));
        }
    }
    Ok(())
}

fn shape_report(shape: &ModelShape) -> ModelShapeReport {
    ModelShapeReport {
        vocab: shape.vocab as i64,
        hidden: shape.hidden as i64,
        layers: shape.layers as i64,
        heads: shape.heads as i64,
        kv_heads: shape.kv_heads as i64,
        head_dim: shape.head_dim as i64,
        intermediate: shape.intermediate as i64,
        tie_embeddings: shape.tie_embeddings,
        qkv_bias: shape.qkv_bias,
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
