//! Pure planning: model shape, method and accelerator to memory, time and cost.
//!
//! [`plan_training`] and [`plan_serving`] list every buffer that a run will hold. The operator asks them
//! before an accelerator is requested, and the engine allocates from the same list: the promise in status is
//! the allocation in the pod. [`estimate`] turns a plan into time and money.
//!
//! All arithmetic is checked: a shape that makes no sense is an error, never a wrapped number.
#![deny(missing_docs)]

mod buffers;
pub mod estimate;
mod method;
mod serving;
mod shape;
mod tensors;
mod training;

pub use buffers::{Buffer, Category, Element, Totals};
pub use method::{LoraSpec, Precision, QUANT_GROUP, Target, TrainMethod};
pub use serving::{
    AdapterBudget, BLOCK, SAMPLE_CHUNK, SERVE_BATCH_TOKENS, SPARE_ADAPTERS, SPARE_RANK, ServePlan,
    ServeRequest, plan_serving,
};
pub use shape::{ModelShape, RopeScaling};
pub use tensors::{Tensor, TensorKind};
pub use training::{
    ATTENTION_KEYS, ATTENTION_QUERIES, ATTENTION_TILE_QUERIES, MOMENT_BLOCK, NORM_CHUNK, OptimizerState,
    PRODUCT_PANEL, PRODUCT_SCRATCH, TrainPlan, TrainRequest, loss_chunk, plan_training, thread_scratch,
};

/// Why a plan cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A dimension of the model is outside what any model has, or two dimensions do not fit together.
    #[error("`{field}` must be {allowed} (found {found})")]
    Shape {
        /// The field of [`ModelShape`] or of the request.
        field: &'static str,
        /// What is allowed.
        allowed: String,
        /// What was found.
        found: String,
    },
    /// The sizes multiply to more than 2^63 bytes.
    #[error(
        "the sizes of `{what}` multiply to more than 2^63 bytes; check the model's dimensions and the request"
    )]
    TooLarge {
        /// The buffer or tensor.
        what: String,
    },
    /// The smallest possible arrangement needs more than the limit.
    #[error("needs at least {needed} bytes, the limit is {limit} bytes")]
    DoesNotFit {
        /// Bytes of the smallest arrangement.
        needed: u64,
        /// The limit that was given.
        limit: u64,
        /// The smallest arrangement by category, for the message in status.
        totals: Totals,
    },
}
