//! How busy this replica is: written by the engine's thread, read by the report, the metrics and each answer.
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lathe_contract::{Load, ReplicaCapacity, Totals};

use super::rate::Rate;

/// The replica's figures.
#[derive(Debug)]
pub struct LoadMeter(Mutex<Figures>);

#[derive(Debug)]
struct Figures {
    running: usize,
    waiting: usize,
    cache_usage: f64,
    prompt: Rate,
    generation: Rate,
    /// Mean time of an answer in the engine, the last ones weighing most.
    answer: Option<f64>,
    capacity: Option<ReplicaCapacity>,
    totals: Totals,
}

impl LoadMeter {
    /// Idle from `now` on.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(Figures {
            running: 0,
            waiting: 0,
            cache_usage: 0.0,
            prompt: Rate::new(now),
            generation: Rate::new(now),
            answer: None,
            capacity: None,
            totals: Totals::default(),
        }))
    }

    /// A request came, let in or not.
    pub fn arrived(&self) {
        self.lock().totals.arrived += 1;
    }

    /// A request is over, however it ended.
    pub fn finished(&self) {
        self.lock().totals.finished += 1;
    }

    /// What the engine measured for itself, or learned.
    pub fn can(&self, capacity: ReplicaCapacity) {
        self.lock().capacity = Some(capacity);
    }

    /// What the engine holds after a step.
    pub fn holds(&self, running: usize, waiting: usize, cache_usage: f64) {
        let mut figures = self.lock();
        (figures.running, figures.waiting, figures.cache_usage) = (running, waiting, cache_usage);
    }

    /// Counts tokens of prompts that were read, those from the cache not with them, and tokens that were generated.
    pub fn count(&self, now: Instant, prompt: usize, generated: usize) {
        let mut figures = self.lock();
        figures.totals.prompt += prompt as i64;
        figures.totals.generation += generated as i64;
        figures.prompt.add(now, prompt as u64);
        figures.generation.add(now, generated as u64);
    }

    /// An answer took so long in the engine.
    pub fn answered(&self, took: Duration) {
        let mut figures = self.lock();
        let took = took.as_secs_f64();
        figures.answer = Some(figures.answer.map_or(took, |mean| mean + (took - mean) / 8.0));
    }

    /// Seconds after which one who is sent away now may find a place: `ahead` answers, `slots` at a time.
    pub fn retry_after(&self, ahead: usize, slots: usize) -> u64 {
        let mean = self.lock().answer.unwrap_or(1.0);
        (mean * ahead as f64 / slots.max(1) as f64).ceil().clamp(1.0, 60.0) as u64
    }

    /// The figures for the contract's report.
    pub fn read(&self, now: Instant) -> Load {
        let figures = self.lock();
        Load {
            running: figures.running as i64,
            waiting: figures.waiting as i64,
            cache_usage: figures.cache_usage,
            prompt_tokens_per_second: figures.prompt.per_second(now),
            generation_tokens_per_second: figures.generation.per_second(now),
            capacity: figures.capacity,
            totals: figures.totals,
        }
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, Figures> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value of ORCA's header `endpoint-load-metrics`, which load balancers read
/// (<https://github.com/cncf/xds/blob/main/xds/data/orca/v3/orca_load_report.proto>), under vLLM's names.
pub fn orca(load: &Load) -> String {
    let mut said = format!(
        "TEXT named_metrics.kv_cache_usage_perc={:.4}, named_metrics.num_requests_running={}, \
         named_metrics.num_requests_waiting={}, named_metrics.prompt_tokens_per_second={:.1}, \
         named_metrics.generation_tokens_per_second={:.1}",
        load.cache_usage,
        load.running,
        load.waiting,
        load.prompt_tokens_per_second,
        load.generation_tokens_per_second,
    );
    if let Some(ReplicaCapacity { prompt, generation, sequences }) = load.capacity {
        let _ = write!(
            said,
            ", named_metrics.capacity_prompt_tokens_per_second={prompt:.1}, \
             named_metrics.capacity_generation_tokens_per_second={generation:.1}, \
             named_metrics.capacity_sequences={sequences}"
        );
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::unknown(None, 3, 1, 3)]
    #[case::quick(Some(0.01), 3, 1, 1)]
    #[case::side_by_side(Some(4.0), 10, 4, 10)]
    #[case::never_very_long(Some(100.0), 100, 1, 60)]
    #[case::no_slots(Some(1.0), 0, 0, 1)]
    fn how_long_to_stay_away(
        #[case] answer: Option<f64>,
        #[case] ahead: usize,
        #[case] slots: usize,
        #[case] seconds: u64,
    ) {
        let load = LoadMeter::new(Instant::now());
        if let Some(took) = answer {
            load.answered(Duration::from_secs_f64(took));
        }
        assert_eq!(load.retry_after(ahead, slots), seconds);
    }

    #[test]
    fn a_report_of_what_is_held_and_counted() {
        let start = Instant::now();
        let load = LoadMeter::new(start);
        load.holds(2, 3, 0.25);
        load.can(ReplicaCapacity { prompt: 90.0, generation: 70.5, sequences: 4 });
        load.count(start, 20, 4);
        let now = start + Duration::from_secs(2);
        let read = load.read(now);
        assert_eq!((read.running, read.waiting, read.cache_usage), (2, 3, 0.25));
        assert_eq!((read.prompt_tokens_per_second, read.generation_tokens_per_second), (10.0, 2.0));
        assert_eq!(
            orca(&read),
            "TEXT named_metrics.kv_cache_usage_perc=0.2500, named_metrics.num_requests_running=2, \
             named_metrics.num_requests_waiting=3, named_metrics.prompt_tokens_per_second=10.0, \
             named_metrics.generation_tokens_per_second=2.0, \
             named_metrics.capacity_prompt_tokens_per_second=90.0, \
             named_metrics.capacity_generation_tokens_per_second=70.5, named_metrics.capacity_sequences=4"
        );
    }
}
