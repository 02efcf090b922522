//! Counters of scaling, for Prometheus.
use std::sync::atomic::AtomicU64;

use lathe_scaling::{Decision, Reason};
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
        let Self { desired, load, decisions, unreported, gateways } = &this;
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

    /// It was decided how many replicas a service is to have; `changed`: other than it had.
    pub fn decided(&self, (namespace, name): (&str, &str), decision: &Decision, changed: bool) {
        let service = Service { namespace: namespace.to_owned(), name: name.to_owned() };
        self.desired.get_or_create(&service).set(decision.replicas.into());
        self.load.get_or_create(&service).set(decision.load);
        let Service { namespace, name } = service;
        let decided = Decided { namespace, name, reason: decision.reason.as_str() };
        if changed {
            self.decisions.get_or_create(&decided).inc();
        }
        if matches!(decision.reason, Reason::ReportsLate | Reason::ReportsMissing) {
            self.unreported.get_or_create(&decided).inc();
        }
    }

    /// The service is not scaled any more.
    pub fn forget(&self, (namespace, name): (&str, &str)) {
        let service = Service { namespace: namespace.to_owned(), name: name.to_owned() };
        self.desired.remove(&service);
        self.load.remove(&service);
    }
}
