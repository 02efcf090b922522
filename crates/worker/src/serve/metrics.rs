//! Numbers for Prometheus under vLLM's names, so that dashboards, endpoint pickers and scaling rules work unchanged.
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// What the engine's thread measures.
#[derive(Debug)]
pub struct Metrics {
    /// Sequences being decoded.
    pub running: Gauge,
    /// Requests that wait.
    pub waiting: Gauge,
    /// 0 to 1.
    pub cache_usage: Gauge<f64, AtomicU64>,
    /// Tokens of prompts, counted with the first token of their answers.
    pub prompt_tokens: Counter,
    /// Tokens of prompts that were looked for among the beginnings that the cache keeps.
    pub prefix_queries: Counter,
    /// Of those, the ones that were found, and so not read again.
    pub prefix_hits: Counter,
    /// Generated tokens.
    pub generation_tokens: Counter,
    finished: Family<Finished, Counter>,
    loras: Family<Loras, Gauge<f64, AtomicU64>>,
    cache: Family<CacheConfig, Gauge>,
    /// From arrival to the first token.
    pub first_token: Histogram,
    /// Between tokens of one answer.
    pub inter_token: Histogram,
    /// From arrival to the last token.
    pub e2e: Histogram,
    /// From arrival to the engine.
    pub queue: Histogram,
    /// From the engine to the first token.
    pub prefill: Histogram,
    /// From the first token to the last.
    pub decode: Histogram,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Finished {
    finished_reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Loras {
    max_lora: u64,
    running_lora_adapters: String,
    waiting_lora_adapters: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CacheConfig {
    block_size: u64,
    num_gpu_blocks: u64,
}

/// Bounds as vLLM's, in seconds.
const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TOKEN: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

impl Metrics {
    /// Registers all of them with the label `model_name`.
    pub fn register(registry: &mut Registry, model: &str) -> Self {
        let metrics = Metrics {
            running: Gauge::default(),
            waiting: Gauge::default(),
            cache_usage: Gauge::default(),
            prompt_tokens: Counter::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            generation_tokens: Counter::default(),
            finished: Family::default(),
            loras: Family::default(),
            cache: Family::default(),
            first_token: Histogram::new(FIRST_TOKEN),
            inter_token: Histogram::new(TOKEN),
            e2e: Histogram::new(REQUEST),
            queue: Histogram::new(REQUEST),
            prefill: Histogram::new(REQUEST),
            decode: Histogram::new(REQUEST),
        };
        for finished_reason in REASONS {
            // Counters that stand at zero are seen, so that a first error is a change.
            drop(metrics.finished.get_or_create(&Finished { finished_reason }));
        }
        let labelled = registry.sub_registry_with_label(("model_name".into(), model.to_owned().into()));
        labelled.register("vllm:num_requests_running", "Sequences being decoded", metrics.running.clone());
        labelled.register("vllm:num_requests_waiting", "Requests that wait", metrics.waiting.clone());
        labelled.register(
            "vllm:kv_cache_usage_perc",
            "Share of the key-value cache in use, 0 to 1",
            metrics.cache_usage.clone(),
        );
        labelled.register("vllm:prompt_tokens", "Tokens of prompts", metrics.prompt_tokens.clone());
        labelled.register(
            "vllm:prefix_cache_queries",
            "Tokens of prompts that were looked for in the prefix cache",
            metrics.prefix_queries.clone(),
        );
        labelled.register(
            "vllm:prefix_cache_hits",
            "Tokens of prompts that were found in the prefix cache, and not read again",
            metrics.prefix_hits.clone(),
        );
        labelled.register("vllm:generation_tokens", "Generated tokens", metrics.generation_tokens.clone());
        labelled.register("vllm:request_success", "Requests by how they ended", metrics.finished.clone());
        labelled.register("vllm:lora_requests_info", "Adapters in use, in labels", metrics.loras.clone());
        labelled.register(
            "vllm:cache_config_info",
            "Tokens of a block of the key-value cache, and its blocks, in labels",
            metrics.cache.clone(),
        );
        for (name, help, histogram) in [
            ("vllm:time_to_first_token_seconds", "From arrival to the first token", &metrics.first_token),
            ("vllm:inter_token_latency_seconds", "Between tokens of one answer", &metrics.inter_token),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token", &metrics.e2e),
            ("vllm:request_queue_time_seconds", "From arrival to the engine", &metrics.queue),
            ("vllm:request_prefill_time_seconds", "From the engine to the first token", &metrics.prefill),
            ("vllm:request_decode_time_seconds", "From the first token to the last", &metrics.decode),
        ] {
            labelled.register(name, help, histogram.clone());
        }
        metrics
    }

    /// A request ended: `stop`, `length`, `abort` (its client left) or `error`.
    pub fn finished(&self, finished_reason: &'static str) {
        self.finished.get_or_create(&Finished { finished_reason }).inc();
    }

    /// A prompt was read, of which so many tokens came from the cache.
    pub fn read(&self, prompt: usize, cached: usize) {
        self.prompt_tokens.inc_by(prompt as u64);
        self.prefix_queries.inc_by(prompt as u64);
        self.prefix_hits.inc_by(cached as u64);
    }

    /// The key-value cache has so many `blocks` of so many tokens. The label is vLLM's, on a CPU too.
    pub fn cache_has(&self, blocks: usize, tokens: usize) {
        let labels = CacheConfig { block_size: tokens as u64, num_gpu_blocks: blocks as u64 };
        self.cache.get_or_create(&labels).set(1);
    }

    /// Names of the adapters that are asked now; the value is the time, as in vLLM.
    pub fn loras(&self, max: usize, running: String, waiting: String, unix: Duration) {
        self.loras.clear();
        let labels =
            Loras { max_lora: max as u64, running_lora_adapters: running, waiting_lora_adapters: waiting };
        self.loras.get_or_create(&labels).set(unix.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_vllms() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, "base");
        metrics.generation_tokens.inc_by(3);
        metrics.finished("stop");
        metrics.loras(4, "a,b".into(), "c".into(), Duration::from_secs(7));
        metrics.loras(4, "a".into(), String::new(), Duration::from_secs(8));
        metrics.first_token.observe(0.003);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        for line in [
            r#"vllm:num_requests_running{model_name="base"} 0"#,
            r#"vllm:num_requests_waiting{model_name="base"} 0"#,
            r#"vllm:kv_cache_usage_perc{model_name="base"} 0.0"#,
            r#"vllm:prompt_tokens_total{model_name="base"} 0"#,
            r#"vllm:prefix_cache_queries_total{model_name="base"} 0"#,
            r#"vllm:prefix_cache_hits_total{model_name="base"} 0"#,
            r#"vllm:generation_tokens_total{model_name="base"} 3"#,
            r#"vllm:request_success_total{model_name="base",finished_reason="stop"} 1"#,
            r#"vllm:request_success_total{model_name="base",finished_reason="error"} 0"#,
            r#"vllm:lora_requests_info{model_name="base",max_lora="4",running_lora_adapters="a",waiting_lora_adapters=""} 8.0"#,
            r#"vllm:time_to_first_token_seconds_bucket{model_name="base",le="0.005"} 1"#,
            r#"vllm:request_queue_time_seconds_count{model_name="base"} 0"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("lora_requests_info{").count(), 1, "{text}");
    }

    #[test]
    fn the_recorded_numbers_are_those_that_prometheus_reads() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, "support");
        metrics.running.set(2);
        metrics.waiting.set(1);
        metrics.cache_usage.set(0.5);
        metrics.loras(4, "tone".into(), String::new(), Duration::from_secs(7));
        metrics.cache_has(128, 16);
        metrics.first_token.observe(0.25);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        crate::recorded::hold("serve.txt", &text);
    }
}
