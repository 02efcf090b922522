//! Pure: what flows to a service whose workers everybody asks themselves, from what the workers counted since their start.
use std::collections::BTreeMap;

use lathe_contract::{Load, Totals};
use lathe_scaling::{Report, Seconds, Window};

/// What the workers of one service said.
#[derive(Debug, Default)]
pub struct Workers {
    /// The counts of each pod when it last answered, and when that was.
    counted: BTreeMap<String, (Totals, Seconds)>,
    /// When they were.
    asked: Option<Seconds>,
    window: Window,
}

impl Workers {
    /// Whether they were not asked for as long as `pause`.
    pub fn are_due(&self, pause: Seconds, now: Seconds) -> bool {
        self.asked.is_none_or(|asked| now.saturating_sub(asked) >= pause || now < asked)
    }

    /// Takes what each ready pod said by `now`; `None`: it did not answer. What was counted since they were last asked is spread
    /// evenly over the seconds between; a pod that is new counts from now on.
    pub fn hear(&mut self, said: &BTreeMap<String, Option<Load>>, now: Seconds) {
        let asked = self.asked.replace(now);
        let mut sum = Report::default();
        let mut counted = BTreeMap::new();
        for (pod, load) in said {
            let before = self.counted.get(pod).copied();
            let Some(load) = load else {
                sum.missing += 1;
                counted.extend(before.map(|before| (pod.clone(), before)));
                continue;
            };
            counted.insert(pod.clone(), (load.totals, now));
            sum.running += load.running as f64;
            sum.waiting += load.waiting as f64;
            if let Some((before, then)) = before {
                // A second's share: a pod that was silent for long, or not asked, did not do it all in the last second.
                let seconds = now.saturating_sub(then).max(1) as f64;
                let since = |of: fn(&Totals) -> i64| difference(of(&before), of(&load.totals)) / seconds;
                sum.arrived += since(|totals| totals.arrived);
                sum.finished += since(|totals| totals.finished);
                sum.prompt += since(|totals| totals.prompt);
                sum.generation += since(|totals| totals.generation);
            }
        }
        self.counted = counted;
        let Some(asked) = asked.filter(|asked| *asked < now) else { return };
        // What lies further back is not known any more.
        let first = asked.max(now.saturating_sub(MOST_SECONDS));
        (first + 1..=now).for_each(|at| self.window.push(Report { at, ..sum }));
    }

    /// What flowed in the last two minutes.
    pub fn window(&self) -> &Window {
        &self.window
    }
}

/// Seconds that one answer is spread over at most.
const MOST_SECONDS: Seconds = 10;

/// What was counted since; a worker that started again counts from 0.
fn difference(before: i64, now: i64) -> f64 {
    let since = if now < before { now } else { now.saturating_sub(before) };
    since.max(0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: Seconds = 1_700_000_000;

    fn load(arrived: i64, running: i64) -> Option<Load> {
        let totals = Totals { arrived, finished: arrived, ..Totals::default() };
        Some(Load { running, totals, ..Load::default() })
    }

    fn said(all: &[(&str, Option<Load>)]) -> BTreeMap<String, Option<Load>> {
        all.iter().map(|(pod, load)| ((*pod).to_owned(), load.clone())).collect()
    }

    fn report(at: Seconds, arrived: f64, running: f64, missing: u32) -> Report {
        Report { at: ZERO + at, arrived, finished: arrived, running, missing, ..Report::default() }
    }

    #[test]
    fn what_was_counted_is_spread_over_the_seconds_between() {
        let mut workers = Workers::default();
        assert!(workers.are_due(2, ZERO));
        workers.hear(&said(&[("a", load(100, 1))]), ZERO);
        assert_eq!(*workers.window(), Window::default(), "nothing is known yet");
        assert!(!workers.are_due(2, ZERO + 1) && workers.are_due(2, ZERO + 2));
        // A new pod counts from now on.
        workers.hear(&said(&[("a", load(106, 2)), ("b", load(50, 1))]), ZERO + 2);
        // One started again, one is gone for a moment.
        workers.hear(&said(&[("a", load(4, 0)), ("b", None)]), ZERO + 4);
        workers.hear(&said(&[("a", load(4, 0)), ("b", load(58, 0))]), ZERO + 6);
        workers.hear(&said(&[]), ZERO + 7);
        let expected = [
            report(1, 3.0, 3.0, 0),
            report(2, 3.0, 3.0, 0),
            report(3, 2.0, 0.0, 1),
            report(4, 2.0, 0.0, 1),
            // Eight in the four seconds since it last answered.
            report(5, 2.0, 0.0, 0),
            report(6, 2.0, 0.0, 0),
            report(7, 0.0, 0.0, 0),
        ];
        assert_eq!(*workers.window(), expected.into_iter().collect());
    }

    #[test]
    fn whatever_a_worker_says_is_a_number_of_requests() {
        let mut workers = Workers::default();
        for (at, arrived) in [i64::MIN, i64::MAX, -1, 0, i64::MIN].into_iter().enumerate() {
            workers.hear(&said(&[("a", load(arrived, i64::MIN))]), ZERO + at as Seconds * 1000);
        }
        let policy = lathe_scaling::Policy {
            min_replicas: 1,
            max_replicas: 9,
            target_throughput_percent: 70,
            scale_down_after: 10,
            scale_to_zero_after: None,
        };
        let replicas =
            lathe_scaling::Replicas { asked: 1, ready: 1, draining: 0, start_up: 0, capacity: None };
        let memory = lathe_scaling::Memory::default();
        let decision = lathe_scaling::decide(&policy, workers.window(), &memory, &replicas, ZERO + 4000);
        assert_eq!(decision.replicas, 1);
    }
}
