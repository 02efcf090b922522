//! What real load teaches of a replica's capacity; the clock is an argument.
//!
//! A replica that is saturated does what it can, so what it does is its capacity: while every sequence is in use, and only
//! once that was so for a whole window. (Requests wait only where every sequence is in use.) What is not saturated says what
//! was asked, and teaches nothing.
//!
//! The rule: a step takes as long as its tokens need, `prompt / capacity.prompt + generation / capacity.generation`. Steps
//! that read nothing tell `generation` by themselves; what steps with prompts took beyond their answers' share tells
//! `prompt`. Two sums and no matrix, and a load of one kind leaves the figure of the other alone. Each look moves a figure by
//! a quarter of the way: one stall of the machine costs less than a quarter, and a lasting change is followed within ten
//! looks, in both directions. No figure is ever further than [`BOUND`] times from the measured one.
//!
//! Where nothing else is known, half of the sequences in use tell a first guess. More sequences in a step are never slower
//! in tokens a second, so the truth is no less, and about twice as much at most: a replica more than needed, where none at all
//! would come to one that is never silent and never quite full.
use std::time::{Duration, Instant};

use lathe_contract::ReplicaCapacity;
use lathe_engine::StepTokens;

/// How long all sequences must have been in use.
const WINDOW: Duration = Duration::from_secs(5);
/// Seconds that a figure is seen for, at least: less tells too little.
const LEAST: f64 = 1.0;
/// How far one look moves a figure.
const GAIN: f64 = 0.25;
/// How many times more or less than was measured can be true.
const BOUND: f64 = 10.0;

/// What is known of a replica.
#[derive(Debug)]
pub struct Learner {
    sequences: u32,
    /// Measured while nobody asked for anything; `None`: that moment has not come yet.
    measured: Option<ReplicaCapacity>,
    window: Option<Window>,
    /// Of windows with all sequences in use.
    known: Figures,
    /// Of windows with half of them, until the other is known.
    guessed: Figures,
}

/// Steps while at least half of the sequences were in use.
#[derive(Debug)]
struct Window {
    begun: Instant,
    /// The end of the last step.
    last: Instant,
    /// All of them were.
    full: bool,
    seen: Seen,
}

/// Tokens a second, as far as they are known.
#[derive(Debug, Default)]
struct Figures {
    prompt: Option<f64>,
    generation: Option<f64>,
    /// Of whole windows, what no figure was made of yet.
    seen: Seen,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Steps that read nothing.
    answers: Steps,
    /// Steps that read prompts.
    prompts: Steps,
}

#[derive(Clone, Copy, Debug, Default)]
struct Steps {
    /// Seconds.
    took: f64,
    prompt: f64,
    generation: f64,
}

impl Steps {
    fn add(&mut self, other: Steps) {
        self.took += other.took;
        self.prompt += other.prompt;
        self.generation += other.generation;
    }
}

impl Learner {
    /// Nothing is known of a replica that decodes so many sequences at a time.
    pub fn new(sequences: usize) -> Self {
        let sequences = sequences as u32;
        let (known, guessed) = (Figures::default(), Figures::default());
        Self { sequences, measured: None, window: None, known, guessed }
    }

    /// It was measured; what load has taught already stays, within the bounds.
    pub fn measured(&mut self, capacity: ReplicaCapacity) -> ReplicaCapacity {
        self.measured = Some(capacity);
        let known = &mut self.known;
        let prompt = bounded(known.prompt.unwrap_or(capacity.prompt), Some(capacity.prompt));
        let generation = bounded(known.generation.unwrap_or(capacity.generation), Some(capacity.generation));
        (known.prompt, known.generation) = (Some(prompt), Some(generation));
        ReplicaCapacity { prompt, generation, ..capacity }
    }

    /// There is nothing to do: whatever is asked next, the time until then was not work.
    pub fn idle(&mut self) {
        self.window = None;
    }

    /// A step of so many sequences ended. Returns the capacity where this changes it.
    pub fn step(&mut self, now: Instant, sequences: usize, tokens: StepTokens) -> Option<ReplicaCapacity> {
        let all = self.sequences as usize;
        let full = sequences >= all;
        let known = self.known.both().is_some();
        if !full && (known || sequences * 2 < all) {
            self.window = None;
            return None;
        }
        let Some(window) = &mut self.window else {
            // When this step began is not known.
            self.window = Some(Window::begin(now));
            return None;
        };
        window.add(now, full, tokens);
        if now.saturating_duration_since(window.begun) < WINDOW {
            return None;
        }
        let Window { full, seen, .. } = self.window.replace(Window::begin(now))?;
        let mut learned = full && self.known.learn(seen, self.measured);
        if self.known.both().is_none() {
            learned = self.guessed.learn(seen, None);
        }
        let guessed = || self.guessed.both().or_else(|| self.guessed.of_prompts_alone());
        let (prompt, generation) = self.known.both().or_else(guessed)?;
        learned.then_some(ReplicaCapacity { prompt, generation, sequences: self.sequences })
    }
}

