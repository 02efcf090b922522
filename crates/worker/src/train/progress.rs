//! How far training is, and how fast.
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use lathe_contract::TrainProgress;
use serde::{Deserialize, Serialize};

use super::checkpoint::Position;

/// Speed is told over this time.
const WINDOW: Duration = Duration::from_secs(20);

/// What outlives a killed worker beside its checkpoints, so that lost steps can be counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Counters {
    /// The highest step that any worker of this run came to.
    pub reached: u64,
    /// Workers after the first.
    pub restarts: i32,
    /// Steps that were done again.
    pub lost_steps: u64,
}

impl Counters {
    /// Those of a worker that goes on at step `from` after what `earlier` ones noted.
    pub fn after(earlier: Option<Counters>, from: u64) -> Self {
        match earlier {
            None => Counters { reached: from, ..Counters::default() },
            Some(earlier) => Counters {
                reached: from,
                restarts: earlier.restarts.saturating_add(1),
                lost_steps: earlier.lost_steps + earlier.reached.saturating_sub(from),
            },
        }
    }
}

/// Tokens a second over the last steps.
#[derive(Clone, Debug)]
pub struct Speed {
    steps: VecDeque<(Instant, u64)>,
}

impl Speed {
    /// Begins to measure.
    pub fn begin(now: Instant) -> Self {
        Speed { steps: VecDeque::from([(now, 0)]) }
    }

    /// A step that ended now.
    pub fn step(&mut self, now: Instant, tokens: u64) {
        self.steps.push_back((now, tokens));
        // The first entry is where the window begins; its tokens came before.
        while self.steps.len() > 2 && self.steps.get(1).is_some_and(|(at, _)| now - *at > WINDOW) {
            self.steps.pop_front();
        }
    }

    /// Time that passed while no step was made (a checkpoint, a measurement) does not count.
    pub fn pause(&mut self, paused: Duration) {
        self.steps.iter_mut().for_each(|(at, _)| *at += paused);
    }

    /// Tokens a second, and seconds a step.
    pub fn rates(&self) -> (f64, f64) {
        let (Some((first, _)), Some((last, _))) = (self.steps.front(), self.steps.back()) else {
            return (0.0, 0.0);
        };
        let seconds = (*last - *first).as_secs_f64();
        let steps = self.steps.len() - 1;
        if steps == 0 || seconds <= 0.0 {
            return (0.0, 0.0);
        }
        let tokens: u64 = self.steps.iter().skip(1).map(|(_, tokens)| tokens).sum();
        (tokens as f64 / seconds, seconds / steps as f64)
    }
}

/// Where training stands, for the report.
pub fn progress(position: &Position, steps: u64, counters: Counters, saved: &(u64, String)) -> TrainProgress {
    TrainProgress {
        step: position.step as i64,
        steps: steps as i64,
        tokens: position.tokens as i64,
        checkpoint_step: saved.0 as i64,
        checkpoint_digest: saved.1.clone(),
        restarts: counters.restarts,
        lost_steps: counters.lost_steps as i64,
        loss: position.loss,
        curve: position.curve.points().to_vec(),
        ..TrainProgress::default()
    }
}

/// Takes a step's numbers into the progress.
pub fn after_step(progress: &mut TrainProgress, position: &Position, speed: &Speed) {
    let (tokens_per_second, seconds) = speed.rates();
    progress.step = position.step as i64;
    progress.tokens = position.tokens as i64;
    progress.loss = position.loss;
    progress.tokens_per_second = tokens_per_second;
    progress.remaining_seconds = seconds * (progress.steps - progress.step).max(0) as f64;
    progress.curve = position.curve.points().to_vec();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_steps_are_those_between_the_checkpoint_and_the_highest_step() {
        let first = Counters::after(None, 0);
        assert_eq!(first, Counters::default());
        let second = Counters::after(Some(Counters { reached: 17, ..first }), 10);
        assert_eq!(second, Counters { reached: 10, restarts: 1, lost_steps: 7 });
        let third = Counters::after(Some(Counters { reached: 30, ..second }), 30);
        assert_eq!(third, Counters { reached: 30, restarts: 2, lost_steps: 7 });
    }

    #[test]
    fn speed_is_that_of_the_window_without_pauses() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut speed = Speed::begin(start);
        assert_eq!(speed.rates(), (0.0, 0.0));
        speed.step(at(10), 1000);
        assert_eq!(speed.rates(), (100.0, 10.0));
        speed.pause(Duration::from_secs(100));
        speed.step(at(120), 3000);
        assert_eq!(speed.rates(), (200.0, 10.0));
        for second in 121..200 {
            speed.step(at(second), 50);
        }
        assert_eq!(speed.rates(), (50.0, 1.0));
    }
}
