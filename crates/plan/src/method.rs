//! What is trained, and in which precision weights are held.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::shape::wrong;
use crate::tensors::elements;
use crate::{Element, ModelShape, PlanError, Tensor, TensorKind};

/// How a model's matrices are held. Norms and biases are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Precision {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight.
    BF16,
    /// 8 bits a weight and a scale (f32) for each [`QUANT_GROUP`] of a row. For serving.
    Int8,
    /// 4 bits a weight and a scale for each group; token vectors and the head in 8 bits. For serving.
    Int4,
}

/// Weights of a row, one after the other, that share a scale; what is multiplied with them is quantized in the same
/// groups.
pub const QUANT_GROUP: usize = 128;

impl Precision {
    /// Whether training can hold the model so.
    pub fn is_float(self) -> bool {
        matches!(self, Precision::F32 | Precision::BF16)
    }

    /// Element type and number of elements of a tensor that is held so.
    ///
    /// # Errors
    /// [`PlanError::TooLarge`].
    pub fn storage(self, tensor: &Tensor) -> Result<(Element, usize), PlanError> {
        let element = match (self, tensor.kind) {
            _ if !tensor.is_matrix() => Element::F32,
            (Precision::F32, _) => Element::F32,
            (Precision::BF16, _) => Element::BF16,
            (Precision::Int4, TensorKind::Linear(_)) => Element::Int4,
            (Precision::Int8 | Precision::Int4, _) => Element::Int8,
        };
        let len = match (element, &tensor.shape[..]) {
            (Element::Int8 | Element::Int4, &[rows, columns]) => {
                let too_large = || PlanError::TooLarge { what: tensor.name.clone() };
                element.quantized_bytes(rows, columns).ok_or_else(too_large)?
            }
            _ => tensor.elements()?,
        };
        Ok((element, len))
    }

    /// Bytes that a weight takes in the products, scales included.
    pub fn bytes_per_weight(self) -> f64 {
        let scale = 4.0 / QUANT_GROUP as f64;
        match self {
            Precision::F32 => 4.0,
            Precision::BF16 => 2.0,
            Precision::Int8 => 1.0 + scale,
            Precision::Int4 => 0.5 + scale,
        }
    }
}

/// A linear layer of a block that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Target {
    /// `self_attn.q_proj`
    Q,
    /// `self_attn.k_proj`
    K,
    /// `self_attn.v_proj`
    V,
    /// `self_attn.o_proj`
    O,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl Target {
    /// All seven, in the order of the forward pass.
    pub const ALL: [Target; 7] =
        [Target::Q, Target::K, Target::V, Target::O, Target::Gate, Target::Up, Target::Down];

    /// The last part of Hugging Face's name, e.g. `q_proj` (what PEFT's `target_modules` lists).
    pub fn name(self) -> &'static str {
        self.path().rsplit('.').next().unwrap_or_default()
    }

    /// Hugging Face's name inside a block, e.g. `self_attn.q_proj`.
    pub fn path(self) -> &'static str {
        match self {
            Target::Q => "self_attn.q_proj",
            Target::K => "self_attn.k_proj",
            Target::V => "self_attn.v_proj",
            Target::O => "self_attn.o_proj",
            Target::Gate => "mlp.gate_proj",
            Target::Up => "mlp.up_proj",
            Target::Down => "mlp.down_proj",
        }
    }

    /// Hugging Face's name of the module, e.g. `model.layers.3.self_attn.q_proj`.
    pub fn module(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.path())
    }

    /// The target that PEFT calls `name`.
    pub fn from_name(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|t| t.name() == name)
    }
}

/// A low-rank adapter: `y = W x + (alpha / rank) B A dropout(x)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Inner width; 1 to 1024.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f32,
    /// Share of the adapter's inputs dropped in training, 0 up to but not including 1.
    pub dropout: f32,
    /// Which linear layers are changed, in every block.
    pub targets: BTreeSet<Target>,
}

impl LoraSpec {
    /// The factor before `B A x`.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Refuses adapters that cannot be.
    ///
    /// # Errors
    /// [`PlanError::Shape`].
    pub fn validate(&self) -> Result<(), PlanError> {
        if self.rank == 0 || self.rank > 1024 {
            return Err(wrong("rank", "between 1 and 1024".to_owned(), self.rank));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return Err(wrong("alpha", "a positive number".to_owned(), self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(wrong("dropout", "at least 0 and less than 1".to_owned(), self.dropout));
        }
        if self.targets.is_empty() {
            return Err(wrong("targets", "at least one linear layer".to_owned(), "none"));
        }
        Ok(())
    }

    /// Elements of one adapter: `A` and `B` of every target of every block.
    ///
    /// # Errors
    /// [`PlanError::TooLarge`].
    pub fn elements(&self, shape: &ModelShape) -> Result<usize, PlanError> {
        let too_large = || PlanError::TooLarge { what: "the adapter".to_owned() };
        let per_layer = self
            .targets
            .iter()
            .map(|&t| shape.linear(t))
            .try_fold(0usize, |sum, (o, i)| o.checked_add(i)?.checked_mul(self.rank)?.checked_add(sum));
        per_layer.and_then(|len| elements(&[len, shape.layers])).ok_or_else(too_large)
    }

    /// Number of trained weights.
    pub fn parameters(&self, shape: &ModelShape) -> u64 {
        let per_layer: usize =
            self.targets.iter().map(|&t| shape.linear(t)).map(|(o, i)| (o + i) * self.rank).sum();
        per_layer as u64 * shape.layers as u64
    }
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum TrainMethod {
    /// Every weight.
    Full,
    /// An adapter; the model's weights stay as they are.
    Lora(LoraSpec),
}
