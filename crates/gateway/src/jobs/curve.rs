//! A job's losses by step, as far as its status told of them: few enough for a plot, over all of the run.

/// Points that are kept.
pub const MOST: usize = 200;

/// At most [`MOST`] losses, evenly spaced but for the newest, which is always there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Steps between two points, at least.
    stride: i64,
    points: Vec<(i64, f64)>,
}

impl Curve {
    /// The loss after a step (counted from 1). One that is no number, or of no step, is none.
    pub fn add(&mut self, step: i64, loss: f64) {
        if step < 1 || !loss.is_finite() {
            return;
        }
        // A worker that went on from a checkpoint does these steps again.
        self.points.truncate(self.points.partition_point(|(earlier, _)| *earlier < step));
        if let [.., (before, _), (last, _)] = self.points[..]
            && last - before < self.stride
        {
            self.points.pop();
        }
        self.points.push((step, loss));
        while self.points.len() > MOST {
            self.stride = self.stride.max(1).saturating_mul(2);
            self.thin();
        }
    }

    /// Steps and losses in nats a token, in the order of steps.
    pub fn points(&self) -> &[(i64, f64)] {
        &self.points
    }

    fn thin(&mut self) {
        let newest = self.points.last().map(|(step, _)| *step);
        let mut kept: Option<i64> = None;
        self.points.retain(|(step, _)| {
            let keeps = kept.is_none_or(|kept| step - kept >= self.stride);
            if keeps {
                kept = Some(*step);
            }
            keeps || Some(*step) == newest
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_keeps_few_points_over_all_of_it() {
        let mut curve = Curve::default();
        // As an operator writes them: about every so many steps.
        for step in (1..=100_000_i64).map(|n| 7 * n + n % 3) {
            curve.add(step, 1.0 / step as f64);
            assert!(curve.points.len() <= MOST);
            assert_eq!(curve.points.last().unwrap().0, step);
        }
        let [(first, _), .., (before, _), _] = curve.points[..] else { panic!("few points") };
        assert_eq!(first, 8);
        assert!(curve.points.len() > MOST / 4 && before > 680_000, "{} {before}", curve.points.len());
        let distances: Vec<i64> = curve.points.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        let (newest, even) = distances.split_last().unwrap();
        assert!(even.iter().all(|d| (curve.stride..2 * curve.stride).contains(d)), "{distances:?}");
        assert!(*newest > 0);
    }

    #[test]
    fn steps_that_are_done_again_stand_once() {
        let mut curve = Curve::default();
        for (step, loss) in [(10, 3.0), (20, 2.0), (30, 1.0), (20, 2.5), (25, 2.25), (25, 2.0)] {
            curve.add(step, loss);
        }
        assert_eq!(curve.points(), [(10, 3.0), (20, 2.5), (25, 2.0)]);
    }

    #[test]
    fn what_is_no_loss_is_no_point() {
        let mut curve = Curve::default();
        for (step, loss) in [(0, 1.0), (-5, 1.0), (i64::MIN, 1.0), (1, f64::NAN), (2, f64::INFINITY)] {
            curve.add(step, loss);
        }
        assert!(curve.points().is_empty());
        curve.add(i64::MAX, 1.0);
        assert_eq!(curve.points(), [(i64::MAX, 1.0)]);
    }
}
