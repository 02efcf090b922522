//! What flows through a service, told seldom: each write of a status wakes everybody who watches.
use lathe_api::{CapacityStatus, ThroughputStatus};
use lathe_contract::Load;
use lathe_scaling::Capacity;

use super::Facts;
use crate::{
    pods,
    scaling::{capacity_of, mean},
};

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
    let told = capacity(&loads);
    let known = old.and_then(|old| old.capacity_per_replica.clone());
    let fresh = ThroughputStatus {
        prompt: rate(prompt),
        generation: rate(generation),
        waiting,
        // What one can do is known while none runs.
        capacity_per_replica: told.clone().or_else(|| known.clone()),
    };
    let Some(old) = old else {
        // Figures appear with the first pod that has some.
        return (!loads.is_empty()).then_some(fresh);
    };
    // The first capacity is waited for: without it nothing is decided.
    if known.is_none() && told.is_some() {
        return Some(fresh);
    }
    let changed = moved(&old.prompt, prompt)
        || moved(&old.generation, generation)
        || old.waiting != waiting
        || known.zip(told).is_some_and(|(known, told)| other(&known, &told));
    Some(if changed && facts.may_write_throughput { fresh } else { old.clone() })
}

fn moved(old: &str, new: f64) -> bool {
    let old: f64 = old.parse().unwrap_or(0.0);
    (old - new).abs() > CHANGED_ENOUGH * old.max(new) && rate(old) != rate(new)
}

/// Whether a capacity is another one by more than noise.
fn other(known: &CapacityStatus, told: &CapacityStatus) -> bool {
    let (Some(known), Some(told)) = (capacity_of(known), capacity_of(told)) else { return true };
    let apart = |old: f64, new: f64| (old - new).abs() > CHANGED_ENOUGH * old.max(new);
    apart(known.prompt, told.prompt)
        || apart(known.generation, told.generation)
        || known.sequences != told.sequences
}

/// What a replica can do, on the average of those that have measured it; three digits of it.
fn capacity(loads: &[&Load]) -> Option<CapacityStatus> {
    let told = |load: &&Load| {
        let told = load.capacity?;
        Some(Capacity { prompt: told.prompt, generation: told.generation, sequences: told.sequences })
    };
    let mean = mean(&loads.iter().filter_map(told).collect::<Vec<_>>())?;
    let three = |rate: f64| {
        let places = (2 - rate.log10().floor() as i32).clamp(0, 6) as usize;
        format!("{:.places$}", rate.min(1e12))
    };
    Some(CapacityStatus {
        prompt: three(mean.prompt),
        generation: three(mean.generation),
        sequences: i64::from(mean.sequences).clamp(1, i32::MAX.into()),
    })
}

/// Tokens a second, for people.
fn rate(value: f64) -> String {
    let value = value.min(1e12);
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}
