//! The tensors of a model under their Hugging Face names, and how the engine lays them out.

use crate::{ModelShape, PlanError, Target};

/// Matrices are held as panels of this many output rows: `[ceil(rows / PANEL)][columns][PANEL]`.
pub const PANEL: usize = 16;

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
    /// Whether this is a matrix (held in panels, in the weights' precision) and not a vector (always f32).
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }

    /// Elements as the engine holds them, with the padding of panels.
    ///
    /// # Errors
    /// [`PlanError::TooLarge`].
    pub fn stored_len(&self) -> Result<usize, PlanError> {
        match self.shape[..] {
            [rows, columns] => packed_len(rows, columns),
            _ => Ok(self.shape[0]),
        }
    }
}

/// Elements of a `rows x columns` matrix in panels.
///
/// # Errors
/// [`PlanError::TooLarge`].
pub fn packed_len(rows: usize, columns: usize) -> Result<usize, PlanError> {
    rows.checked_next_multiple_of(PANEL)
        .and_then(|rows| rows.checked_mul(columns))
        .filter(|&len| len < 1 << 60)
        .ok_or_else(|| PlanError::TooLarge { what: format!("a {rows} x {columns} matrix") })
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