impl Figures {
    /// Tokens a second of prompts and of answers.
    fn both(&self) -> Option<(f64, f64)> {
        self.prompt.zip(self.generation)
    }

    /// The same where nothing but prompts was ever read, as where clients ask for embeddings alone: the second figure stands for
    /// nothing that flows, and gives way to the first answers.
    fn of_prompts_alone(&self) -> Option<(f64, f64)> {
        let answers =
            self.generation.is_some() || self.seen.answers.took > 0.0 || self.seen.prompts.generation > 0.0;
        self.prompt.filter(|_| !answers).map(|prompt| (prompt, prompt / BOUND))
    }

    /// Whether a window changes a figure.
    fn learn(&mut self, window: Seen, measured: Option<ReplicaCapacity>) -> bool {
        let Seen { answers, prompts } = &mut self.seen;
        answers.add(window.answers);
        prompts.add(window.prompts);
        let towards = |figure: Option<f64>, seen: f64, measured: Option<f64>| {
            let seen = bounded(seen, measured);
            Some(figure.map_or(seen, |figure| figure + GAIN * (seen - figure)))
        };
        let mut changed = false;
        if answers.took >= LEAST {
            let Steps { took, generation, .. } = std::mem::take(answers);
            self.generation = towards(self.generation, generation / took, measured.map(|m| m.generation));
            changed = true;
        }
        let share = match self.generation {
            Some(generation) => prompts.generation / generation,
            None if prompts.generation == 0.0 => 0.0,
            None => return changed,
        };
        // Where the answers' share were all of it, `generation` would be wrong: prompts take some of the time.
        let reading = (prompts.took - share).max(prompts.took / BOUND);
        if reading >= LEAST {
            let Steps { prompt, .. } = std::mem::take(prompts);
            self.prompt = towards(self.prompt, prompt / reading, measured.map(|m| m.prompt));
            changed = true;
        }
        changed
    }
}

fn bounded(figure: f64, measured: Option<f64>) -> f64 {
    measured.map_or(figure, |measured| figure.clamp(measured / BOUND, measured * BOUND))
}

impl Window {
    fn begin(now: Instant) -> Self {
        Self { begun: now, last: now, full: true, seen: Seen::default() }
    }

    fn add(&mut self, now: Instant, full: bool, tokens: StepTokens) {
        let Seen { answers, prompts } = &mut self.seen;
        (if tokens.prompt == 0 { answers } else { prompts }).add(Steps {
            took: now.saturating_duration_since(self.last).as_secs_f64(),
            prompt: tokens.prompt as f64,
            generation: tokens.generation as f64,
        });
        self.full &= full;
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};
    use rstest::rstest;

    use super::*;

    const SEQUENCES: usize = 8;
    const ALL: fn(u64) -> usize = |_| SEQUENCES;
    const FEW: fn(u64) -> usize = |_| SEQUENCES / 2 - 1;

    fn measured(prompt: f64, generation: f64) -> ReplicaCapacity {
        ReplicaCapacity { prompt, generation, sequences: SEQUENCES as u32 }
    }

    /// A replica that can do something else than was measured, with time that no step knows the length of.
    struct Machine {
        now: Instant,
        prompt: f64,
        generation: f64,
        noise: StdRng,
        learner: Learner,
        last: Option<ReplicaCapacity>,
    }

    impl Machine {
        fn new(seed: u64, prompt: f64, generation: f64) -> Self {
            let (now, noise) = (Instant::now(), StdRng::seed_from_u64(seed));
            Self { now, prompt, generation, noise, learner: Learner::new(SEQUENCES), last: None }
        }

        fn step(&mut self, sequences: usize, tokens: StepTokens) {
            let took = tokens.prompt as f64 / self.prompt + tokens.generation as f64 / self.generation;
            self.now += Duration::from_secs_f64(took * self.noise.random_range(0.8..1.2));
            self.last = self.learner.step(self.now, sequences, tokens).or(self.last);
        }

        /// Steps of which so many in a hundred read prompts.
        fn work(&mut self, seconds: u64, sequences: impl Fn(u64) -> usize, reading: u32) {
            let end = self.now + Duration::from_secs(seconds);
            while self.now < end {
                let reads = self.noise.random_range(0..100) < reading;
                let prompt = if reads { self.noise.random_range(16..512) } else { 0 };
                let sequences = sequences(self.noise.random());
                self.step(sequences, StepTokens { prompt, generation: sequences - usize::from(reads) });
            }
        }

        fn holds(&self, prompt: f64, generation: f64) {
            let Some(last) = self.last else { panic!("nothing was learned") };
            assert!((last.prompt / prompt - 1.0).abs() < 0.1, "{last:?}, and prompts are {prompt}");
            assert!(
                (last.generation / generation - 1.0).abs() < 0.1,
                "{last:?}, and answers are {generation}"
            );
        }
    }

