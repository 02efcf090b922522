//! Perplexity: exp of the mean negative log-likelihood of the tokens that are to be learned.

/// A running mean over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Perplexity {
    sum: f64,
    weight: f64,
}

impl Perplexity {
    /// Adds a token by its log-probability (natural logarithm) and its weight in the loss.
    pub fn add(&mut self, log_probability: f32, weight: f32) {
        // A token outside the answers may well be impossible; 0 * inf must not count.
        if weight > 0.0 {
            self.sum -= f64::from(log_probability) * f64::from(weight);
            self.weight += f64::from(weight);
        }
    }

    /// Mean negative log-likelihood in nats a token; nothing without tokens.
    pub fn loss(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }

    /// exp of [`Perplexity::loss`].
    pub fn value(&self) -> Option<f64> {
        self.loss().map(f64::exp)
    }
}
