//! What services cost, for Prometheus.
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, atomic::AtomicU64};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

/// What the ready replicas of each service cost in an hour.
#[derive(Default)]
pub struct Costs {
    hourly: Family<Paid, Gauge<f64, AtomicU64>>,
    /// By namespace and name: a service has one series, whatever it was paid in before.
    told: Mutex<HashMap<(String, String), Paid>>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Paid {
    namespace: String,
    name: String,
    currency: String,
}

impl Costs {
    /// One that `registry`, whose prefix is `lathe`, shows.
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register(
            "inferenceservice_cost_per_hour",
            "What the ready replicas of a service cost in an hour, by the price of its profile's devices",
            this.hourly.clone(),
        );
        this
    }

    /// What a service costs; `None`: it has no price, or is gone.
    pub fn tell(&self, (namespace, name): (&str, &str), cost: Option<(f64, &str)>) {
        let place = (namespace.to_owned(), name.to_owned());
        let paid = cost.map(|(amount, currency)| {
            let (namespace, name) = place.clone();
            (amount, Paid { namespace, name, currency: currency.to_owned() })
        });
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match &paid {
            Some((_, paid)) => told.insert(place, paid.clone()),
            None => told.remove(&place),
        };
        if let Some(before) = before.filter(|before| paid.as_ref().is_none_or(|(_, paid)| paid != before)) {
            self.hourly.remove(&before);
        }
        if let Some((amount, paid)) = paid {
            self.hourly.get_or_create(&paid).set(amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_one_series_while_it_has_a_price() {
        let mut registry = Registry::with_prefix("lathe");
        let costs = Costs::register(&mut registry);
        let series = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines
                .map(|line| line.trim_start_matches("lathe_inferenceservice_cost_per_hour").to_owned())
                .collect()
        };
        let expect = |expected: &[&str]| {
            let found: Vec<String> = series();
            assert_eq!(found, expected);
        };
        costs.tell(("a", "s"), Some((1.5, "EUR")));
        expect(&[r#"{namespace="a",name="s",currency="EUR"} 1.5"#]);
        costs.tell(("a", "s"), Some((0.0, "USD")));
        expect(&[r#"{namespace="a",name="s",currency="USD"} 0.0"#]);
        costs.tell(("b", "s"), None);
        costs.tell(("a", "s"), None);
        expect(&[]);
    }
}
