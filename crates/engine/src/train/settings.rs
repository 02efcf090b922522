//! What a training run is given and what a step gives back.

/// One training row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// At least two tokens, at most the plan's `max_row_tokens`.
    pub tokens: Vec<u32>,
    /// Per token the weight of its prediction from the tokens before it in the loss: 0 for a prompt, 1 for an
    /// answer. As long as `tokens`; the first is ignored (nothing predicts it).
    pub weights: Vec<f32>,
}

/// How the learning rate moves after the warm-up (whose step `i` of `n`, from 1, has `i / n` of the peak).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls linearly towards 0 after the last step.
    Linear,
    /// Falls by half a cosine towards 0 after the last step.
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

impl Hyper {
    /// The learning rate of the step after `done` steps.
    pub fn learning_rate_at(&self, done: u64) -> f64 {
        if done < self.warmup_steps {
            return self.learning_rate * (done + 1) as f64 / self.warmup_steps as f64;
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((done - self.warmup_steps) as f64 / rest as f64).min(1.0);
        self.learning_rate
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - progress,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }

    /// The seed of one row's dropout: of the step and the row's place in it, not of micro-batches.
    pub(super) fn row_seed(&self, step: u64, row: usize) -> u64 {
        crate::random::bits(crate::random::mix(self.seed), step << 32 | row as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_and_falls() {
        let rates = |schedule| {
            let hyper = Hyper {
                learning_rate: 1.0,
                schedule,
                warmup_steps: 2,
                total_steps: 6,
                weight_decay: 0.0,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                max_grad_norm: None,
                seed: 0,
            };
            [0, 1, 2, 3, 4, 5, 6, 9].map(|done| (hyper.learning_rate_at(done) * 1000.0).round() / 1000.0)
        };
        assert_eq!(rates(Schedule::Constant), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Linear), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
        assert_eq!(rates(Schedule::Cosine), [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]);
    }
}
