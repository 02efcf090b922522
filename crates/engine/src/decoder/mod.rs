//! One decoder for training, prefill and decoding: which buffers a block works on, and what a batch is.
//!
//! A batch is ragged: rows of several sequences one after the other, without padding. Row `i` has a token, a
//! position and (through `starts`) a sequence; the sequence has a table of pages where its keys and values lie.
//! `T` below is the batch's rows, `H` the hidden width, `Q` and `K` all query and all key heads, `I` the MLP.

mod backward;
mod batch;
mod block;
mod head;

use std::collections::HashMap;
use std::sync::Arc;

use lathe_plan::{Buffer, Category, ModelShape, RopeScaling, Target};

pub(crate) use backward::{Gradients, LayerGradients, embedding_gradient};
pub(crate) use batch::{Batch, Layout};
pub(crate) use block::Block;
pub(crate) use head::{LossHead, last_logits, last_states};

use crate::device::{Buf, Data, Device, LoraSlot};
use crate::{Error, Result};

/// One linear layer's weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear {
    /// `[outputs, inputs]`
    pub w: Buf,
    /// `[outputs]`, f32.
    pub bias: Option<Buf>,
    pub outputs: usize,
    pub inputs: usize,
}

/// One block's weights, borrowed for each call.
#[derive(Debug, Clone)]
pub(crate) struct LayerWeights {
    pub attention_norm: Buf,
    pub mlp_norm: Buf,
    /// In the order of [`Target::ALL`].
    pub linears: Vec<Linear>,
}

/// All weights of a model.
#[derive(Debug, Clone)]
pub(crate) struct Weights {
    pub embedding: Buf,
    pub layers: Vec<LayerWeights>,
    pub norm: Buf,
    /// The embedding where tied.
    pub head: Buf,
}

/// The adapters of one block: per target (in the order of [`Target::ALL`]) the resident slots, none where no
/// adapter changes it.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerLora {
    pub slots: [Option<Arc<[LoraSlot]>>; 7],
    /// Distance between rows of `mid`: the largest rank.
    pub stride: usize,
}

/// Dropout on the adapters' inputs, in training.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    pub rate: f32,
    /// `[T, widest input]`
    pub dropped: Buf,
}

/// What one block computes and its backward pass needs again.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    /// `[T]`: 1 / root mean square before attention.
    pub inv1: Buf,
    /// `[T, Q]`, turned.
    pub q: Buf,
    /// `[T, K]`, turned.
    pub k: Buf,
    /// `[T, K]`
    pub v: Buf,
    /// `[T, heads]`, in training.
    pub lse: Option<Buf>,
    /// `[T, Q]`
    pub attention: Buf,
    /// `[T, H]`: the residual stream between attention and MLP.
    pub h: Buf,
    /// `[T]`: 1 / root mean square before the MLP.
    pub inv2: Buf,
    /// `[T, I]`
    pub gate: Buf,
    /// `[T, I]`
    pub up: Buf,
    /// `[T, rank]` per target with an adapter.
    pub mid: [Option<Buf>; 7],
}

/// What every block overwrites.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    /// `[T, H]`: the normed stream.
    pub n: Buf,
    /// `[T, I]`: `silu(gate) * up`.
    pub act: Buf,
    /// `[context, head_dim]`: cosines and sines.
    pub rope: Buf,
    pub dropout: Option<Dropout>,
}

/// The keys and values of one block for sequences in flight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerCache {
    pub k: Buf,
    pub v: Buf,
}

/// The buffers of a plan, by name.
pub(crate) struct Planned {
    buffers: HashMap<String, Buf>,
}

