//! A model's files in Hugging Face's layout: `config.json`, safetensors, `tokenizer.json`, the chat template, and
//! PEFT's LoRA adapters.
//!
//! Everything here comes from strangers: sizes are checked before they are believed, numbers are bounded, no code from
//! a model's repository is run, and pickle is refused by name and by content.

mod atomic;
mod config;
mod error;
mod fields;
mod peft;
mod safetensors;
mod template;
mod tokenizer;
mod weights;

pub use atomic::write_atomically;
pub use config::{Family, ModelConfig};
pub use error::FileError;
pub use peft::{AdapterConfig, read_adapter, write_adapter};
pub use safetensors::{
    Header, SafetensorsFile, StoredDtype, StoredTensor, TensorInfo, TensorLayout, write_safetensors,
};
pub use template::{ChatTemplate, Message, Rendered};
pub use tokenizer::{Encoded, TextStream, Tokenizer};
pub use weights::{ModelWeights, refuse_pickle};
