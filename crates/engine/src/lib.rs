//! The language-model engine: kernels, decoder, LoRA, KV cache, sampling.
#![deny(missing_docs)]
