//! Who decides how many replicas there are.
mod hpa;
mod informed;
mod keda;
mod knative;
mod lathe;

pub use hpa::Hpa;
pub use informed::Informed;
pub use keda::Keda;
pub use knative::Knative;
pub use lathe::{DEFAULTS, Lathe};

use std::collections::VecDeque;

use super::service::Seen;

/// Decides each second; most do so seldom.
pub trait Scaler {
    /// Replicas to ask for now.
    fn second(&mut self, seen: &Seen<'_>) -> u32;
}

/// Seconds in which a peer's metric counts what waits as work to be done: what `decide` itself takes.
const CATCH_UP: f64 = 15.0;

/// The last seconds of a figure.
#[derive(Debug)]
struct Means {
    seconds: usize,
    kept: VecDeque<f64>,
}

impl Means {
    fn new(seconds: usize) -> Self {
        Self { seconds, kept: VecDeque::new() }
    }

    fn push(&mut self, figure: f64) {
        self.kept.push_front(figure);
        self.kept.truncate(self.seconds);
    }

    /// The largest that is kept.
    fn most(&self) -> f64 {
        self.kept.iter().copied().fold(0.0, f64::max)
    }

    /// Of the last `seconds`, or of as many as there are.
    fn last(&self, seconds: usize) -> f64 {
        let count = seconds.min(self.kept.len());
        self.kept.iter().take(count).sum::<f64>() / count.max(1) as f64
    }
}
