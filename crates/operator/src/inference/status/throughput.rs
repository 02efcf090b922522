//! What flows through a service, told seldom: each write of a status wakes everybody who watches.
use std::collections::BTreeMap;

use kube::ResourceExt as _;
use lathe_api::{CapacityStatus, ThroughputStatus, names};
use lathe_contract::Load;
use lathe_scaling::Capacity;

use super::Facts;
use crate::{
    inference::build::revision,
    pods,
    scaling::{self, capacity_of, mean},
};

/// A rate that moved by less than this share is not written again.
const CHANGED_ENOUGH: f64 = 0.1;

/// What flows, summed over the replicas; the old figures while nothing changed much or the last ones are fresh.
pub fn throughput(facts: &Facts<'_>, old: Option<&ThroughputStatus>) -> Option<ThroughputStatus> {
    let holds = |known: &CapacityStatus| scaling::holds(&known.revision, facts.deployment, facts.pods);
    let old = old
        .cloned()
        .map(|old| ThroughputStatus { capacity_per_replica: old.capacity_per_replica.filter(holds), ..old });
    let loads: Vec<_> = facts.reports.values().filter_map(|report| report.load.as_ref()).collect();
    if loads.is_empty() && facts.pods.iter().any(pods::is_ready) {
        // Ready pods that said nothing this time are no reason to forget what they said.
        return old;
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
    let known = old.as_ref().and_then(|old| old.capacity_per_replica.clone());
    let told = capacity(facts, known.as_ref());
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
    // A revision's first capacity is waited for: without it nothing is decided.
    if told.as_ref().is_some_and(|told| known.as_ref().is_none_or(|known| known.revision != told.revision)) {
        return Some(fresh);
    }
    let changed = moved(&old.prompt, prompt)
        || moved(&old.generation, generation)
        || old.waiting != waiting
        || known.zip(told).is_some_and(|(known, told)| other(&known, &told));
    Some(if changed && facts.may_write_throughput { fresh } else { old })
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

/// What a replica can do, on the average of those of one revision that have measured it; three digits of it. The revision is that
/// which all are to be of; until one of those is `known`, that of which most have.
fn capacity(facts: &Facts<'_>, known: Option<&CapacityStatus>) -> Option<CapacityStatus> {
    let mut told: BTreeMap<String, Vec<Capacity>> = BTreeMap::new();
    for pod in facts.pods {
        let load = facts.reports.get(&pod.name_any()).and_then(|report| report.load.as_ref());
        let Some((can, checksum)) =
            load.and_then(|load| load.capacity).zip(pods::checksum(Some(&pod.metadata)))
        else {
            continue;
        };
        let can = Capacity { prompt: can.prompt, generation: can.generation, sequences: can.sequences };
        told.entry(names::revision(checksum)).or_default().push(can);
    }
    let wanted = facts.deployment.and_then(revision).map(names::revision).unwrap_or_default();
    let revision = match told.contains_key(&wanted) || known.is_some_and(|known| known.revision == wanted) {
        true => wanted,
        false => told.iter().max_by_key(|(_, all)| all.len())?.0.clone(),
    };
    let mean = mean(told.get(&revision)?)?;
    let three = |rate: f64| {
        let places = (2 - rate.log10().floor() as i32).clamp(0, 6) as usize;
        format!("{:.places$}", rate.min(1e12))
    };
    Some(CapacityStatus {
        revision,
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
