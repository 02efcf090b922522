//! The models that are measured: the committed demo model, and those of random weights in real ones' shapes.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use lathe_plan::{ModelShape, RopeScaling, Tensor, TensorKind};
use serde_json::{Map, Value, json};

use crate::paths;

/// A model on disk.
pub struct Model {
    /// As tables call it.
    pub name: &'static str,
    /// Hugging Face layout.
    pub folder: PathBuf,
    /// Its dimensions.
    pub shape: ModelShape,
}

/// The committed one.
///
/// # Errors
/// Its `config.json` lacks something.
pub fn demo() -> Result<Model> {
    let folder = paths::quickstart_volume().join("model");
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
    let number = |name: &str| {
        config[name]
            .as_u64()
            .map(|n| n as usize)
            .with_context(|| format!("the demo model's config.json has no {name}"))
    };
    let real = |name: &str| {
        config[name].as_f64().with_context(|| format!("the demo model's config.json has no {name}"))
    };
    let shape = ModelShape {
        vocab: number("vocab_size")?,
        hidden: number("hidden_size")?,
        layers: number("num_hidden_layers")?,
        heads: number("num_attention_heads")?,
        kv_heads: number("num_key_value_heads")?,
        head_dim: number("head_dim")?,
        intermediate: number("intermediate_size")?,
        max_position: number("max_position_embeddings")?,
        rope_theta: real("rope_theta")?,
        rope_scaling: RopeScaling::None,
        rms_eps: real("rms_norm_eps")?,
        sliding_window: None,
        qkv_bias: false,
        tie_embeddings: config["tie_word_embeddings"] == true,
    };
    Ok(Model { name: "demo", folder, shape })
}

/// The shape of Qwen2.5-0.5B: 494 M parameters, a large vocabulary, few key and value heads.
pub fn q05() -> ModelShape {
    ModelShape {
        vocab: 151_936,
        hidden: 896,
        layers: 24,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        intermediate: 4864,
        max_position: 32_768,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::None,
        rms_eps: 1e-6,
        sliding_window: None,
        qkv_bias: true,
        tie_embeddings: true,
    }
}

/// The shape of Llama-3.2-1B: 1236 M parameters, stretched rotary frequencies.
pub fn l1b() -> ModelShape {
    ModelShape {
        vocab: 128_256,
        hidden: 2048,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        intermediate: 8192,
        max_position: 131_072,
        rope_theta: 5e5,
        rope_scaling: RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        },
        rms_eps: 1e-5,
        sliding_window: None,
        qkv_bias: false,
        tie_embeddings: true,
    }
}

/// Writes a bf16 model of random weights in that shape, with a tokenizer of as many entries.
///
/// # Errors
/// The folder cannot be written.
pub fn random(name: &'static str, shape: ModelShape, folder: &Path) -> Result<Model> {
    let model = Model { name, folder: folder.to_path_buf(), shape };
    let shape = &model.shape;
    // Made last: with it the model is whole.
    let made = folder.join("made");
    if made.is_file() {
        return Ok(model);
    }
    fs::create_dir_all(folder)?;
    let json = |name: &str, value: &Value| -> Result<()> {
        Ok(fs::write(folder.join(name), serde_json::to_vec(value)?)?)
    };
    json("config.json", &config(shape))?;
    json("generation_config.json", &json!({"eos_token_id": 1, "pad_token_id": 0}))?;
    let demo = paths::quickstart_volume().join("model");
    let read = |name: &str| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(demo.join(name))?)?) };
    let mut about = read("tokenizer_config.json")?;
    about["model_max_length"] = shape.max_position.into();
    json("tokenizer_config.json", &about)?;
    let mut tokenizer = read("tokenizer.json")?;
    enlarge(&mut tokenizer, shape.vocab)?;
    json("tokenizer.json", &tokenizer)?;
    weights(&folder.join("model.safetensors"), &shape.tensors())?;
    fs::write(made, "")?;
    Ok(model)
}

/// Gives a byte-level BPE tokenizer as many entries as a real one has, so that reading it takes as long: merges of its own
/// entries of two letters each with a further letter, then of what these made. All of them are plain letters.
fn enlarge(tokenizer: &mut Value, entries: usize) -> Result<()> {
    let model = &mut tokenizer["model"];
    let lacking = "the demo model's tokenizer.json has no vocabulary or merges";
    let vocab = model["vocab"].as_object().context(lacking)?;
    let mut vocab: Map<String, Value> = vocab.clone();
    let mut merges = model["merges"].as_array().context(lacking)?.clone();
    let letters: Vec<String> = ('a'..='z').chain('A'..='Z').chain('0'..='9').map(String::from).collect();
    let mut stems = letters.clone();
    'full: loop {
        let mut longer = Vec::with_capacity(stems.len() * letters.len());
        for stem in &stems {
            for letter in &letters {
                if vocab.len() == entries {
                    break 'full;
                }
                let word = format!("{stem}{letter}");
                if !vocab.contains_key(&word) {
                    vocab.insert(word.clone(), vocab.len().into());
                    merges.push(json!([stem, letter]));
                }
                longer.push(word);
            }
        }
        stems = longer;
    }
    model["vocab"] = vocab.into();
    model["merges"] = merges.into();
    Ok(())
}

