//! Why the engine refuses or stops.

use lathe_plan::PlanError;

/// Everything that can go wrong in the engine. A text names what is wrong, what is allowed, what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source has no tensor of this name.
    #[error("the weights have no tensor `{name}`; the files are incomplete or of another architecture")]
    MissingTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error(
        "tensor `{name}` must have shape {expected:?} (found {found:?}); configuration and weights disagree"
    )]
    TensorShape {
        /// The tensor.
        name: String,
        /// What the configuration says.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// The bytes of a tensor do not agree with its shape and type.
    #[error("tensor `{name}` must have {expected} bytes (found {found}); the file is damaged")]
    TensorBytes {
        /// The tensor.
        name: String,
        /// What shape and type ask for.
        expected: usize,
        /// What the file holds.
        found: usize,
    },
    /// What was rounded to a few bits cannot be written.
    #[error("tensor `{name}` is held in few bits; load the model in F32 or BF16 to write it")]
    Quantized {
        /// The tensor.
        name: String,
    },
    /// The source could not be read.
    #[error("tensor `{name}` cannot be read")]
    Source {
        /// The tensor.
        name: String,
        /// What the source said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The plan cannot be made, or does not belong to this model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The plan was made for another model or method.
    #[error("the plan's {what} is not the model's; plan again for this model")]
    OtherPlan {
        /// What differs.
        what: &'static str,
    },
    /// The environment asks for kernels that there are not, or not on this machine.
    #[error(
        "`LATHE_CPU` must be one of {all}, of which this machine has {here} (found `{asked}`); leave it out for the \
         best of them"
    )]
    CpuLevel {
        /// What it names.
        asked: String,
        /// Every level's name.
        all: String,
        /// Those of this machine.
        here: String,
    },
    /// The system gave no memory.
    #[error("no memory for `{name}` ({bytes} bytes)")]
    OutOfMemory {
        /// The buffer.
        name: String,
        /// Its size.
        bytes: u64,
    },
    /// A training row cannot be used.
    #[error("row {row}: {what}")]
    Row {
        /// Its place in the batch.
        row: usize,
        /// What is wrong, what is allowed.
        what: String,
    },
    /// Loss or gradient is not a finite number; the step was not applied.
    #[error(
        "step {step}: loss {loss} with gradient norm {grad_norm} is not finite; the step was not applied: lower \
         the learning rate, or look at the rows of this step"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
    },
    /// Whoever asked for a step asked to stop it; it was not applied.
    #[error("the step was interrupted and not applied")]
    Interrupted,
    /// A checkpoint is damaged or belongs to another run.
    #[error("the training state cannot be used: {what}")]
    State {
        /// What is wrong.
        what: String,
    },
    /// Reading or writing a checkpoint failed.
    #[error("the training state cannot be read or written")]
    Io(#[from] std::io::Error),
    /// A sequence cannot be added.
    #[error("the sequence cannot be added: {what}")]
    Sequence {
        /// What is wrong, what is allowed.
        what: String,
    },
    /// An adapter cannot be added, or is not there.
    #[error("the adapter cannot be used: {what}")]
    Adapter {
        /// What is wrong, what is allowed.
        what: String,
    },
}
