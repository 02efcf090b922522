//! A model's files in Hugging Face's layout: `config.json`, safetensors, `tokenizer.json`, the chat template, and
//! PEFT's LoRA adapters.
//!
//! Everything here comes from strangers: sizes are checked before they are believed, numbers are bounded, no code from
//! a model's repository is run, and pickle is refused by name and by content.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod atomic;
mod bpe;
mod config;
mod contain;
mod error;
mod fields;
mod header;
mod mapped;
mod peft;
mod safetensors;
mod template;
mod tokenizer;
mod weights;
mod write;

pub use atomic::write_atomically;
pub use config::{Family, ModelConfig};
pub use error::FileError;
pub use header::{Header, StoredDtype, TensorInfo};
pub use mapped::Mapped;
pub use peft::{AdapterConfig, read_adapter, write_adapter};
pub use safetensors::{SafetensorsFile, StoredTensor};
pub use template::{ChatTemplate, Message, Rendered};
pub use tokenizer::{Encoded, TextStream, Tokenizer};
pub use weights::{INDEX, ModelWeights, SINGLE, parse_index, refuse_pickle};
pub use write::{TensorLayout, write_safetensors};
