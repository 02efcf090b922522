//! Losses by step, thinned out so that a plot of any length fits a report.
use lathe_contract::MAX_POINTS;
use serde::{Deserialize, Serialize};

/// At most [`MAX_POINTS`] losses, evenly spaced, and always the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Curve {
    /// Steps between two points.
    stride: u64,
    points: Vec<(i64, f64)>,
}

impl Default for Curve {
    fn default() -> Self {
        Curve { stride: 1, points: Vec::new() }
    }
}

impl Curve {
    /// Adds the loss of a step (counted from 1).
    pub fn add(&mut self, step: u64, loss: f64) {
        if !(step.saturating_sub(1)).is_multiple_of(self.stride) {
            return;
        }
        self.points.push((step as i64, loss));
        if self.points.len() > MAX_POINTS {
            self.stride *= 2;
            let stride = self.stride;
            self.points.retain(|(step, _)| ((step - 1) as u64).is_multiple_of(stride));
        }
    }

    /// The points.
    pub fn points(&self) -> &[(i64, f64)] {
        &self.points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_keeps_few_points_over_all_of_it() {
        let mut curve = Curve::default();
        for step in 1..=10_000 {
            curve.add(step, 1.0 / step as f64);
            assert!(curve.points.len() <= MAX_POINTS);
        }
        assert_eq!(curve.points[0], (1, 1.0));
        assert!(curve.points.len() > MAX_POINTS / 2 && curve.points.last().unwrap().0 > 9_800);
        assert!(curve.points.windows(2).all(|pair| pair[1].0 - pair[0].0 == curve.stride as i64));
    }
}