    #[rstest]
    fn load_corrects_the_figures_in_both_directions(
        #[values(1, 2, 3)] seed: u64,
        #[values((900.0, 90.0), (2400.0, 40.0), (300.0, 160.0))] (prompt, generation): (f64, f64),
        #[values(10, 30)] reading: u32,
    ) {
        let mut machine = Machine::new(seed, prompt, generation);
        machine.learner.measured(measured(900.0, 90.0));
        // The rarest kind is a fiftieth of the time, and must be seen for a second to be looked at.
        machine.work(600, ALL, reading);
        machine.holds(prompt, generation);
    }

    #[test]
    fn load_of_one_kind_leaves_the_other_figure_alone() {
        let mut machine = Machine::new(1, 500.0, 45.0);
        machine.learner.measured(measured(900.0, 90.0));
        machine.work(120, ALL, 0);
        machine.holds(900.0, 45.0);
        let mut machine = Machine::new(1, 500.0, 45.0);
        machine.learner.measured(measured(900.0, 90.0));
        let end = machine.now + Duration::from_secs(120);
        while machine.now < end {
            machine.step(SEQUENCES, StepTokens { prompt: 400, generation: 0 });
        }
        machine.holds(500.0, 90.0);
    }

    #[test]
    fn a_replica_that_was_never_without_work_is_known_by_its_load() {
        let mut machine = Machine::new(4, 700.0, 60.0);
        machine.work(120, ALL, 20);
        machine.holds(700.0, 60.0);
        // And goes on being so when it can be measured at last.
        let kept = machine.learner.measured(measured(900.0, 90.0));
        assert_eq!(Some(kept), machine.last);
    }

    #[test]
    fn one_that_is_never_silent_and_never_quite_full_is_guessed_and_the_guess_gives_way() {
        let between = |random: u64| SEQUENCES / 2 + (random % (SEQUENCES as u64 / 2)) as usize;
        let mut machine = Machine::new(5, 700.0, 60.0);
        machine.work(60, FEW, 20);
        assert_eq!(machine.last, None);
        machine.work(60, between, 20);
        machine.holds(700.0, 60.0);
        // Steps with all of them show that it can do twice as much.
        (machine.prompt, machine.generation) = (1400.0, 120.0);
        machine.work(30, ALL, 20);
        machine.holds(1400.0, 120.0);
        let known = machine.last;
        machine.work(60, between, 20);
        assert_eq!(machine.last, known);
        // And so does a measurement.
        let mut machine = Machine::new(6, 700.0, 60.0);
        machine.work(60, between, 20);
        assert_eq!(machine.learner.measured(measured(1400.0, 120.0)), measured(1400.0, 120.0));
    }

    #[test]
    fn one_that_embeds_without_a_pause_is_known_by_its_prompts_until_answers_come() {
        let mut machine = Machine::new(7, 700.0, 60.0);
        let end = machine.now + Duration::from_secs(30);
        while machine.now < end {
            machine.step(SEQUENCES, StepTokens { prompt: 200, generation: 0 });
        }
        machine.holds(700.0, 70.0);
        machine.work(60, ALL, 20);
        machine.holds(700.0, 60.0);
    }

    #[test]
    fn what_is_not_saturated_for_a_whole_window_teaches_nothing() {
        let mut machine = Machine::new(1, 1000.0, 100.0);
        machine.learner.measured(measured(9000.0, 900.0));
        machine.work(120, FEW, 20);
        for _ in 0..30 {
            machine.work(3, ALL, 20);
            machine.learner.idle();
            machine.now += Duration::from_secs(60);
            machine.work(3, ALL, 20);
            machine.work(1, FEW, 20);
        }
        assert_eq!(machine.last, None);
    }

    #[rstest]
    #[case(1.0, 0.1, 90.0, 9.0)]
    #[case(1e5, 1e5, 9000.0, 900.0)]
    fn nonsense_is_bounded_by_what_was_measured(
        #[case] prompt: f64,
        #[case] generation: f64,
        #[case] bound_prompt: f64,
        #[case] bound_generation: f64,
    ) {
        let mut machine = Machine::new(1, prompt, generation);
        machine.learner.measured(measured(900.0, 90.0));
        for _ in 0..200_000 {
            let reads = machine.noise.random_range(0..4) == 0;
            machine.step(SEQUENCES, StepTokens { prompt: if reads { 400 } else { 0 }, generation: 7 });
        }
        let last = machine.last.expect("learned");
        assert!((bound_prompt / last.prompt - 1.0).abs() < 0.2, "{last:?}");
        assert!((bound_generation / last.generation - 1.0).abs() < 0.2, "{last:?}");
    }

    #[test]
    fn one_stall_costs_less_than_a_quarter() {
        let mut machine = Machine::new(1, 900.0, 90.0);
        machine.learner.measured(measured(900.0, 90.0));
        machine.work(60, ALL, 0);
        machine.now += Duration::from_secs(3600);
        machine.step(SEQUENCES, StepTokens { prompt: 0, generation: SEQUENCES });
        let generation = machine.last.expect("learned").generation;
        assert!((67.0..75.0).contains(&generation), "{generation}");
    }
}