impl Planned {
    /// Allocates what the plan lists, except the model's weights, which are there already.
    pub(crate) fn alloc(dev: &mut dyn Device, shape: &ModelShape, buffers: &[Buffer]) -> Result<Planned> {
        let loaded: Vec<String> = shape.tensors().into_iter().map(|t| t.name).collect();
        let mut planned = Planned { buffers: HashMap::new() };
        for buffer in buffers.iter().filter(|b| b.category != Category::Weights || !loaded.contains(&b.name))
        {
            match dev.alloc(&buffer.name, buffer.element, buffer.len) {
                Ok(buf) => planned.buffers.insert(buffer.name.clone(), buf),
                Err(error) => {
                    planned.free(dev);
                    return Err(error);
                }
            };
        }
        planned.get("threads").map(|scratch| dev.set_scratch(scratch))?;
        Ok(planned)
    }

    /// The buffer of this name.
    pub(crate) fn get(&self, name: &str) -> Result<Buf> {
        self.find(name).ok_or(Error::OtherPlan { what: "list of buffers" })
    }

    /// The buffer of this name, where the plan has it.
    pub(crate) fn find(&self, name: &str) -> Option<Buf> {
        self.buffers.get(name).copied()
    }

    /// Gives all buffers back.
    pub(crate) fn free(self, dev: &mut dyn Device) {
        for buf in self.buffers.into_values() {
            dev.free(buf);
        }
    }
}

impl Kept {
    /// The kept buffers of slot `slot`.
    pub(crate) fn of(planned: &Planned, slot: usize) -> Result<Kept> {
        let get = |name: &str| planned.get(&format!("block.{slot}.{name}"));
        Ok(Kept {
            inv1: get("inv1")?,
            q: get("q")?,
            k: get("k")?,
            v: get("v")?,
            lse: planned.find(&format!("block.{slot}.lse")),
            attention: get("attention")?,
            h: get("h")?,
            inv2: get("inv2")?,
            gate: get("gate")?,
            up: get("up")?,
            mid: Target::ALL.map(|t| planned.find(&format!("block.{slot}.mid.{}", t.name()))),
        })
    }

    /// The part that `rows` rows take.
    fn first(&self, rows: usize, shape: &ModelShape) -> Kept {
        let first = |buf: Buf, width: usize| buf.first(rows * width);
        Kept {
            inv1: first(self.inv1, 1),
            q: first(self.q, shape.q_dim()),
            k: first(self.k, shape.kv_dim()),
            v: first(self.v, shape.kv_dim()),
            lse: self.lse.map(|lse| first(lse, shape.heads)),
            attention: first(self.attention, shape.q_dim()),
            h: first(self.h, shape.hidden),
            inv2: first(self.inv2, 1),
            gate: first(self.gate, shape.intermediate),
            up: first(self.up, shape.intermediate),
            mid: self.mid,
        }
    }
}

/// Fills the rotary table: row `p` holds the cosines and then the sines of `p * frequency[j]`. Angles are
/// rounded to f32 as Hugging Face's are.
pub(crate) fn write_rope(dev: &mut dyn Device, shape: &ModelShape, table: Buf) {
    let half = shape.head_dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|j| rope_frequency(shape, j) as f32).collect();
    let mut row = vec![0.0f32; shape.head_dim];
    for position in 0..table.len() / shape.head_dim {
        for (j, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            (row[j], row[half + j]) = (cos as f32, sin as f32);
        }
        dev.write(table.part(position * shape.head_dim, shape.head_dim), Data::F32(&row));
    }
}

/// The `j`th rotary frequency: `theta^(-2 j / head_dim)`, stretched.
fn rope_frequency(shape: &ModelShape, j: usize) -> f64 {
    let frequency = shape.rope_theta.powf(-2.0 * j as f64 / shape.head_dim as f64);
    match shape.rope_scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        // As transformers' _compute_llama3_parameters.
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let length = 2.0 * std::f64::consts::PI / frequency;
            let context = original_max_position as f64;
            if length < context / high_freq_factor {
                return frequency;
            }
            if length > context / low_freq_factor {
                return frequency / factor;
            }
            let smooth = (context / length - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}
