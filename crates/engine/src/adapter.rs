//! A LoRA adapter on the host.

use lathe_plan::{LoraSpec, ModelShape};

use crate::{NamedTensor, Result, WeightSource};

/// A low-rank adapter: for every target of every block `A [rank, in]` and `B [out, rank]`, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    spec: LoraSpec,
}

impl Adapter {
    /// Reads an adapter under PEFT's names, e.g.
    /// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    ///
    /// # Errors
    /// A tensor is missing or its shape does not fit the base model or the rank.
    pub fn load(shape: &ModelShape, spec: &LoraSpec, source: &dyn WeightSource) -> Result<Adapter> {
        let _ = (shape, spec, source);
        todo!()
    }

    /// Rank, scale and targets.
    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    /// All tensors under PEFT's names, f32, to be written to `adapter_model.safetensors`.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        todo!()
    }
}
