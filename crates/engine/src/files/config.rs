//! `config.json` and `generation_config.json` to a typed, bounded [`ModelConfig`].

use std::path::Path;

use lathe_plan::{ModelShape, RopeScaling};
use serde_json::Value;

use super::error::{FileError, bounded, read_bounded};
use super::fields::{Fields, parse_json};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const MAX_BYTES: u64 = 1 << 20;
const SUPPORTED: &str =
    "supported architectures are LlamaForCausalLM, Qwen2ForCausalLM and MistralForCausalLM";

/// What is known of a model before its weights are read.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family, i.e. the class that `architectures` names.
    pub family: Family,
    /// Dimensions and switches.
    pub shape: ModelShape,
    /// Tokens that end an answer, from `generation_config.json` or else `config.json`; may be empty.
    pub eos: Vec<u32>,
    /// The token that begins a text, where there is one.
    pub bos: Option<u32>,
}

/// A family of models: a set of switches over one decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: biases on query, key and value.
    Qwen2,
    /// `MistralForCausalLM`: a sliding window in every block.
    Mistral,
}

impl Family {
    /// The name in `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Mistral => "MistralForCausalLM",
        }
    }
}

impl ModelConfig {
    /// Reads `config.json` and, where it is there, `generation_config.json` of a model's folder.
    ///
    /// # Errors
    /// A file that is missing or malformed, a value out of bounds, an architecture that is not supported.
    pub fn read(dir: &Path) -> Result<Self, FileError> {
        let config = read_bounded(&dir.join(CONFIG), MAX_BYTES)?;
        let generation = match read_bounded(&dir.join(GENERATION), MAX_BYTES) {
            Ok(bytes) => Some(bytes),
            Err(FileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Self::parse(&config, generation.as_deref())
    }

    /// Parses the text of `config.json` and `generation_config.json`. Code that a repository brings (`auto_map`) is
    /// never run: a known architecture is this engine's own, an unknown one is refused.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn parse(config: &[u8], generation: Option<&[u8]>) -> Result<Self, FileError> {
        bounded(CONFIG, config, MAX_BYTES)?;
        bounded(GENERATION, generation.unwrap_or_default(), MAX_BYTES)?;
        let value = parse_json(CONFIG, config)?;
        let fields = Fields::new(CONFIG, &value)?;
        let family = family(&fields)?;
        let shape = shape(&fields, family)?;
        let generation = generation.map(|bytes| parse_json(GENERATION, bytes)).transpose()?;
        let generation = generation.as_ref().map(|value| Fields::new(GENERATION, value)).transpose()?;
        let mut eos = generation
            .as_ref()
            .map(|g| tokens(g, "eos_token_id", shape.vocab))
            .transpose()?
            .unwrap_or_default();
        if eos.is_empty() {
            eos = tokens(&fields, "eos_token_id", shape.vocab)?;
        }
        let bos = tokens(&fields, "bos_token_id", shape.vocab)?.first().copied();
        Ok(ModelConfig { family, shape, eos, bos })
    }
}

fn family(fields: &Fields) -> Result<Family, FileError> {
    let architectures =
        fields.list("architectures")?.ok_or_else(|| fields.wrong("architectures", "a list with one name"))?;
    let [Value::String(name)] = architectures else {
        return Err(fields.wrong("architectures", "a list with one name"));
    };
    let all = [Family::Llama, Family::Qwen2, Family::Mistral];
    all.into_iter().find(|family| family.architecture() == name).ok_or_else(|| {
        let name: String = name.chars().take(60).collect();
        let code = if fields.get("auto_map").is_some() {
            ", and its own code (`auto_map`) is never run"
        } else {
            ""
        };
        FileError::Unsupported {
            file: CONFIG.to_owned(),
            what: format!("architecture {name}"),
            supported: format!("{SUPPORTED}{code}"),
        }
    })
}

fn shape(fields: &Fields, family: Family) -> Result<ModelShape, FileError> {
    let sliding_window = match family {
        // As transformers has it where the file says nothing; `null` is no window.
        Family::Mistral if !fields.has("sliding_window") => Some(4096),
        Family::Mistral => fields.integer("sliding_window", 1..=1 << 24)?,
        Family::Llama | Family::Qwen2 => None,
    };
    refuse_unknown_switches(fields, family, sliding_window)?;
    let hidden = fields.required_integer("hidden_size", 1..=1 << 17)?;
    let heads = fields.required_integer("num_attention_heads", 1..=1 << 10)?;
    let kv_heads = fields.integer("num_key_value_heads", 1..=1 << 10)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(
            fields.wrong("num_key_value_heads", format!("a divisor of `num_attention_heads` ({heads})"))
        );
    }
    let head_dim = match fields.integer("head_dim", 2..=256)? {
        Some(width) => width,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(fields.wrong("hidden_size", format!("a multiple of `num_attention_heads` ({heads})")));
        }
    };
    let (rope_theta, rope_scaling) = rope(fields)?;
    let shape = ModelShape {
        vocab: fields.required_integer("vocab_size", 1..=1 << 24)?,
        hidden,
        layers: fields.required_integer("num_hidden_layers", 1..=1 << 10)?,
        heads,
        kv_heads,
        head_dim,
        intermediate: fields.required_integer("intermediate_size", 1..=1 << 20)?,
        max_position: fields.required_integer("max_position_embeddings", 1..=1 << 24)?,
        rope_theta,
        rope_scaling,
        sliding_window,
        rms_eps: fields.required_number("rms_norm_eps", 1e-12..=1.0)?,
        qkv_bias: family == Family::Qwen2,
        tie_embeddings: fields.flag("tie_word_embeddings")?,
    };
    shape.validate().map_err(|error| FileError::malformed(CONFIG, error.to_string()))?;
    Ok(shape)
}

