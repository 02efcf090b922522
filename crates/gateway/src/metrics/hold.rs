//! Numbers of the requests that wait here for a replica.
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Bounds in seconds: a swapped replica, a warm start, a cold one.
const SECONDS: [f64; 12] = [0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0];

/// What is counted.
#[derive(Debug)]
pub struct HoldMetrics {
    /// Requests that are held.
    pub now: Gauge<i64, AtomicI64>,
    begun: Counter,
    /// Requests that were refused, since as many were held as may be.
    pub refused: Counter,
    seconds: Histogram,
}

impl Default for HoldMetrics {
    fn default() -> Self {
        Self {
            now: Gauge::default(),
            begun: Counter::default(),
            refused: Counter::default(),
            seconds: Histogram::new(SECONDS),
        }
    }
}

impl HoldMetrics {
    /// Puts them where they are read.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("requests_held", "Requests that wait since no replica is ready", self.now.clone());
        registry.register(
            "holds",
            "Requests that had to wait since no replica was ready",
            self.begun.clone(),
        );
        registry.register(
            "holds_refused",
            "Requests that were refused since no replica was ready and as many waited as may",
            self.refused.clone(),
        );
        registry.register(
            "hold_seconds",
            "How long requests waited for a replica, answered in the end or not",
            self.seconds.clone(),
        );
    }

    /// A request begins to be held.
    pub fn begins(&self) {
        self.begun.inc();
        self.now.inc();
    }

    /// One that `waited` so long is held no longer; `waits`: it was until now.
    pub fn ends(&self, waited: Duration, waits: bool) {
        self.seconds.observe(waited.as_secs_f64());
        if waits {
            self.now.dec();
        }
    }
}
