//! What a decoder-only language model is, independent of its family.

use serde::{Deserialize, Serialize};

use crate::PlanError;

/// The dimensions and switches of a decoder-only transformer (Llama, Qwen2, Mistral), read from its `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Entries of the embedding table.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of decoder blocks.
    pub layers: usize,
    /// Query heads per block.
    pub heads: usize,
    /// Key and value heads per block; divides `heads` (grouped-query attention).
    pub kv_heads: usize,
    /// Width of one head; even, at most 256.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Longest context the model was made for, in tokens.
    pub max_position: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched for long contexts.
    pub rope_scaling: RopeScaling,
    /// Keys that a query sees in every block, its own last (Mistral); `None`: all up to its own.
    pub sliding_window: Option<usize>,
    /// Epsilon inside the RMS norms.
    pub rms_eps: f64,
    /// Whether the query, key and value projections have a bias (Qwen2).
    pub qkv_bias: bool,
    /// Whether the output head is the embedding table.
    pub tie_embeddings: bool,
}

/// Stretching of the rotary frequencies, as Hugging Face's `rope_scaling`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a smooth step between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wave lengths above `original_max_position / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wave lengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context before stretching, in tokens.
        original_max_position: usize,
    },
}

impl ModelShape {
    /// Width of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Refuses shapes that no model has, so that later products stay in range.
    ///
    /// # Errors
    /// [`PlanError::Shape`] names the first field that is wrong.
    pub fn validate(&self) -> Result<(), PlanError> {
        for (field, value, max) in [
            ("vocab", self.vocab, 1 << 24),
            ("hidden", self.hidden, 1 << 17),
            ("layers", self.layers, 1 << 10),
            ("heads", self.heads, 1 << 10),
            ("kv_heads", self.kv_heads, 1 << 10),
            ("head_dim", self.head_dim, 256),
            ("intermediate", self.intermediate, 1 << 20),
            ("max_position", self.max_position, 1 << 24),
            ("sliding_window", self.sliding_window.unwrap_or(1), 1 << 24),
        ] {
            if value == 0 || value > max {
                return Err(wrong(field, format!("between 1 and {max}"), value));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(wrong("kv_heads", format!("a divisor of `heads` ({})", self.heads), self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(wrong("head_dim", "even".to_owned(), self.head_dim));
        }
        positive("rope_theta", self.rope_theta)?;
        positive("rms_eps", self.rms_eps)?;
        match self.rope_scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope_scaling.factor", factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive("rope_scaling.factor", factor)?;
                positive("rope_scaling.low_freq_factor", low_freq_factor)?;
                if !high_freq_factor.is_finite() || high_freq_factor <= low_freq_factor {
                    let allowed = format!("more than low_freq_factor ({low_freq_factor})");
                    return Err(wrong("rope_scaling.high_freq_factor", allowed, high_freq_factor));
                }
                if original_max_position == 0 || original_max_position > 1 << 24 {
                    let allowed = format!("between 1 and {}", 1 << 24);
                    return Err(wrong(
                        "rope_scaling.original_max_position_embeddings",
                        allowed,
                        original_max_position,
                    ));
                }
                Ok(())
            }
        }
    }
}

fn positive(field: &'static str, value: f64) -> Result<(), PlanError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(wrong(field, "a positive number".to_owned(), value))
}

pub(crate) fn wrong(field: &'static str, allowed: String, found: impl ToString) -> PlanError {
    PlanError::Shape { field, allowed, found: found.to_string() }
}