/// A switch that we do not know would silently give wrong numbers.
fn refuse_unknown_switches(
    fields: &Fields,
    family: Family,
    sliding_window: Option<usize>,
) -> Result<(), FileError> {
    if fields.text("hidden_act")?.is_some_and(|name| name != "silu") {
        return Err(fields.unsupported("hidden_act", "the supported activation is silu"));
    }
    let switches: &[&str] = match family {
        Family::Llama => &["attention_bias", "mlp_bias"],
        Family::Qwen2 => &["use_sliding_window"],
        Family::Mistral => &[],
    };
    for name in switches {
        if fields.flag(name)? {
            return Err(fields.unsupported(name, "it must be false"));
        }
    }
    let attention = if sliding_window.is_some() { "sliding_attention" } else { "full_attention" };
    for kind in fields.list("layer_types")?.unwrap_or_default() {
        if kind.as_str() != Some(attention) {
            return Err(fields.unsupported("layer_types", &format!("every layer must be {attention}")));
        }
    }
    if fields.get("quantization_config").is_some() {
        return Err(fields.unsupported("quantization_config", "use the model's unquantized weights"));
    }
    Ok(())
}

/// Rotary settings: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).
fn rope(fields: &Fields) -> Result<(f64, RopeScaling), FileError> {
    const THETA: std::ops::RangeInclusive<f64> = 1.0..=1e12;
    let new = fields.object("rope_parameters")?;
    let old = fields.object("rope_scaling")?;
    let theta = match &new {
        Some(parameters) => parameters.number("rope_theta", THETA)?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => fields.number("rope_theta", THETA)?.unwrap_or(10_000.0),
    };
    let Some(scaling) = new.or(old) else { return Ok((theta, RopeScaling::None)) };
    if scaling.number("partial_rotary_factor", 0.0..=1.0)?.is_some_and(|part| part != 1.0) {
        return Err(scaling.unsupported("partial_rotary_factor", "it must be 1"));
    }
    let key = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    let factor = || scaling.required_number("factor", 1.0..=1e6);
    let kind = match scaling.text(key)?.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: scaling.required_number("low_freq_factor", 1e-3..=1e6)?,
            high_freq_factor: scaling.required_number("high_freq_factor", 1e-3..=1e6)?,
            original_max_position: scaling
                .required_integer("original_max_position_embeddings", 1..=1 << 24)?,
        },
        _ => return Err(scaling.unsupported(key, "supported are default, linear and llama3")),
    };
    Ok((theta, kind))
}

