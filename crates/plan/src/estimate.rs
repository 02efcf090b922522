//! Time and money of a plan on an accelerator.

use crate::{LoraSpec, ModelShape, Precision, TrainMethod};

/// What an accelerator can do, from its profile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Memory of one device, in bytes.
    pub memory: u64,
    /// Memory bandwidth of one device, in bytes per second.
    pub bandwidth: f64,
    /// Peak rate of the products in the weights' precision, in floating-point operations per second.
    pub compute: f64,
    /// Price of one device for one hour.
    pub price_per_hour: f64,
}

/// Share of the peak rate that training reaches; a planning figure, replaced by measurement once steps run.
pub const COMPUTE_SHARE: f64 = 0.4;

/// Share of the bandwidth that decoding reaches; a planning figure.
pub const BANDWIDTH_SHARE: f64 = 0.7;

/// An estimate of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Tokens per second.
    pub tokens_per_second: f64,
    /// Seconds of the whole run.
    pub seconds: f64,
    /// Price of the whole run, all devices.
    pub cost: f64,
}

/// Floating-point operations to train on one token: 2 per weight forward, 2 for the gradient of the input,
/// 2 for the gradient of trained weights only (a frozen base has none), and attention over half the row.
pub fn training_flops_per_token(
    shape: &ModelShape,
    method: &TrainMethod,
    row_tokens: usize,
    recompute: bool,
) -> f64 {
    let weights = product_weights(shape);
    let attention = 2.0 * row_tokens as f64 * shape.q_dim() as f64 * shape.layers as f64;
    let forward = 2.0 * weights + attention;
    let input_gradient = 2.0 * weights + 2.0 * attention;
    let again = if recompute { forward } else { 0.0 };
    forward
        + again
        + input_gradient
        + match method {
            TrainMethod::Full => 2.0 * weights,
            TrainMethod::Lora(lora) => adapter_flops(lora, shape),
        }
}

fn adapter_flops(lora: &LoraSpec, shape: &ModelShape) -> f64 {
    6.0 * lora.parameters(shape) as f64
}

/// Weights that take part in products: a tied table works as the head, an untied one is only looked up.
fn product_weights(shape: &ModelShape) -> f64 {
    let all = shape.parameters() as f64;
    if shape.tie_embeddings { all } else { all - (shape.vocab * shape.hidden) as f64 }
}

/// Time and cost of training on `tokens` tokens with `devices` devices.
pub fn training(
    shape: &ModelShape,
    method: &TrainMethod,
    row_tokens: usize,
    recompute: bool,
    tokens: u64,
    rates: &Rates,
    devices: u32,
) -> Estimate {
    let flops = training_flops_per_token(shape, method, row_tokens, recompute);
    let rate = rates.compute * COMPUTE_SHARE * f64::from(devices) / flops;
    of(rate, tokens, rates, devices)
}

/// Time and cost of decoding `tokens` tokens, `batch` sequences at a time: the lesser of what bandwidth (all
/// weights are read once per step) and compute allow.
pub fn decoding(
    shape: &ModelShape,
    precision: Precision,
    batch: u32,
    tokens: u64,
    rates: &Rates,
    devices: u32,
) -> Estimate {
    let weights = product_weights(shape);
    let bytes = weights * precision.bytes_per_weight();
    let by_bandwidth = rates.bandwidth * BANDWIDTH_SHARE * f64::from(batch) / bytes;
    let by_compute = rates.compute * COMPUTE_SHARE / (2.0 * weights);
    of(by_bandwidth.min(by_compute) * f64::from(devices), tokens, rates, devices)
}

fn of(tokens_per_second: f64, tokens: u64, rates: &Rates, devices: u32) -> Estimate {
    let seconds = tokens as f64 / tokens_per_second;
    let cost = seconds / 3600.0 * rates.price_per_hour * f64::from(devices);
    Estimate { tokens_per_second, seconds, cost }
}
