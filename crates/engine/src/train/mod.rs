//! Training.

use std::io::{Read, Write};

use lathe_plan::TrainPlan;

use crate::{Adapter, Model, Result};

/// One training row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// At least two tokens, at most the plan's `max_row_tokens`.
    pub tokens: Vec<u32>,
    /// Per token the weight of its prediction from the tokens before it in the loss: 0 for a prompt, 1 for an
    /// answer. As long as `tokens`; the first is ignored (nothing predicts it).
    pub weights: Vec<f32>,
}

/// How the learning rate moves after the warm-up (which rises linearly from 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls linearly to 0 at the last step.
    Linear,
    /// Falls by half a cosine to 0 at the last step.
    Cosine,
}

/// AdamW and its schedule. Weight decay applies to matrices only, as is usual.
#[derive(Debug, Clone, PartialEq)]
pub struct Hyper {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// What follows the warm-up.
    pub schedule: Schedule,
    /// Steps of the warm-up.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Gradients longer than this are scaled down to it.
    pub max_grad_norm: Option<f64>,
    /// Seed of the adapter's first values and of dropout.
    pub seed: u64,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// The step's number, from 1.
    pub step: u64,
    /// Mean negative log-likelihood over the weighted tokens, before the update.
    pub loss: f64,
    /// Tokens of all rows.
    pub tokens: u64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate that was applied.
    pub learning_rate: f64,
}

/// Trains a model: owns it and the optimizer's state.
pub struct Trainer {
    model: Model,
}

impl Trainer {
    /// Allocates what the plan lists. A new adapter begins with `A` uniform in +-1/sqrt(in) (as PEFT) and `B` 0.
    ///
    /// # Errors
    /// The plan is another model's, no memory.
    pub fn new(model: Model, plan: &TrainPlan, hyper: Hyper) -> Result<Trainer> {
        let _ = (plan, hyper);
        Ok(Trainer { model })
    }

    /// One optimizer step over all rows, in micro-batches; the loss is the mean over all weighted tokens, so
    /// how rows fall into micro-batches changes nothing, not even a bit.
    ///
    /// # Errors
    /// [`crate::Error::Row`], or [`crate::Error::NotFinite`] (the weights are then unchanged).
    pub fn step(&mut self, rows: &[Row]) -> Result<StepStats> {
        let _ = rows;
        todo!()
    }

    /// Per row and token the log-probability of the token after the tokens before it, without dropout; 0 where
    /// the row's weight is 0 and for the first token.
    ///
    /// # Errors
    /// [`crate::Error::Row`].
    pub fn log_probs(&mut self, rows: &[Row]) -> Result<Vec<Vec<f32>>> {
        let _ = rows;
        todo!()
    }

    /// Steps done so far.
    pub fn steps_done(&self) -> u64 {
        todo!()
    }

    /// Writes what a resumed run needs to go on bit for bit: trained weights, moments, step, seeds, and an
    /// identity of model, method and kernel level. The frozen base is not in it.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn save_state(&mut self, to: &mut dyn Write) -> Result<()> {
        let _ = to;
        todo!()
    }

    /// Takes up a state written by [`Trainer::save_state`].
    ///
    /// # Errors
    /// [`crate::Error::State`] for a damaged state or one of another run; the trainer is then unchanged.
    pub fn load_state(&mut self, from: &mut dyn Read) -> Result<()> {
        let _ = from;
        todo!()
    }

    /// The adapter as trained so far; `None` when every weight is trained.
    ///
    /// # Errors
    /// Reading back from the device failed.
    pub fn adapter(&mut self) -> Result<Option<Adapter>> {
        todo!()
    }

    /// The model, with trained weights after full training (read them by [`Model::tensor`]), and untouched
    /// after LoRA. Frees everything else.
    pub fn into_model(self) -> Model {
        self.model
    }
}
