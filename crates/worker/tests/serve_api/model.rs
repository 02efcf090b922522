//! Tiny random models and adapters in Hugging Face's layout, and a byte-level tokenizer.
use std::collections::BTreeMap;
use std::path::Path;

use lathe_engine::Dtype;
use lathe_engine::files::{ModelConfig, TensorLayout, write_safetensors};
use lathe_plan::Target;
use serde_json::{Value, json};

/// What tests serve, where they do not say otherwise.
pub const CONTEXT: usize = 4096;
/// What the model allows: minutes of answer.
pub const LONGEST: usize = 1 << 18;
/// 256 bytes and the special tokens behind them.
pub const VOCAB: usize = 258;
pub const BOS: u32 = 256;
pub const TURN: &str = "<|turn|>";

/// A Llama whose answers are lower-case letters and spaces, of one byte and one token each: the first number of every
/// embedding is large and stays so, and the rows of all other tokens in the head turn against it.
pub fn write_model(dir: &Path, seed: u64, eos: &[u32]) {
    std::fs::create_dir_all(dir).expect("a folder");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": LONGEST, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "bos_token_id": BOS, "eos_token_id": eos,
    });
    write_json(&dir.join("config.json"), &config);
    write_json(&dir.join("tokenizer.json"), &tokenizer());
    let template = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}\n{% endfor %}\
                    {% if messages[0].content == 'refuse' %}{{ raise_exception('no such talk') }}{% endif %}\
                    <|turn|>assistant:";
    write_json(&dir.join("tokenizer_config.json"), &json!({"chat_template": template}));
    let shape = ModelConfig::read(dir).expect("a configuration").shape;
    let tensors: Vec<TensorLayout> = shape
        .tensors()
        .into_iter()
        .map(|tensor| TensorLayout { name: tensor.name, dtype: Dtype::F32, shape: tensor.shape })
        .collect();
    write_safetensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::new(), |tensor| {
        let count: usize = tensor.shape.iter().product();
        let mut random = Random::new(seed, &tensor.name);
        let values: Vec<f32> = match tensor.name.as_str() {
            "lm_head.weight" => {
                let row = |token: usize| token == 0x20 || (0x61..=0x7a).contains(&token);
                let value = |at: usize| match (row(at / 32), at.is_multiple_of(32)) {
                    (true, false) => random.next(),
                    (false, true) => -8.0,
                    _ => 0.0,
                };
                (0..count).map(value).collect()
            }
            name if name.ends_with("norm.weight") => vec![1.0; count],
            "model.embed_tokens.weight" => {
                (0..count).map(|at| if at.is_multiple_of(32) { 6.0 } else { random.next() }).collect()
            }
            _ => (0..count).map(|_| random.next() * 0.3).collect(),
        };
        Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
    })
    .expect("weights");
}

/// An adapter on the model that [`write_model`] makes, large enough to change every answer. `hidden` is 32 for one that
/// fits.
pub fn write_adapter(dir: &Path, seed: u64, hidden: usize) {
    write_adapter_of(dir, seed, hidden, BTreeMap::new());
}

/// As [`write_adapter`], with strings in the header of the weights.
pub fn write_adapter_of(dir: &Path, seed: u64, hidden: usize, metadata: BTreeMap<String, String>) {
    std::fs::create_dir_all(dir).expect("a folder");
    let config = json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "base",
    });
    write_json(&dir.join("adapter_config.json"), &config);
    let mut tensors = BTreeMap::new();
    for layer in 0..2 {
        for (target, input) in [(Target::Q, hidden), (Target::Down, 48)] {
            let module = format!("base_model.model.{}", target.module(layer));
            tensors.insert(format!("{module}.lora_A.weight"), vec![4, input]);
            tensors.insert(format!("{module}.lora_B.weight"), vec![hidden, 4]);
        }
    }
    let tensors: Vec<TensorLayout> =
        tensors.into_iter().map(|(name, shape)| TensorLayout { name, dtype: Dtype::F32, shape }).collect();
    write_safetensors(&dir.join("adapter_model.safetensors"), &tensors, &metadata, |tensor| {
        let mut random = Random::new(seed, &tensor.name);
        let count = tensor.shape.iter().product();
        Ok(std::iter::repeat_with(|| random.next()).take(count).flat_map(f32::to_le_bytes).collect())
    })
    .expect("weights");
}

/// One token for each byte, so that characters of several bytes come in pieces.
fn tokenizer() -> Value {
    let vocab: serde_json::Map<String, Value> =
        (0u32..256).map(|byte| (byte_name(byte as u8).to_string(), json!(byte))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(BOS, "<|begin|>"), special(257, TURN)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// GPT-2's letters for bytes: printable ones stand for themselves, the others follow from 256 on.
fn byte_name(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + before).expect("a character")
}

fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).expect("a file");
}

/// splitmix64, and about a normal distribution from it.
struct Random(u64);

impl Random {
    fn new(seed: u64, name: &str) -> Self {
        Random(name.bytes().fold(seed, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)))
    }

    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    }

    fn next(&mut self) -> f32 {
        (0..4).map(|_| self.uniform() - 0.5).sum::<f32>() * 1.7
    }
}