fn config(shape: &ModelShape) -> Value {
    // Qwen2 is the family with biases.
    let (architecture, family) =
        if shape.qkv_bias { ("Qwen2ForCausalLM", "qwen2") } else { ("LlamaForCausalLM", "llama") };
    let mut config = json!({
        "architectures": [architecture], "model_type": family, "dtype": "bfloat16", "hidden_act": "silu",
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "head_dim": shape.head_dim,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": shape.max_position,
        "rope_theta": shape.rope_theta, "rms_norm_eps": shape.rms_eps, "tie_word_embeddings": shape.tie_embeddings,
        "use_sliding_window": false, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    });
    if let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } =
        shape.rope_scaling
    {
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original_max_position,
        });
    }
    config
}

/// All tensors in bf16: norms are 1, all else is normal with a deviation of 0.02, from a fixed seed. The numbers repeat
/// after some millions, at another place in each tensor: products take as long with them as with others.
fn weights(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let bytes = |tensor: &Tensor| tensor.shape.iter().product::<usize>() * 2;
    let mut header = Map::new();
    let mut at = 0;
    for tensor in tensors {
        let end = at + bytes(tensor);
        let about = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [at, end]});
        header.insert(tensor.name.clone(), about);
        at = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let pool = pool();
    let ones = 0x3f80_u16.to_le_bytes().repeat(1 << 12);
    for (number, tensor) in tensors.iter().enumerate() {
        let norm =
            matches!(tensor.kind, TensorKind::AttentionNorm | TensorKind::MlpNorm | TensorKind::FinalNorm);
        let source = if norm { &ones } else { &pool };
        let mut begin = if norm { 0 } else { number * 7919 * 2 % source.len() };
        let mut left = bytes(tensor);
        while left > 0 {
            let piece = &source[begin..source.len().min(begin + left)];
            file.write_all(piece)?;
            left -= piece.len();
            begin = 0;
        }
    }
    Ok(file.into_inner()?.sync_all()?)
}

/// Normal bf16 numbers; their count is odd, so that rows of a tensor are not equal.
fn pool() -> Vec<u8> {
    const COUNT: usize = (1 << 21) + 1;
    let mut state = 0x1a7e_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    // The sum of 12 uniform numbers less 6 is close to normal. bf16 is the upper half of f32.
    let mut normal = || 0.02 * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0);
    (0..COUNT).flat_map(|_| ((normal().to_bits() >> 16) as u16).to_le_bytes()).collect()
}

/// Texts for training, each of them so many letters that it fills many rows of a training step.
pub fn corpus(path: &Path) -> Result<()> {
    const TEXTS: usize = 16;
    const LETTERS: usize = 32_000;
    let mut state = 7_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    let mut file = BufWriter::new(File::create(path)?);
    for _ in 0..TEXTS {
        // No merge of a trained tokenizer makes a token of more than a few random letters.
        let text: String = (0..LETTERS)
            .map(|_| if next().is_multiple_of(6) { ' ' } else { char::from(b'a' + (next() % 26) as u8) })
            .collect();
        writeln!(file, "{}", json!({ "text": text }))?;
    }
    Ok(file.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_random_weights_are_small_and_differ() {
        let pool = pool();
        let of =
            |at: usize| f32::from_bits(u32::from(u16::from_le_bytes([pool[2 * at], pool[2 * at + 1]])) << 16);
        let some: Vec<f32> = (0..10_000).map(of).collect();
        let mean = some.iter().sum::<f32>() / 1e4;
        let deviation = (some.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 1e4).sqrt();
        assert!(mean.abs() < 1e-3 && (deviation - 0.02).abs() < 1e-3, "{mean} {deviation}");
        assert_eq!(pool.len() / 2 % 2, 1);
    }

    #[test]
    fn a_tokenizer_has_as_many_entries_as_the_shape_and_a_merge_for_each_new_one() -> Result<()> {
        let file = paths::quickstart_volume().join("model/tokenizer.json");
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(file)?)?;
        let count = |tokenizer: &Value| tokenizer["model"]["merges"].as_array().map_or(0, Vec::len);
        let before = (tokenizer["model"]["vocab"].as_object().map_or(0, Map::len), count(&tokenizer));
        enlarge(&mut tokenizer, 128_256)?;
        let vocab = tokenizer["model"]["vocab"].as_object().context("a vocabulary")?;
        let mut ids: Vec<u64> = vocab.values().filter_map(Value::as_u64).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..128_256));
        assert_eq!(count(&tokenizer) - before.1, 128_256 - before.0);
        Ok(())
    }

    #[test]
    fn a_file_of_weights_begins_with_a_header_that_covers_it() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w");
        let small = ModelShape {
            vocab: 40,
            hidden: 16,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            intermediate: 24,
            ..q05()
        };
        weights(&path, &small.tensors())?;
        let file = fs::read(path)?;
        let length = u64::from_le_bytes(file[..8].try_into()?) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + length])?;
        let end = header.values().filter_map(|about| about["data_offsets"][1].as_u64()).max();
        assert_eq!(end, Some((file.len() - 8 - length) as u64));
        assert_eq!(header["model.norm.weight"]["shape"], json!([16]));
        Ok(())
    }
}
