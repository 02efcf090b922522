//! PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use lathe_plan::{LoraSpec, ModelShape, Target};
use serde_json::{Value, json};

use super::atomic::write_atomically;
use super::error::{FileError, bounded, read_bounded};
use super::fields::{Fields, parse_json};
use super::safetensors::SafetensorsFile;
use super::weights::refuse_pickle;
use super::write::{TensorLayout, write_safetensors};
use crate::{Adapter, NamedTensor};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const MAX_BYTES: u64 = 1 << 20;

/// What `adapter_config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank, scale and targets. Where the file has `use_rslora`, whose scale is alpha / sqrt(rank), `alpha` here is
    /// alpha * sqrt(rank), so that alpha / rank is the same scale.
    pub lora: LoraSpec,
    /// `base_model_name_or_path`: which model the adapter belongs to, in the words of who wrote it.
    pub base: Option<String>,
}

/// Options of PEFT that change what an adapter computes and that this engine does not have.
const UNSUPPORTED: &[&str] = &[
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "auto_mapping",
    "kasa_config",
    "monteclora_config",
];

impl AdapterConfig {
    /// Parses `adapter_config.json`.
    ///
    /// # Errors
    /// A value out of bounds, or an option of PEFT that is not supported, by its name.
    pub fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        bounded(CONFIG, bytes, MAX_BYTES)?;
        let value = parse_json(CONFIG, bytes)?;
        let fields = Fields::new(CONFIG, &value)?;
        if fields.text("peft_type")? != Some("LORA") {
            return Err(fields.unsupported("peft_type", "the supported type is LORA"));
        }
        if fields.text("bias")?.is_some_and(|bias| bias != "none") {
            return Err(fields.unsupported("bias", "it must be \"none\""));
        }
        for name in UNSUPPORTED {
            if fields.get(name).is_some_and(used) {
                return Err(fields.unsupported(name, "leave it out when the adapter is made"));
            }
        }
        let rank = fields.required_integer("r", 1..=1024)?;
        let alpha = fields.required_number("lora_alpha", 1e-6..=1e6)? as f32;
        let alpha = if fields.flag("use_rslora")? { alpha * (rank as f32).sqrt() } else { alpha };
        let dropout = fields.number("lora_dropout", 0.0..=0.999)?.unwrap_or(0.0) as f32;
        let lora = LoraSpec { rank, alpha, dropout, targets: targets(&fields)? };
        lora.validate().map_err(|error| FileError::malformed(CONFIG, error.to_string()))?;
        Ok(AdapterConfig { lora, base: fields.text("base_model_name_or_path")?.map(str::to_owned) })
    }

    /// The text of `adapter_config.json`, as PEFT reads it.
    pub fn to_json(&self) -> String {
        let names: Vec<_> = self.lora.targets.iter().map(|target| target.name()).collect();
        let value = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.lora.rank,
            "lora_alpha": whole(self.lora.alpha),
            "lora_dropout": self.lora.dropout,
            "target_modules": names,
            "bias": "none",
            "use_rslora": false,
            "use_dora": false,
            "fan_in_fan_out": false,
            "modules_to_save": null,
            "inference_mode": true,
        });
        format!("{value:#}\n")
    }
}

/// PEFT writes every option; false, null and empty ones are off.
fn used(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Number(_) | Value::String(_) => true,
    }
}

/// PEFT's alpha is an integer where it can be.
fn whole(alpha: f32) -> Value {
    if alpha.fract() == 0.0 { json!(alpha as i64) } else { json!(alpha) }
}

fn targets(fields: &Fields) -> Result<BTreeSet<Target>, FileError> {
    let all = Target::ALL.map(Target::name).join(", ");
    let allowed = format!("a list of {all}, or \"all-linear\"");
    if fields.get("target_modules").and_then(Value::as_str) == Some("all-linear") {
        return Ok(Target::ALL.into_iter().collect());
    }
    let list = fields.get("target_modules").and_then(Value::as_array).filter(|list| !list.is_empty());
    let target = |name: &Value| Target::from_name(name.as_str()?);
    list.and_then(|list| list.iter().map(target).collect())
        .ok_or_else(|| fields.wrong("target_modules", allowed))
}