/// A token id, a list of ids, or nothing.
fn tokens(fields: &Fields, name: &str, vocab: usize) -> Result<Vec<u32>, FileError> {
    let Some(value) = fields.get(name) else { return Ok(Vec::new()) };
    let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let id = |id: &Value| id.as_u64().filter(|&id| id < vocab as u64).and_then(|id| u32::try_from(id).ok());
    match ids.iter().map(id).collect::<Option<Vec<u32>>>() {
        Some(ids) if ids.len() <= 64 => Ok(ids),
        _ => {
            Err(fields.wrong(name, format!("a token below `vocab_size` ({vocab}), or a list of at most 64")))
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 100, "num_hidden_layers": 2, "intermediate_size": 96,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "eos_token_id": 2, "bos_token_id": 1
        })
    }

    fn parse(value: &Value, generation: Option<Value>) -> Result<ModelConfig, FileError> {
        let generation = generation.map(|g| g.to_string());
        ModelConfig::parse(value.to_string().as_bytes(), generation.as_ref().map(String::as_bytes))
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = parse(&llama(), None).unwrap();
        assert_eq!((config.shape.head_dim, config.shape.rope_theta), (16, 10_000.0));
        assert_eq!((config.eos, config.bos), (vec![2], Some(1)));
        assert!(!config.shape.tie_embeddings && !config.shape.qkv_bias);
    }

    #[test]
    fn generation_config_says_what_ends_an_answer() {
        let config = parse(&llama(), Some(json!({"eos_token_id": [7, 8]}))).unwrap();
        assert_eq!(config.eos, [7, 8]);
        assert_eq!(parse(&llama(), Some(json!({}))).unwrap().eos, [2]);
    }

    #[test]
    fn rope_is_read_in_its_old_and_new_place() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32});
        let mut old = llama();
        old["rope_theta"] = json!(500_000);
        old["rope_scaling"] = llama3.clone();
        let mut new = llama();
        new["rope_parameters"] = llama3;
        new["rope_parameters"]["rope_theta"] = json!(500_000.0);
        let (old, new) = (parse(&old, None).unwrap(), parse(&new, None).unwrap());
        assert_eq!(old, new);
        assert_eq!(old.shape.rope_theta, 500_000.0);
        assert!(matches!(old.shape.rope_scaling, RopeScaling::Llama3 { original_max_position: 32, .. }));
    }

    #[rstest]
    #[case("architectures", json!(["MambaForCausalLM"]), "architecture MambaForCausalLM is not supported; supported architectures are LlamaForCausalLM, Qwen2ForCausalLM and MistralForCausalLM")]
    #[case("architectures", json!("LlamaForCausalLM"), "`architectures` must be a list")]
    #[case("hidden_size", json!(-1), "`hidden_size` must be an integer from 1 to 131072 (found -1)")]
    #[case("hidden_size", json!("64"), "`hidden_size` must be an integer from 1 to 131072 (found \"64\")")]
    #[case("vocab_size", json!(1u64 << 40), "`vocab_size` must be an integer")]
    #[case("vocab_size", Value::Null, "`vocab_size` must be an integer from 1 to 16777216 (found nothing)")]
    #[case("num_key_value_heads", json!(3), "`num_key_value_heads` must be a divisor of `num_attention_heads` (4)")]
    #[case("num_attention_heads", json!(6), "`hidden_size` must be a multiple of `num_attention_heads` (6)")]
    #[case("head_dim", json!(15), "`head_dim` must be even")]
    #[case("rms_norm_eps", json!(-1e-6), "`rms_norm_eps` must be a number")]
    #[case("attention_bias", json!(true), "`attention_bias`: true is not supported")]
    #[case("hidden_act", json!("gelu"), "`hidden_act`: \"gelu\" is not supported")]
    #[case("rope_scaling", json!({"rope_type": "yarn", "factor": 4}), "`rope_scaling.rope_type`: \"yarn\" is not supported")]
    #[case("rope_scaling", json!({"type": "linear"}), "`rope_scaling.factor` must be a number")]
    #[case("layer_types", json!(["full_attention", "sliding_attention"]), "every layer must be full_attention")]
    #[case("eos_token_id", json!(100), "`eos_token_id` must be a token below `vocab_size` (100)")]
    #[case("quantization_config", json!({"bits": 4}), "use the model's unquantized weights")]
    fn a_wrong_field_is_named(#[case] field: &str, #[case] value: Value, #[case] says: &str) {
        let mut config = llama();
        if field == "num_attention_heads" {
            config["num_key_value_heads"] = json!(2);
        }
        config[field] = value;
        let error = parse(&config, None).unwrap_err().to_string();
        assert!(error.starts_with("config.json: ") && error.contains(says), "{error}");
    }

    #[test]
    fn a_window_is_mistrals() {
        let mut config = llama();
        config["sliding_window"] = json!(7);
        assert_eq!(parse(&config, None).unwrap().shape.sliding_window, None);
        let mut without = llama();
        for config in [&mut config, &mut without] {
            config["architectures"] = json!(["MistralForCausalLM"]);
        }
        assert_eq!(parse(&without, None).unwrap().shape.sliding_window, Some(4096));
        assert_eq!(parse(&config, None).unwrap().shape.sliding_window, Some(7));
        config["layer_types"] = json!(["full_attention", "full_attention"]);
        let error = parse(&config, None).unwrap_err().to_string();
        assert!(error.contains("every layer must be sliding_attention"), "{error}");
        config["sliding_window"] = json!(null);
        assert_eq!(parse(&config, None).unwrap().shape.sliding_window, None);
        config["sliding_window"] = json!(0);
        let error = parse(&config, None).unwrap_err().to_string();
        assert!(
            error.contains("`sliding_window` must be an integer from 1 to 16777216 (found 0)"),
            "{error}"
        );
    }

    #[test]
    fn code_of_a_repository_is_not_run() {
        let mut config = llama();
        config["architectures"] = json!(["EvilModel"]);
        config["auto_map"] = json!({"AutoModelForCausalLM": "evil.EvilModel"});
        assert!(
            parse(&config, None).unwrap_err().to_string().contains("its own code (`auto_map`) is never run")
        );
    }

    #[test]
    fn what_is_no_json_object_is_refused() {
        for bytes in [&b""[..], b"[]", b"{\"a\":", b"\xff\xfe{}", b"\x80\x02}"] {
            assert!(ModelConfig::parse(bytes, None).is_err());
        }
    }
}
