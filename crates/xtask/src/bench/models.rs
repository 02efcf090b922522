//! The models that are measured: the committed demo model, and one of random weights in a real one's shape.

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

/// Writes a bf16 model of random weights in that shape. Its tokenizer is the demo model's, with a name for every further
/// entry of the vocabulary, so that every token that comes out is a text.
///
/// # Errors
/// The folder cannot be written.
pub fn random(folder: &Path) -> Result<Model> {
    let shape = q05();
    fs::create_dir_all(folder)?;
    let json = |name: &str, value: &Value| -> Result<()> {
        Ok(fs::write(folder.join(name), serde_json::to_vec(value)?)?)
    };
    json("config.json", &config(&shape))?;
    json("generation_config.json", &json!({"eos_token_id": 1, "pad_token_id": 0}))?;
    let demo = paths::quickstart_volume().join("model");
    fs::copy(demo.join("tokenizer_config.json"), folder.join("tokenizer_config.json"))?;
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(demo.join("tokenizer.json"))?)?;
    let vocab = tokenizer["model"]["vocab"]
        .as_object_mut()
        .context("the demo model's tokenizer.json has no vocabulary")?;
    let named = vocab.values().filter_map(Value::as_u64).max().map_or(0, |largest| largest as usize + 1);
    for id in named..shape.vocab {
        vocab.insert(format!("t{id}"), id.into());
    }
    json("tokenizer.json", &tokenizer)?;
    weights(&folder.join("model.safetensors"), &shape.tensors())?;
    Ok(Model { name: "Q05", folder: folder.to_path_buf(), shape })
}

fn config(shape: &ModelShape) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu",
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": shape.max_position,
        "rope_theta": shape.rope_theta, "rms_norm_eps": shape.rms_eps, "tie_word_embeddings": shape.tie_embeddings,
        "use_sliding_window": false, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    })
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
