//! The tensors of a model under their Hugging Face names. The engine holds them as files do: row-major.

use crate::{ModelShape, PlanError, Target};

/// One weight of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Hugging Face's name, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// What it is.
    pub kind: TensorKind,
    /// Hugging Face's shape: `[rows, columns]` (output, input) or `[length]`.
    pub shape: Vec<usize>,
}

/// What a weight is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorKind {
    /// The table of token vectors.
    Embedding,
    /// The untied output head.
    Head,
    /// A linear layer's matrix.
    Linear(Target),
    /// A linear layer's bias.
    Bias(Target),
    /// The norm before attention.
    AttentionNorm,
    /// The norm before the MLP.
    MlpNorm,
    /// The norm before the head.
    FinalNorm,
}

impl Tensor {
    /// Whether this is a matrix (held in the weights' precision) and not a vector (always f32).
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }

    /// Number of elements.
    ///
    /// # Errors
    /// [`PlanError::TooLarge`].
    pub fn elements(&self) -> Result<usize, PlanError> {
        elements(&self.shape).ok_or_else(|| PlanError::TooLarge { what: self.name.clone() })
    }
}

/// The product of `dims`, where it is a number that any memory could hold.
pub(crate) fn elements(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |product, &d| product.checked_mul(d)).filter(|&len| len < 1 << 58)
}

impl ModelShape {
    /// All weights of the model, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<Tensor> {
        let tensor = |name: String, kind, shape: &[usize]| Tensor { name, kind, shape: shape.to_vec() };
        let embedding = [self.vocab, self.hidden];
        let mut all = vec![tensor("model.embed_tokens.weight".to_owned(), TensorKind::Embedding, &embedding)];
        for layer in 0..self.layers {
            let norm = |part: &str| format!("model.layers.{layer}.{part}.weight");
            all.push(tensor(norm("input_layernorm"), TensorKind::AttentionNorm, &[self.hidden]));
            for target in Target::ALL {
                if target == Target::Gate {
                    all.push(tensor(norm("post_attention_layernorm"), TensorKind::MlpNorm, &[self.hidden]));
                }
                let (rows, columns) = self.linear(target);
                let module = target.module(layer);
                all.push(tensor(format!("{module}.weight"), TensorKind::Linear(target), &[rows, columns]));
                if self.qkv_bias && matches!(target, Target::Q | Target::K | Target::V) {
                    all.push(tensor(format!("{module}.bias"), TensorKind::Bias(target), &[rows]));
                }
            }
        }
        all.push(tensor("model.norm.weight".to_owned(), TensorKind::FinalNorm, &[self.hidden]));
        if !self.tie_embeddings {
            all.push(tensor("lm_head.weight".to_owned(), TensorKind::Head, &embedding));
        }
        all
    }

    /// Output and input width of one linear layer of a block.
    pub fn linear(&self, target: Target) -> (usize, usize) {
        match target {
            Target::Q => (self.q_dim(), self.hidden),
            Target::K | Target::V => (self.kv_dim(), self.hidden),
            Target::O => (self.hidden, self.q_dim()),
            Target::Gate | Target::Up => (self.intermediate, self.hidden),
            Target::Down => (self.hidden, self.intermediate),
        }
    }

    /// Number of weights, as the model's card counts them (a tied head counts once).
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>()).sum()
    }
}
