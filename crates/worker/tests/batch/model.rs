//! A tiny model of random weights in Hugging Face's layout, with a tokenizer that has a token for each byte.
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lathe_engine::RandomWeights;
use lathe_engine::files::{ModelConfig, TensorLayout, write_safetensors};
use lathe_engine::{Dtype, WeightSource};
use serde_json::{Value, json};

const VOCAB: usize = 258;
/// Ends a turn or a text.
const END: &str = "<|end|>";
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

/// Writes the model into a new folder.
pub fn write(dir: &Path, seed: u64) {
    fs::create_dir_all(dir).expect("folder");
    let text = |name: &str, value: &Value| fs::write(dir.join(name), value.to_string()).expect(name);
    let config = config();
    text("config.json", &config);
    text("tokenizer.json", &tokenizer());
    text("tokenizer_config.json", &json!({"chat_template": TEMPLATE, "eos_token": END}));
    fs::write(dir.join("README.md"), "---\nlicense: apache-2.0\n---\n").expect("card");
    fs::write(dir.join("LICENSE"), "Apache License\n").expect("licence");
    let shape = ModelConfig::parse(config.to_string().as_bytes(), None).expect("config").shape;
    let weights = RandomWeights::new(&shape, seed);
    let layouts: Vec<TensorLayout> = shape
        .tensors()
        .into_iter()
        .map(|tensor| TensorLayout { name: tensor.name, dtype: Dtype::F32, shape: tensor.shape })
        .collect();
    write_safetensors(&dir.join("model.safetensors"), &layouts, &BTreeMap::new(), |layout| {
        let mut bytes = weights.tensor(&layout.name)?.data.into_owned();
        if layout.name == "model.embed_tokens.weight" {
            // A head of random weights is too weak to say anything, however its input is tuned.
            for number in bytes.chunks_exact_mut(4) {
                let wide = 25.0 * f32::from_le_bytes([number[0], number[1], number[2], number[3]]);
                number.copy_from_slice(&wide.to_le_bytes());
            }
        }
        Ok(bytes)
    })
    .expect("weights");
}

/// `config.json`.
pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "eos_token_id": VOCAB - 1,
        "torch_dtype": "float32",
    })
}

/// Byte-level BPE without merges, so every byte is a token.
fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(letter(byte).to_string(), json!(byte));
    }
    vocab.insert("<unk>".to_owned(), json!(256));
    let end = json!({"id": VOCAB - 1, "content": END, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    })
}

/// The printable character that byte-level BPE writes for a byte: itself where it is printable, else one from U+0100 on.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(256 + before as u32).expect("in the plane")
}
