//! Numbers for Prometheus, by key and model; names after vLLM's and OpenTelemetry's GenAI conventions.
use std::collections::HashMap;
use std::sync::atomic::AtomicI64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lathe_contract::Usage;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

mod canary;
mod hold;

use crate::account::By;
use crate::table::Model;
pub use canary::CanaryMetrics;
pub use hold::HoldMetrics;

/// What the gateway counts.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    refused: Family<Refused, Counter>,
    prompt_tokens: Family<Asked, Counter>,
    cached_tokens: Family<Asked, Counter>,
    generation_tokens: Family<Asked, Counter>,
    repeats: Family<Repeated, Counter>,
    broken: Family<Broken, Counter>,
    first_byte: Family<Named, Histogram>,
    duration: Family<Named, Histogram>,
    /// Requests that are being answered.
    pub in_flight: Gauge<i64, AtomicI64>,
    /// Requests whose replica did not believe the gateway's token.
    pub tokens_refused: Counter,
    /// Watches that failed last time.
    pub watches_failing: Gauge<i64, AtomicI64>,
    /// Unix time in seconds at which the table was made.
    pub table_updated: Gauge<i64, AtomicI64>,
    /// Lines that the usage log could not take.
    pub usage_lines_lost: Counter,
    /// Every label set that something was counted of.
    seen: Mutex<HashMap<Asked, Counted>>,
    /// Of requests that wait for a replica.
    pub hold: HoldMetrics,
    /// Of services whose revisions are compared.
    pub canary: CanaryMetrics,
    /// Keys that are in force.
    pub keys: Gauge<i64, AtomicI64>,
    month_tokens: Family<Key, Gauge<i64, AtomicI64>>,
    month_budget: Family<Key, Gauge<i64, AtomicI64>>,
    /// Entries of the Secret that are no keys.
    pub keys_broken: Gauge<i64, AtomicI64>,
    /// 1 where the Secret could be read last time.
    pub keys_readable: Gauge<i64, AtomicI64>,
    /// Unix time in seconds at which counts were last exchanged.
    pub counts_exchanged: Gauge<i64, AtomicI64>,
    /// Entries of the counts' ConfigMap that cannot be read.
    pub counts_broken: Gauge<i64, AtomicI64>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Asked {
    key: String,
    namespace: String,
    model: String,
    adapter: String,
}

