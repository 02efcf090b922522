//! A model of random weights in Hugging Face layout, with a tokenizer trained on the corpus.
use std::{collections::BTreeMap, fs, path::Path};

use lathe_engine::{
    Dtype,
    files::{TensorLayout, write_safetensors},
};
use tokenizers::{
    AddedToken, Tokenizer,
    decoders::byte_level::ByteLevel,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
};

use crate::{Result, shop::Turn};

const VOCAB: usize = 768;
const HIDDEN: usize = 192;
const LAYERS: usize = 4;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN / HEADS;
const MLP: usize = 512;
const CONTEXT: usize = 512;
const SPREAD: f64 = 0.02;
const TEMPLATE: &str = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}";
const SPECIAL: [&str; 5] = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"];

/// Writes the whole model folder.
pub fn random_model<'a>(folder: &Path, text: impl Iterator<Item = &'a Turn>) -> Result<()> {
    fs::create_dir_all(folder)?;
    tokenizer(folder, text)?;
    let json = |name: &str, value: serde_json::Value| -> Result<()> {
        Ok(fs::write(folder.join(name), serde_json::to_string_pretty(&value)? + "\n")?)
    };
    json(
        "tokenizer_config.json",
        serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": "<|end|>",
            "pad_token": "<|pad|>", "model_max_length": CONTEXT, "clean_up_tokenization_spaces": false,
        }),
    )?;
    json(
        "config.json",
        serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
            "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
            "hidden_act": "silu", "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false, "eos_token_id": 1,
            "pad_token_id": 0, "dtype": "float32",
        }),
    )?;
    json("generation_config.json", serde_json::json!({"eos_token_id": 1, "pad_token_id": 0}))?;
    fs::write(folder.join("LICENSE"), include_str!("../../../../LICENSE"))?;
    weights(&folder.join("model.safetensors"))
}

fn tokenizer<'a>(folder: &Path, text: impl Iterator<Item = &'a Turn>) -> Result<()> {
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(VOCAB)
        .show_progress(false)
        .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let lines = text.flat_map(|turn| [turn.question.as_str(), turn.answer.as_str()]).collect::<Vec<_>>();
    tokenizer.train(&mut trainer, lines.into_iter()).map_err(|e| e.to_string())?;
    tokenizer
        .add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)))
        .map_err(|e| e.to_string())?;
    tokenizer.save(folder.join("tokenizer.json"), true).map_err(|e| e.to_string())?;
    Ok(())
}

fn weights(path: &Path) -> Result<()> {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        tensors.push(TensorLayout { name, dtype: Dtype::F32, shape: shape.to_vec() });
    };
    add("model.embed_tokens.weight".to_owned(), &[VOCAB, HIDDEN]);
    add("model.norm.weight".to_owned(), &[HIDDEN]);
    for layer in 0..LAYERS {
        let linear = [
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
            ("mlp.gate_proj", MLP, HIDDEN),
            ("mlp.up_proj", MLP, HIDDEN),
            ("mlp.down_proj", HIDDEN, MLP),
        ];
        for (name, rows, columns) in linear {
            add(format!("model.layers.{layer}.{name}.weight"), &[rows, columns]);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("model.layers.{layer}.{name}.weight"), &[HIDDEN]);
        }
    }
    let mut state = 0x1a7e_u64;
    write_safetensors(path, &tensors, &BTreeMap::new(), |tensor| {
        let norm = tensor.shape.len() == 1;
        let count = tensor.shape.iter().product::<usize>();
        Ok((0..count)
            .flat_map(|_| (if norm { 1.0 } else { normal(&mut state) as f32 }).to_le_bytes())
            .collect())
    })?;
    Ok(())
}

/// The sum of 12 uniform numbers less 6 is close to normal, and exact on every machine.
fn normal(state: &mut u64) -> f64 {
    let mut uniform = || {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 11) as f64 / (1_u64 << 53) as f64
    };
    SPREAD * ((0..12).map(|_| uniform()).sum::<f64>() - 6.0)
}
