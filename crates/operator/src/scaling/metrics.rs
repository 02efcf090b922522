//! Counters of scaling, for Prometheus.
use std::sync::atomic::AtomicU64;

use lathe_scaling::{Decision, Policy, Reason, Replicas};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Counters of scaling.
#[derive(Default)]
pub struct ScalingMetrics {
    desired: Family<Service, Gauge>,
    load: Family<Service, Gauge<f64, AtomicU64>>,
    ready: Family<Service, Gauge>,
    most: Family<Service, Gauge>,
    unmeasured: Family<Service, Gauge>,
    decisions: Family<Decided, Counter>,
    unreported: Family<Decided, Counter>,
    gateways: Family<Outcome, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Service {
    namespace: String,
    name: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Decided {
    namespace: String,
    name: String,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl ScalingMetrics {
    /// Counters that `registry` shows.
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        let Self { desired, load, ready, most, unmeasured, decisions, unreported, gateways } = &this;
        registry.register(
            "desired_replicas",
            "Replicas that an autoscaled service is to have",
            desired.clone(),
        );
        registry.register(
            "load_replicas",
            "Work that an autoscaled service has, in replicas that it would keep fully busy",
            load.clone(),
        );
        registry.register(
            "ready_replicas",
            "Replicas of an autoscaled service that are ready",
            ready.clone(),
        );
        registry.register("max_replicas", "Replicas that an autoscaled service may have", most.clone());
        registry.register(
            "scaling_capacity_unknown",
            "1 while no replica of an autoscaled service has measured what it can do, else 0",
            unmeasured.clone(),
        );
        registry.register(
            "scaling_decisions",
            "Changes of a service's replicas, by reason",
            decisions.clone(),
        );
        registry.register(
            "scaling_unreported",
            "Decisions for which reports were late or missing, so that no replica was given back",
            unreported.clone(),
        );
        registry.register("gateway_polls", "Calls to gateways for what flows", gateways.clone());
        this
    }

    /// A gateway was asked.
    pub fn asked(&self, answered: bool) {
        let outcome = if answered { "answered" } else { "failed" };
        self.gateways.get_or_create(&Outcome { outcome }).inc();
    }

    /// It was decided how many replicas a service is to have, of those that there are.
    pub fn decided(
        &self,
        (namespace, name): (&str, &str),
        decision: &Decision,
        replicas: &Replicas,
        policy: &Policy,
    ) {
        let service = Service { namespace: namespace.to_owned(), name: name.to_owned() };
        self.desired.get_or_create(&service).set(decision.replicas.into());
        self.load.get_or_create(&service).set(decision.load);
        self.ready.get_or_create(&service).set(replicas.ready.into());
        self.most.get_or_create(&service).set(policy.max_replicas.max(policy.min_replicas).into());
        self.unmeasured.get_or_create(&service).set(replicas.capacity.is_none().into());
        if matches!(decision.reason, Reason::ReportsLate | Reason::ReportsMissing) {
            let Service { namespace, name } = service;
            let decided = Decided { namespace, name, reason: decision.reason.as_str() };
            self.unreported.get_or_create(&decided).inc();
        }
    }

    /// The replicas of a service were changed.
    pub fn changed(&self, (namespace, name): (&str, &str), reason: Reason) {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.decisions.get_or_create(&Decided { namespace, name, reason: reason.as_str() }).inc();
    }

    /// The service is not scaled any more.
    pub fn forget(&self, (namespace, name): (&str, &str)) {
        let service = Service { namespace: namespace.to_owned(), name: name.to_owned() };
        self.load.remove(&service);
        for family in [&self.desired, &self.ready, &self.most, &self.unmeasured] {
            family.remove(&service);
        }
        for reason in Reason::ALL {
            let Service { namespace, name } = service.clone();
            let decided = Decided { namespace, name, reason: reason.as_str() };
            self.decisions.remove(&decided);
            self.unreported.remove(&decided);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use lathe_scaling::Memory;

    use super::*;

    /// At most three replicas.
    pub const POLICY: Policy = Policy {
        min_replicas: 0,
        max_replicas: 3,
        target_throughput_percent: 70,
        scale_down_after: 60,
        scale_to_zero_after: None,
    };

    #[test]
    fn nothing_is_left_of_a_service_that_is_gone() {
        let mut registry = Registry::default();
        let metrics = ScalingMetrics::register(&mut registry);
        let replicas = Replicas { asked: 0, ready: 0, draining: 0, start_up: 0, capacity: None };
        for reason in Reason::ALL {
            let (message, memory) = (String::new(), Memory::default());
            let decision = Decision { replicas: 1, reason, message, load: 0.5, memory };
            metrics.decided(("team-a", "gone"), &decision, &replicas, &POLICY);
            metrics.changed(("team-a", "gone"), reason);
        }
        let text = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
            text
        };
        assert_eq!(text().matches(r#"name="gone""#).count(), 5 + Reason::ALL.len() + 2, "{}", text());
        metrics.forget(("team-a", "gone"));
        assert!(!text().contains("gone"), "{}", text());
    }
}