/// What is counted of a label set, at hand: a look for each of them in its family would be most of what an answer's count costs.
#[derive(Debug)]
struct Counted {
    /// By the statuses of its requests.
    requests: HashMap<(u16, By), Counter>,
    /// Of prompts, from a cache and generated, once there were any.
    tokens: Option<[Counter; 3]>,
    first_byte: Option<Histogram>,
    duration: Histogram,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    key: String,
    namespace: String,
    model: String,
    adapter: String,
    code: u16,
    by: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Key {
    key: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Refused {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Repeated {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Broken {
    by: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Named {
    namespace: String,
    model: String,
}

/// Bounds in seconds, as vLLM's of the time to the first token and of whole requests.
const FIRST_BYTE: [f64; 14] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0, 160.0];
const DURATION: [f64; 14] =
    [0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 240.0, 960.0, 1920.0];

impl Default for Metrics {
    fn default() -> Self {
        let first_byte: fn() -> Histogram = || Histogram::new(FIRST_BYTE);
        let duration: fn() -> Histogram = || Histogram::new(DURATION);
        let mut metrics = Self {
            registry: Registry::with_prefix("lathe_gateway"),
            requests: Family::default(),
            refused: Family::default(),
            prompt_tokens: Family::default(),
            cached_tokens: Family::default(),
            generation_tokens: Family::default(),
            repeats: Family::default(),
            broken: Family::default(),
            first_byte: Family::new_with_constructor(first_byte),
            duration: Family::new_with_constructor(duration),
            in_flight: Gauge::default(),
            tokens_refused: Counter::default(),
            watches_failing: Gauge::default(),
            table_updated: Gauge::default(),
            usage_lines_lost: Counter::default(),
            seen: Mutex::default(),
            hold: HoldMetrics::default(),
            canary: CanaryMetrics::default(),
            keys: Gauge::default(),
            month_tokens: Family::default(),
            month_budget: Family::default(),
            keys_broken: Gauge::default(),
            keys_readable: Gauge::default(),
            counts_exchanged: Gauge::default(),
            counts_broken: Gauge::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "requests",
            "Requests that were sent to replicas, by status and by who gave it: the replica, the gateway, or the client by leaving",
            self.requests.clone(),
        );
        registry.register(
            "requests_refused",
            "Requests that the gateway refused itself",
            self.refused.clone(),
        );
        registry.register("prompt_tokens", "Tokens of prompts", self.prompt_tokens.clone());
        registry.register(
            "cached_tokens",
            "Of the tokens of prompts, those that came from a replica's cache",
            self.cached_tokens.clone(),
        );
        registry.register("generation_tokens", "Generated tokens", self.generation_tokens.clone());
        registry.register(
            "requests_repeated",
            "Requests that were sent to one replica more, none of whose answer had been sent",
            self.repeats.clone(),
        );
        registry.register(
            "streams_broken",
            "Answers that ended before their end, by who was lost: the replica, or the client of a stream",
            self.broken.clone(),
        );
        registry.register(
            "time_to_first_byte_seconds",
            "From arrival to the first byte of an answer's body",
            self.first_byte.clone(),
        );
        registry.register(
            "request_duration_seconds",
            "From arrival to the last byte of the answer",
            self.duration.clone(),
        );
        registry.register("requests_in_flight", "Requests that are being answered", self.in_flight.clone());
        registry.register(
            "tokens_refused",
            "Requests whose replica did not believe the gateway's own token",
            self.tokens_refused.clone(),
        );
        registry.register(
            "watches_failing",
            "Watches of the API server that failed last time; the table stays as it was",
            self.watches_failing.clone(),
        );
        registry.register(
            "table_updated_timestamp_seconds",
            "Unix time at which services and their pods were last seen to change",
            self.table_updated.clone(),
        );
        registry.register(
            "usage_lines_lost",
            "Lines that the usage log could not take, since nobody read it fast enough",
            self.usage_lines_lost.clone(),
        );
        self.hold.register(registry);
        self.canary.register(registry);
        registry.register("keys", "Keys that are in force", self.keys.clone());
        registry.register(
            "key_month_tokens",
            "Tokens that a key with a budget has used this month, of all the gateway's replicas",
            self.month_tokens.clone(),
        );
        registry.register(
            "key_month_budget_tokens",
            "Tokens that a key may use in a month",
            self.month_budget.clone(),
        );
        registry.register("keys_broken", "Entries of the Secret that are no keys", self.keys_broken.clone());
        registry.register(
            "keys_readable",
            "1 where the keys could be read last time, else 0",
            self.keys_readable.clone(),
        );
        registry.register(
            "counts_exchanged_timestamp_seconds",
            "Unix time at which what keys used was last exchanged with the gateway's other replicas",
            self.counts_exchanged.clone(),
        );
        registry.register(
            "counts_broken",
            "Entries of the ConfigMap lathe-gateway-usage that cannot be read",
            self.counts_broken.clone(),
        );
    }

    /// What a key has used of its month's budget.
    pub fn of_budget(&self, key: &str, used: u64, budget: u64) {
        let key = Key { key: key.to_owned() };
        for (family, tokens) in [(&self.month_tokens, used), (&self.month_budget, budget)] {
            family.get_or_create(&key).set(i64::try_from(tokens).unwrap_or(i64::MAX));
        }
    }

    /// Other keys have budgets.
    pub fn forget_budgets(&self) {
        self.month_tokens.clear();
        self.month_budget.clear();
    }

    /// The gateway refused a request itself; `reason` is the error's code.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Refused { reason }).inc();
    }

    /// A request goes to another replica, since the one before refused the connection, lost it, drains or is full.
    pub fn repeated(&self, reason: &'static str) {
        self.repeats.get_or_create(&Repeated { reason }).inc();
    }

    /// A stream ends before its end, since the `replica` or the `client` was lost.
    pub fn broken(&self, by: &'static str) {
        self.broken.get_or_create(&Broken { by }).inc();
    }

    /// An answer is over.
    pub fn answered(
        &self,
        key: &str,
        model: &Model,
        (code, by): (u16, By),
        usage: Option<Usage>,
        times: Times,
    ) {
        let asked = Asked::of(key, model);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = match seen.get_mut(&asked) {
            Some(counted) => counted,
            None => seen.entry(asked.clone()).or_insert(Counted {
                requests: HashMap::new(),
                tokens: None,
                first_byte: None,
                duration: self.duration.get_or_create(&asked.named()).clone(),
            }),
        };
        let requests = counted.requests.entry((code, by));
        requests.or_insert_with(|| self.requests.get_or_create(&asked.answered(code, by)).clone()).inc();
        if let Some(usage) = usage {
            let families = [&self.prompt_tokens, &self.cached_tokens, &self.generation_tokens];
            let tokens = counted
                .tokens
                .get_or_insert_with(|| families.map(|family| family.get_or_create(&asked).clone()));
            for (counter, more) in tokens.iter().zip([usage.prompt, usage.cached, usage.completion]) {
                counter.inc_by(more);
            }
        }
        if let Some(first) = times.first_byte {
            let histogram = &mut counted.first_byte;
            let histogram =
                histogram.get_or_insert_with(|| self.first_byte.get_or_create(&asked.named()).clone());
            histogram.observe(first.as_secs_f64());
        }
        counted.duration.observe(times.total.as_secs_f64());
    }

    /// Forgets the series of keys and services that are no more: tenants choose names, and the number of those has no bound.
    pub fn keep(&self, known: impl Fn(Series<'_>) -> bool) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<_> = seen.extract_if(|asked, _| !known(asked.series())).collect();
        for (asked, counted) in gone {
            self.prompt_tokens.remove(&asked);
            self.cached_tokens.remove(&asked);
            self.generation_tokens.remove(&asked);
            for (code, by) in counted.requests.into_keys() {
                self.requests.remove(&asked.answered(code, by));
            }
            let Asked { key: _, namespace, model, adapter: _ } = asked;
            if !seen.keys().any(|other| other.namespace == namespace && other.model == model) {
                self.canary.forget(&namespace, &model);
                let named = Named { namespace, model };
                self.first_byte.remove(&named);
                self.duration.remove(&named);
            }
        }
    }

    /// All of them.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    #[cfg(test)]
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// What is counted together.
#[derive(Clone, Copy, Debug)]
pub struct Series<'a> {
    /// The key's name.
    pub key: &'a str,
    /// The service's namespace.
    pub namespace: &'a str,
    /// The service's name.
    pub model: &'a str,
}

/// How long an answer took.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// From arrival to the first byte of its body.
    pub first_byte: Option<Duration>,
    /// From arrival to its end.
    pub total: Duration,
}

impl Asked {
    fn named(&self) -> Named {
        Named { namespace: self.namespace.clone(), model: self.model.clone() }
    }

    fn answered(&self, code: u16, by: By) -> Answered {
        let Self { key, namespace, model, adapter } = self.clone();
        Answered { key, namespace, model, adapter, code, by: by.label() }
    }

    fn series(&self) -> Series<'_> {
        let Self { key, namespace, model, adapter: _ } = self;
        Series { key, namespace, model }
    }

    fn of(key: &str, model: &Model) -> Self {
        Self {
            key: key.to_owned(),
            namespace: model.service.namespace.clone(),
            model: model.service.name.clone(),
            adapter: if model.adapter { model.name.clone() } else { String::new() },
        }
    }
}

#[cfg(test)]
#[path = "../../../tests/monitoring/recorded.rs"]
mod recorded;

#[cfg(test)]
mod tests {
    use lathe_contract::Ended;
    use serde_json::json;

    use super::*;
    use crate::error::ApiError;
    use crate::table::Table;
    use crate::testing::{service, slice};

    #[test]
    fn tokens_are_counted_by_key_model_and_adapter() {
        let tuned = service("a", "s", &["tone"], &["s", "tone"]);
        let table = Table::build(8080, &[tuned], &[slice("a", "s", &[("10.0.0.1", json!({}))])]);
        let metrics = Metrics::default();
        let times = Times { first_byte: Some(Duration::from_millis(3)), total: Duration::from_millis(400) };
        let usage = Some(Usage { prompt: 7, completion: 3, cached: 4 });
        metrics.answered("k", table.get("a", "tone").unwrap(), (200, By::Replica), usage, times);
        metrics.answered(
            "k",
            table.get("a", "s").unwrap(),
            (502, By::Gateway),
            None,
            Times { first_byte: None, ..times },
        );
        metrics.answered("other", table.get("a", "s").unwrap(), (200, By::Replica), usage, times);
        metrics.refused("invalid_api_key");
        metrics.keep(|series| series.key == "k");
        let text = metrics.text().unwrap();
        for line in [
            r#"lathe_gateway_requests_total{key="k",namespace="a",model="s",adapter="tone",code="200",by="replica"} 1"#,
            r#"lathe_gateway_requests_total{key="k",namespace="a",model="s",adapter="",code="502",by="gateway"} 1"#,
            r#"lathe_gateway_prompt_tokens_total{key="k",namespace="a",model="s",adapter="tone"} 7"#,
            r#"lathe_gateway_cached_tokens_total{key="k",namespace="a",model="s",adapter="tone"} 4"#,
            r#"lathe_gateway_generation_tokens_total{key="k",namespace="a",model="s",adapter="tone"} 3"#,
            r#"lathe_gateway_requests_refused_total{reason="invalid_api_key"} 1"#,
            r#"lathe_gateway_time_to_first_byte_seconds_bucket{le="0.005",namespace="a",model="s"} 2"#,
            r#"lathe_gateway_request_duration_seconds_count{namespace="a",model="s"} 3"#,
            "lathe_gateway_requests_in_flight 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains(r#"key="other""#), "{text}");
        metrics.keep(|series| series.model != "s");
        let text = metrics.text().unwrap();
        assert!(!text.contains(r#"namespace="a""#), "{text}");
    }

    #[test]
    fn the_recorded_numbers_are_those_that_prometheus_reads() {
        let tuned = service("team-a", "support", &["tone"], &["support", "tone"]);
        let table = Table::build(8080, &[tuned], &[slice("team-a", "support", &[("10.0.0.1", json!({}))])]);
        let metrics = Metrics::default();
        let times = Times { first_byte: Some(Duration::from_millis(30)), total: Duration::from_millis(400) };
        let usage = Some(Usage { prompt: 70, completion: 30, cached: 40 });
        let no_replica = ApiError::no_replica("team-a/support");
        for (key, name, (code, by), usage) in [
            ("web", "support", (200, By::Replica), usage),
            ("web", "tone", (200, By::Replica), usage),
            ("batch", "support", (429, By::Replica), None),
            ("batch", "support", (no_replica.status.as_u16(), By::Gateway), None),
            ("batch", "support", (499, By::Client), None),
        ] {
            metrics.answered(key, table.get("team-a", name).unwrap(), (code, by), usage, times);
        }
        for refused in [
            ApiError::unauthorized(""),
            ApiError::rate_limited("requests", 1, Duration::from_secs(1)),
            ApiError::overloaded("requests"),
            ApiError::unavailable("model_not_ready", ""),
            ApiError::invalid("insufficient_quota", ""),
        ] {
            metrics.refused(refused.code);
        }
        for reason in ["full", "drain", "refused", "reset"] {
            metrics.repeated(reason);
        }
        metrics.broken("replica");
        metrics.broken("client");
        metrics.of_budget("batch", 950_000, 1_000_000);
        metrics.hold.begins();
        metrics.hold.ends(Duration::from_secs(7), true);
        for (candidate, errors) in [(false, 0), (true, 0), (true, 1)] {
            let ended = Ended { requests: 1, errors, ..Ended::default() };
            metrics.canary.ended(&table.get("team-a", "support").unwrap().service, candidate, ended);
        }
        recorded::hold("gateway.txt", &metrics.text().unwrap());
    }
}