/// Reads an adapter's folder and checks every tensor against the base model's shape.
///
/// # Errors
/// [`FileError::Pickle`] where the weights are a pickle alone; an option that is not supported; a tensor that is missing,
/// left over, or of another shape than the base demands (the adapter of another model).
pub fn read_adapter(dir: &Path, base: &ModelShape) -> Result<(AdapterConfig, Adapter), FileError> {
    let config = AdapterConfig::parse(&read_bounded(&dir.join(CONFIG), MAX_BYTES)?)?;
    let path = dir.join(WEIGHTS);
    if !path.exists() {
        refuse_pickle(dir)?;
    }
    let file = SafetensorsFile::open(&path)?;
    let adapter = Adapter::load(base, &config.lora, &file)?;
    let known: BTreeSet<String> = adapter.tensors().into_iter().map(|tensor| tensor.name).collect();
    if let Some(name) = file.header().tensors.keys().find(|name| !known.contains(*name)) {
        let problem = format!(
            "tensor `{}` belongs to no target of {CONFIG} in this base model; the adapter is of another model",
            name.escape_debug()
        );
        return Err(FileError::malformed(WEIGHTS, problem));
    }
    Ok((config, adapter))
}

/// Writes an adapter's two files into a folder that is there already; PEFT and [`read_adapter`] load them. `base` goes
/// into `base_model_name_or_path`, `metadata` into the header of the weights.
///
/// # Errors
/// [`FileError::Io`].
pub fn write_adapter(
    dir: &Path,
    adapter: &Adapter,
    base: Option<&str>,
    metadata: &BTreeMap<String, String>,
) -> Result<(), FileError> {
    let tensors: BTreeMap<String, NamedTensor> =
        adapter.tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    let layouts: Vec<TensorLayout> = tensors
        .values()
        .map(|tensor| TensorLayout {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        })
        .collect();
    write_safetensors(&dir.join(WEIGHTS), &layouts, metadata, |layout| {
        Ok(tensors[&layout.name].data.clone())
    })?;
    let config = AdapterConfig { lora: adapter.spec().clone(), base: base.map(str::to_owned) };
    let path = dir.join(CONFIG);
    write_atomically(&path, |writer| {
        writer.write_all(config.to_json().as_bytes()).map_err(FileError::io("write", &path))
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn config() -> Value {
        json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]})
    }

    fn parse(value: &Value) -> Result<AdapterConfig, FileError> {
        AdapterConfig::parse(value.to_string().as_bytes())
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut value = config();
        value["lora_dropout"] = json!(0.125);
        value["base_model_name_or_path"] = json!("org/base");
        let read = parse(&value).unwrap();
        assert_eq!(read.lora.targets, [Target::Q, Target::Down].into());
        assert_eq!(AdapterConfig::parse(read.to_json().as_bytes()).unwrap(), read);
    }

    #[test]
    fn rslora_scales_by_the_root_of_the_rank() {
        let mut value = config();
        value["use_rslora"] = json!(true);
        assert_eq!(parse(&value).unwrap().lora.scale(), 8.0 / 2.0);
    }

    #[rstest]
    #[case("peft_type", json!("IA3"), "`peft_type`: \"IA3\" is not supported")]
    #[case("use_dora", json!(true), "`use_dora`: true is not supported")]
    #[case("modules_to_save", json!(["lm_head"]), "`modules_to_save`: [\"lm_head\"] is not supported")]
    #[case("rank_pattern", json!({"q_proj": 2}), "`rank_pattern`")]
    #[case("bias", json!("all"), "`bias`: \"all\" is not supported")]
    #[case("r", json!(0), "`r` must be an integer from 1 to 1024 (found 0)")]
    #[case("target_modules", json!([]), "`target_modules` must be a list of q_proj")]
    #[case("target_modules", json!(["c_attn"]), "`target_modules` must be a list of q_proj")]
    #[case("target_modules", json!(".*proj"), "`target_modules` must be a list of q_proj")]
    fn what_is_not_supported_is_named(#[case] field: &str, #[case] value: Value, #[case] says: &str) {
        let mut config = config();
        config[field] = value;
        let error = parse(&config).unwrap_err().to_string();
        assert!(error.starts_with("adapter_config.json: ") && error.contains(says), "{error}");
    }
}
