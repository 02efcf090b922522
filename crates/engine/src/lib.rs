//! The language-model engine: kernels, decoder, LoRA, KV cache, sampling.
//!
//! One decoder serves training, prefill and decoding. It speaks to a [`device`] in a closed list of operations
//! over planned buffers; [`lathe_plan`] says beforehand how large every buffer is. The engine knows tokens
//! only: text, files of text, HTTP and clusters are others' matters.
//!
//! - [`Model::load`] reads weights from a [`WeightSource`].
//! - [`Trainer`] takes a model, gives it back trained, or an [`Adapter`] beside it.
//! - [`Generator`] takes a model and continues sequences, or embeds them, batched, with adapters per sequence.
//!
//! On the CPU results are exact functions of their inputs: alone or in a batch, cached or not, resumed or not,
//! with any number of threads, the bits are the same at one kernel level ([`device::cpu::Level`]).
#![deny(missing_docs)]

mod adapter;
mod decoder;
pub mod device;
mod error;
pub mod files;
pub mod generate;
mod host;
mod model;
mod random;
mod source;
pub mod train;

pub use adapter::Adapter;
pub use error::Error;
pub use generate::{AdapterId, Capacity, Embedded, Emitted, Generator, Sampling, StepTokens};
pub use lathe_plan as plan;
pub use model::Model;
pub use source::{Dtype, NamedTensor, RandomWeights, TensorView, WeightSource};
pub use train::{Hyper, Row, Schedule, StepStats, Trainer};

/// What the engine returns.
pub type Result<T> = std::result::Result<T, Error>;
