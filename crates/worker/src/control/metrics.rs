//! A tuning job's numbers for Prometheus, read from the report when they are asked for.
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::status::Status;

/// Adds the report's numbers to a registry.
pub fn register(registry: &mut Registry, status: Status) {
    registry.register_collector(Box::new(Progress(status)));
}

#[derive(Debug)]
struct Progress(Status);

impl Collector for Progress {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let Some(progress) = self.0.read().progress else { return Ok(()) };
        for (name, help, value) in [
            ("lathe_train_step", "Optimizer steps done", progress.step as f64),
            ("lathe_train_steps", "Optimizer steps in all", progress.steps as f64),
            ("lathe_train_loss", "Loss of the last step, nats a token", progress.loss),
            (
                "lathe_train_tokens_per_second",
                "Tokens a second over the last steps",
                progress.tokens_per_second,
            ),
            ("lathe_train_checkpoint_step", "Step of the last checkpoint", progress.checkpoint_step as f64),
            ("lathe_train_remaining_seconds", "Seconds that remain", progress.remaining_seconds),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        for (name, help, value) in [
            ("lathe_train_tokens", "Tokens seen", progress.tokens),
            ("lathe_train_restarts", "Restarts of the worker", i64::from(progress.restarts)),
            ("lathe_train_lost_steps", "Steps done again after restarts", progress.lost_steps),
        ] {
            let counter = ConstCounter::new(value.max(0) as u64);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recorded_numbers_are_those_that_prometheus_reads() {
        let (mut registry, status) = (Registry::default(), Status::default());
        register(&mut registry, status.clone());
        status.update(|report| {
            report.progress =
                Some(lathe_contract::TrainProgress { step: 7, steps: 30, ..Default::default() });
        });
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        crate::recorded::hold("train.txt", &text);
    }
}
