//! What a token costs: operations and bytes, from a model's shape.

use lathe_plan::{ModelShape, Precision, TrainMethod, estimate};

/// Floating-point operations to read one token of a prompt of `tokens`: 2 for each weight of the blocks (the head is
/// applied to the last token only), and attention over half of the prompt: 2 for each score, 2 for each weighted value.
pub fn prefill_flops(shape: &ModelShape, tokens: usize) -> f64 {
    let tables = if shape.tie_embeddings { 1.0 } else { 2.0 };
    let table = (shape.vocab * shape.hidden) as f64;
    let blocks = shape.parameters() as f64 - tables * table;
    let attention = 2.0 * (tokens * shape.q_dim() * shape.layers) as f64;
    2.0 * blocks + attention + 2.0 * table / tokens as f64
}

/// Floating-point operations to train on one token of a row of `tokens`: `crates/plan`'s formula, activations kept.
pub fn training_flops(shape: &ModelShape, method: &TrainMethod, tokens: usize) -> f64 {
    estimate::training_flops_per_token(shape, method, tokens, false)
}

/// Bytes of weights that one decoding step reads, whatever the batch: all of them, but of a table that is only looked up.
pub fn decode_bytes(shape: &ModelShape, precision: Precision) -> f64 {
    let looked_up = if shape.tie_embeddings { 0 } else { shape.vocab * shape.hidden };
    (shape.parameters() as f64 - looked_up as f64) * precision.bytes_per_weight()
}

/// Bytes of keys and values, in bf16, that one decoding step reads of one sequence of `context` tokens.
pub fn cache_bytes(shape: &ModelShape, context: usize) -> f64 {
    (2 * 2 * shape.layers * shape.kv_dim() * context) as f64
}

#[cfg(test)]
mod tests {
    use super::super::models::q05;
    use super::*;
    use lathe_plan::{LoraSpec, Target};

    fn close(found: f64, wanted: f64) {
        assert!((found / wanted - 1.0).abs() < 0.01, "{found:e} is not {wanted:e}");
    }

    /// 494.0 M parameters, of them 357.9 M outside of the table; 24 layers of 14 heads of 64.
    #[test]
    fn a_token_of_the_half_billion_model_costs_what_its_layers_add_up_to() {
        let shape = q05();
        close(shape.parameters() as f64, 494.0e6);
        close(prefill_flops(&shape, 512), 2.0 * 357.9e6 + 2.0 * 512.0 * 896.0 * 24.0);
        close(decode_bytes(&shape, Precision::BF16), 0.988e9);
        close(decode_bytes(&shape, Precision::F32), 1.976e9);
    }

    #[test]
    fn a_tokens_keys_and_values_are_two_numbers_of_two_bytes_for_each_layer_and_head() {
        close(cache_bytes(&q05(), 8192), 8192.0 * 24.0 * 2.0 * 128.0 * 2.0);
    }

    #[test]
    fn a_table_that_is_only_looked_up_is_not_read() {
        let shape = ModelShape { tie_embeddings: false, ..q05() };
        close(decode_bytes(&shape, Precision::BF16), 0.988e9);
    }

    #[test]
    fn lora_training_has_no_gradient_of_frozen_weights() {
        let shape = q05();
        let targets = Target::ALL.into_iter().collect();
        let lora = TrainMethod::Lora(LoraSpec { rank: 16, alpha: 32.0, dropout: 0.0, targets });
        close(training_flops(&shape, &lora, 512), 2.10e9);
        close(training_flops(&shape, &TrainMethod::Full, 512), 6.0 * 494.0e6 + 6.0 * 512.0 * 896.0 * 24.0);
    }
}
