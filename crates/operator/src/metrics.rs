//! Counters of reconciles, for Prometheus.
use std::time::Instant;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{costs::Costs, scaling::ScalingMetrics};

/// Counters of reconciles.
pub struct Metrics {
    registry: Registry,
    reconciles: Family<Kind, Counter>,
    failures: Family<Failure, Counter>,
    seconds: Family<Kind, Histogram>,
    leader: Gauge,
    rollouts: Family<Outcome, Counter>,
    /// Those of scaling.
    pub scaling: ScalingMetrics,
    /// What services cost.
    pub costs: Costs,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Failure {
    kind: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut all = Registry::with_prefix("lathe");
        let costs = Costs::register(&mut all);
        let registry = all.sub_registry_with_prefix("operator");
        let (reconciles, failures, leader) = (Family::default(), Family::default(), Gauge::default());
        let histogram: fn() -> Histogram =
            || Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]);
        let seconds = Family::new_with_constructor(histogram);
        registry.register("reconciles", "Reconciles that were started", reconciles.clone());
        registry.register(
            "reconcile_failures",
            "Reconciles that failed and are tried again",
            failures.clone(),
        );
        registry.register("reconcile_duration_seconds", "Duration of reconciles", seconds.clone());
        registry.register(
            "leader",
            "1 while this replica works, 0 while it waits for the lease",
            leader.clone(),
        );
        let rollouts = Family::<Outcome, Counter>::default();
        registry.register("rollouts", "Candidates that were tried, by what came of it", rollouts.clone());
        let scaling = ScalingMetrics::register(registry);
        Self { registry: all, reconciles, failures, seconds, leader, rollouts, scaling, costs }
    }
}

impl Metrics {
    /// Counts a reconcile; its duration is known when the timer is dropped.
    pub fn reconcile(&self, kind: &'static str) -> Timer<'_> {
        self.reconciles.get_or_create(&Kind { kind }).inc();
        Timer { metrics: self, kind, started: Instant::now() }
    }

    /// Counts a failure.
    pub fn failed(&self, kind: &'static str, reason: &'static str) {
        self.failures.get_or_create(&Failure { kind, reason }).inc();
    }

    /// A candidate has held its gates, or has not.
    pub fn rolled_out(&self, promoted: bool) {
        let outcome = if promoted { "promoted" } else { "failed" };
        self.rollouts.get_or_create(&Outcome { outcome }).inc();
    }

    /// This replica works from now on.
    pub fn lead(&self) {
        self.leader.set(1);
    }

    /// In the OpenMetrics text format.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Measures until it is dropped.
pub struct Timer<'a> {
    metrics: &'a Metrics,
    kind: &'static str,
    started: Instant,
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.metrics.seconds.get_or_create(&Kind { kind: self.kind }).observe(seconds);
    }
}

#[cfg(test)]
#[path = "../../../tests/monitoring/recorded.rs"]
mod recorded;

#[cfg(test)]
mod tests {
    use lathe_scaling::{Decision, Memory, Reason, Replicas};

    use super::*;
    use crate::scaling::metrics_tests::POLICY;

    #[test]
    fn the_recorded_numbers_are_those_that_prometheus_reads() {
        let metrics = Metrics::default();
        for kind in ["Model", "FineTuneJob", "InferenceService"] {
            drop(metrics.reconcile(kind));
        }
        metrics.failed("InferenceService", "WriteFailed");
        metrics.lead();
        for (reason, replicas) in [(Reason::RequestHeld, 1), (Reason::ReportsMissing, 1)] {
            let (message, memory) = (String::new(), Memory::default());
            let decision = Decision { replicas, reason, message, load: 0.5, memory };
            let asked = u32::from(reason != Reason::RequestHeld);
            let replicas = Replicas { asked, ready: asked, draining: 0, start_up: 0, capacity: None };
            metrics.scaling.decided(("team-a", "support"), &decision, &replicas, &POLICY);
        }
        metrics.scaling.changed(("team-a", "support"), Reason::RequestHeld);
        [true, false].iter().for_each(|promoted| metrics.rolled_out(*promoted));
        metrics.costs.tell(("team-a", "support"), Some((2.5, "USD")));
        [true, false].iter().for_each(|answered| metrics.scaling.asked(*answered));
        recorded::hold("operator.txt", &metrics.text().expect("text"));
    }
}
