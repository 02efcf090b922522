//! How many tokens a second this replica can read and write, measured as it starts.
//!
//! It is measured while nobody asks for anything: a replica is ready before it knows, a request waits for one step of the
//! measurement at most, and a measurement that was broken off goes on later. Each part takes a second or, where a step takes
//! longer than that, one step. Only whole steps count, by the clock on the wall: so a limit on processor time, which stops
//! all threads for a part of every tenth of a second, is in the figures.
//!
//! A replica whose clients leave it no silence does it in pieces between them ([`Pieces`]): it may be at the limit of its
//! processor time with its sequences never all in use (answers of a few tokens), and load would teach nothing either.
//!
//! - **Prompts**: one prompt a step, of as many tokens as a step of a quarter of a second reads, but at least
//!   [`SHORT`] and at most what one step may hold. Longer prompts are read in such steps too.
//! - **Generation**: as many sequences as the replica takes, a token of each in a step, from their first token on. Answers
//!   behind long prompts come slower, which real load teaches (see [`super::learning`]).
//!
//! The sequences share no beginning with anybody's, so nothing that is kept for prompts is found or left behind.
use std::time::{Duration, Instant};

use lathe_contract::ReplicaCapacity;
use lathe_engine::Generator;
use lathe_engine::plan::{BLOCK, ServePlan};

use super::warm_up::GREEDY;
use crate::failure::Done;

/// How long nobody must have asked for anything.
pub const PAUSE: Duration = Duration::from_secs(1);
/// How long silence is waited for before the measurement goes by pieces, and how much time is the clients' between two of them.
const SILENCE: Duration = Duration::from_secs(10);
const BETWEEN: Duration = Duration::from_secs(1);
/// A piece, to the end of its last step: so long a request waits for it.
const PIECE: Duration = Duration::from_millis(250);
/// Time for each of the two parts.
const TIME: Duration = Duration::from_secs(1);
/// How long a step with a prompt should take.
const STEP: Duration = Duration::from_millis(250);
/// Tokens of the first prompt, by which the length of the others is chosen.
const SHORT: usize = 64;
/// Tokens of an answer, at most.
const ANSWER: usize = 64;

/// A measurement, a step at a time.
pub struct Measurement {
    course: Course,
    sequences: usize,
    vocab: usize,
    /// Tokens of an answer.
    answer: usize,
    under_way: bool,
}

impl Measurement {
    /// Of what `plan` holds.
    pub fn new(plan: &ServePlan) -> Self {
        // So many that no sequence is sent away for want of room: one token is the prompt.
        let fitting = (plan.cache_blocks / plan.max_sequences).max(1) * BLOCK - 1;
        Self {
            course: Course::new(plan.max_batch_tokens.min(plan.context - 1)),
            sequences: plan.max_sequences,
            vocab: plan.shape.vocab,
            answer: ANSWER.min(fitting).min(plan.context - 1),
            under_way: false,
        }
    }

    /// Whether its sequences may be in the engine.
    pub fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// One forward pass; the figures after the last one.
    ///
    /// # Errors
    /// The engine's.
    pub fn step(&mut self, generator: &mut Generator) -> Done<Option<ReplicaCapacity>> {
        self.under_way = true;
        let work = self.course.next();
        // A prompt's answer is over with its first token, and answers that are over are asked again.
        if generator.idle() {
            match work {
                Work::Prompt(length) => {
                    generator.add_sequence(u64::MAX, &self.prompt(length), None, GREEDY, 1)?;
                }
                Work::Answers => {
                    for (id, token) in self.ids().zip(self.prompt(self.sequences)) {
                        generator.add_sequence(id, &[token], None, GREEDY, self.answer)?;
                    }
                }
            }
        }
        let begun = Instant::now();
        let emitted = generator.step()?.len();
        let took = begun.elapsed();
        let tokens = match work {
            Work::Prompt(_) => generator.last_step().prompt,
            Work::Answers => emitted,
        };
        let figures = self.course.did(tokens, took);
        if figures.is_some() {
            self.pause(generator);
        }
        let sequences = self.sequences as u32;
        Ok(figures.map(|(prompt, generation)| ReplicaCapacity { prompt, generation, sequences }))
    }

    /// Takes its sequences out of the engine; the next step goes on where this one was.
    pub fn pause(&mut self, generator: &mut Generator) {
        if std::mem::take(&mut self.under_way) {
            self.ids().for_each(|id| generator.remove(id));
        }
    }

    /// Tokens that lie apart from each other in the vocabulary, as those of a text do.
    pub(super) fn prompt(&self, length: usize) -> Vec<u32> {
        let token = |place: u64| place.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.vocab.max(1) as u64;
        (1..=length as u64).map(|place| token(place) as u32).collect()
    }

    /// Numbers that no request has.
    fn ids(&self) -> impl Iterator<Item = u64> + use<> {
        (0..self.sequences as u64).map(|i| u64::MAX - i)
    }
}

/// When the next piece of a measurement is due that silence was not given for.
#[derive(Debug)]
pub struct Pieces {
    next: Instant,
}

impl Pieces {
    /// Of a replica that serves from `now` on.
    pub fn new(now: Instant) -> Self {
        Self { next: now + SILENCE }
    }

    /// The end of a piece that begins at `now`, if one is due.
    pub fn end(&self, now: Instant) -> Option<Instant> {
        (self.next <= now).then(|| now + PIECE)
    }

    /// It ended at `now`.
    pub fn ended(&mut self, now: Instant) {
        self.next = now + BETWEEN;
    }
}

/// What a step has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Read a prompt of so many tokens.
    Prompt(usize),
    /// Continue every answer.
    Answers,
}

