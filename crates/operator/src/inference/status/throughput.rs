//! What flows through a service, told seldom: each write of a status wakes everybody who watches.
use lathe_api::ThroughputStatus;
use lathe_contract::Load;

use super::Facts;
use crate::pods;

/// A rate that moved by less than this share is not written again.
const CHANGED_ENOUGH: f64 = 0.1;

/// What flows, summed over the replicas; the old figures while nothing changed much or the last ones are fresh.
pub fn throughput(facts: &Facts<'_>, old: Option<&ThroughputStatus>) -> Option<ThroughputStatus> {
    let loads: Vec<_> = facts.reports.values().filter_map(|report| report.load.as_ref()).collect();
    if loads.is_empty() && facts.pods.iter().any(pods::is_ready) {
        // Ready pods that said nothing this time are no reason to forget what they said.
        return old.cloned();
    }
    let sum = |rate: fn(&Load) -> f64| -> f64 {
        loads
            .iter()
            .map(|load| rate(load))
            .filter(|rate| rate.is_finite() && *rate > 0.0)
            .fold(0.0, |a, b| a + b)
    };
    let (prompt, generation) = (sum(|l| l.prompt_tokens_per_second), sum(|l| l.generation_tokens_per_second));
    let waiting = loads.iter().map(|load| load.waiting.clamp(0, 1_000_000)).sum::<i64>().min(1_000_000_000);
    let fresh = ThroughputStatus { prompt: rate(prompt), generation: rate(generation), waiting };
    let Some(old) = old else {
        // Figures appear with the first pod that has some.
        return (!loads.is_empty()).then_some(fresh);
    };
    let moved = |old: &str, new: f64| {
        let old: f64 = old.parse().unwrap_or(0.0);
        (old - new).abs() > CHANGED_ENOUGH * old.max(new) && rate(old) != rate(new)
    };
    let changed = moved(&old.prompt, prompt) || moved(&old.generation, generation) || old.waiting != waiting;
    Some(if changed && facts.may_write_throughput { fresh } else { old.clone() })
}

/// Tokens a second, for people.
fn rate(value: f64) -> String {
    let value = value.min(1e12);
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}