/// What comes after what, apart from the engine and the clock.
#[derive(Debug)]
struct Course {
    /// Tokens of a prompt that one step reads, at most.
    longest: usize,
    part: Part,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    /// A short prompt: nothing is known, and memory is touched for the first time.
    First,
    /// The same for prompts of this length.
    Settle(usize),
    Prompts(usize, Sum),
    Answers {
        prompt: f64,
        sum: Sum,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    tokens: usize,
    took: Duration,
}

impl Sum {
    fn with(self, tokens: usize, took: Duration) -> Self {
        Self { tokens: self.tokens + tokens, took: self.took + took }
    }

    /// Tokens a second, once it was long enough.
    fn rate(self) -> Option<f64> {
        (self.took >= TIME).then(|| self.tokens as f64 / self.took.as_secs_f64())
    }
}

impl Course {
    fn new(longest: usize) -> Self {
        Self { longest, part: Part::First }
    }

    fn next(&self) -> Work {
        match self.part {
            Part::First => Work::Prompt(SHORT.min(self.longest)),
            Part::Settle(length) | Part::Prompts(length, _) => Work::Prompt(length),
            Part::Answers { .. } => Work::Answers,
        }
    }

    /// A step was done; tokens a second of prompts and of answers after the last one.
    fn did(&mut self, tokens: usize, took: Duration) -> Option<(f64, f64)> {
        self.part = match self.part {
            Part::First => {
                let share = STEP.as_secs_f64() / took.as_secs_f64().max(1e-9);
                let fitting = (tokens as f64 * share) as usize;
                let length = fitting.clamp(SHORT.min(self.longest), self.longest);
                if length > tokens { Part::Settle(length) } else { Part::Prompts(length, Sum::default()) }
            }
            Part::Settle(length) => Part::Prompts(length, Sum::default()),
            Part::Prompts(length, sum) => {
                let sum = sum.with(tokens, took);
                let next = |prompt| Part::Answers { prompt, sum: Sum::default() };
                sum.rate().map_or(Part::Prompts(length, sum), next)
            }
            Part::Answers { prompt, sum } => {
                let sum = sum.with(tokens, took);
                if let Some(generation) = sum.rate() {
                    return Some((prompt, generation));
                }
                Part::Answers { prompt, sum }
            }
        };
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    /// Runs a course on a machine that takes so long for each kind of step; its steps, and how long it all took.
    fn run(longest: usize, takes: impl Fn(Work) -> f64) -> ((f64, f64), Vec<Work>, f64) {
        const SEQUENCES: usize = 8;
        let mut course = Course::new(longest);
        let (mut steps, mut all) = (Vec::new(), 0.0);
        loop {
            let work = course.next();
            let took = takes(work);
            steps.push(work);
            all += took;
            let tokens = match work {
                Work::Prompt(length) => length,
                Work::Answers => SEQUENCES,
            };
            if let Some(figures) = course.did(tokens, Duration::from_secs_f64(took)) {
                return (figures, steps, all);
            }
            assert!(steps.len() < 10_000, "it comes to no end");
        }
    }

    #[rstest]
    #[case::of_a_quarter_of_a_second(1000.0, 0.05, 250)]
    #[case::of_no_more_than_a_step_holds(100_000.0, 0.001, 512)]
    #[case::a_slow_one_of_the_shortest(40.0, 3.0, 64)]
    fn prompts_are_as_long_as_a_short_step_allows(
        #[case] prompts: f64,
        #[case] answers: f64,
        #[case] length: usize,
    ) {
        let takes = |work| match work {
            Work::Prompt(length) => length as f64 / prompts,
            Work::Answers => answers,
        };
        let ((prompt, generation), steps, took) = run(512, takes);
        assert!((prompt / prompts - 1.0).abs() < 1e-6, "{prompt}");
        assert!((generation * answers / 8.0 - 1.0).abs() < 1e-6, "{generation}");
        let longest =
            steps.iter().map(|work| if let Work::Prompt(length) = work { *length } else { 0 }).max();
        assert!(longest.is_some_and(|longest| longest.abs_diff(length) <= 1), "{longest:?}");
        // Two seconds, what comes before them, and the steps that were begun before their end.
        assert!(took < 2.0 + 2.0 * 1.6 + 3.0, "{took} s");
    }

    #[test]
    fn pieces_are_due_after_silence_was_waited_for_and_leave_time_between() {
        let begun = Instant::now();
        let at = |seconds: f64| begun + Duration::from_secs_f64(seconds);
        let mut pieces = Pieces::new(begun);
        assert_eq!(pieces.end(at(9.9)), None);
        assert_eq!(pieces.end(at(10.5)), Some(at(10.75)));
        pieces.ended(at(11.0));
        assert_eq!(pieces.end(at(11.9)), None);
        assert_eq!(pieces.end(at(12.0)), Some(at(12.25)));
    }

    #[test]
    fn the_first_steps_of_each_length_do_not_count() {
        let seen = std::cell::Cell::new(0);
        let takes = |work| match work {
            // Memory that is touched for the first time.
            Work::Prompt(length) if length > seen.replace(seen.get().max(length)) => {
                3.0 * length as f64 / 1000.0
            }
            Work::Prompt(length) => length as f64 / 1000.0,
            Work::Answers => 0.1,
        };
        let ((prompt, _), ..) = run(512, takes);
        assert!((prompt - 1000.0).abs() < 1e-6, "{prompt}");
    }

    #[test]
    fn a_context_that_is_shorter_than_a_short_prompt_is_enough() {
        let ((prompt, generation), steps, _) = run(1, |_| 0.2);
        assert_eq!((steps[0], prompt.round(), generation.round()), (Work::Prompt(1), 5.0, 40.0));
    }
}
