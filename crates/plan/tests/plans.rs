//! Plans: what fits, what does not and by how much, and shapes that cannot be.
#![allow(clippy::unwrap_used)]

use lathe_plan::estimate::{self, Rates};
use lathe_plan::{
    AdapterBudget, Category, LoraSpec, MOMENT_BLOCK, ModelShape, OptimizerState, PlanError, Precision,
    RopeScaling, ServeRequest, Target, TrainMethod, TrainRequest, plan_serving, plan_training,
};
use rstest::rstest;

/// Llama-3.2-1B.
fn llama_1b() -> ModelShape {
    ModelShape {
        vocab: 128_256,
        hidden: 2048,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        intermediate: 8192,
        max_position: 131_072,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        },
        rms_eps: 1e-5,
        sliding_window: None,
        qkv_bias: false,
        tie_embeddings: true,
    }
}

fn lora() -> TrainMethod {
    TrainMethod::Lora(LoraSpec { rank: 16, alpha: 32.0, dropout: 0.05, targets: Target::ALL.into() })
}

fn training(method: TrainMethod) -> TrainRequest {
    TrainRequest {
        method,
        weights: Precision::BF16,
        max_row_tokens: 1024,
        batch_tokens: 16_384,
        micro_batch_tokens: None,
        recompute: None,
        optimizer_state: None,
        threads: 8,
        memory_limit: None,
    }
}

fn serving() -> ServeRequest {
    ServeRequest {
        weights: Precision::BF16,
        context: 8192,
        max_sequences: 16,
        max_batch_tokens: 2048,
        cache_tokens: None,
        adapters: AdapterBudget::default(),
        threads: 8,
        memory_limit: None,
    }
}

#[test]
fn parameters_are_those_of_the_models_card() {
    assert_eq!(llama_1b().parameters(), 1_235_814_400);
    let TrainMethod::Lora(lora) = lora() else { panic!("a LoRA method") };
    // As peft's print_trainable_parameters counts r = 16 on all linear layers.
    assert_eq!(lora.parameters(&llama_1b()), 11_272_192);
}

#[test]
fn full_training_holds_sixteen_bytes_a_weight_and_lora_hardly_more_than_the_weights() {
    let weights = llama_1b().parameters();
    let full = plan_training(&llama_1b(), &training(TrainMethod::Full)).unwrap().totals;
    assert_eq!(full.weights / weights, 2);
    // Masters and two moments; gradients, with those of the tied table in two sums.
    assert_eq!(full.optimizer, 12 * weights);
    assert_eq!(full.gradients / weights, 4);
    let lora = plan_training(&llama_1b(), &training(lora())).unwrap().totals;
    assert!(lora.gradients + lora.optimizer < weights / 4, "{lora}");
    assert_eq!(lora.weights / weights, 2);
}

#[test]
fn a_tight_limit_first_shrinks_the_micro_batch_then_computes_twice_then_refuses() {
    let shape = llama_1b();
    let free = plan_training(&shape, &training(lora())).unwrap();
    assert_eq!((free.micro_batch_tokens, free.recompute), (2048, false));
    let limited =
        |limit: u64| plan_training(&shape, &TrainRequest { memory_limit: Some(limit), ..training(lora()) });
    let smaller = limited(free.totals.total() - 1).unwrap();
    assert_eq!((smaller.micro_batch_tokens, smaller.recompute), (1024, false));
    let twice = limited(smaller.totals.total() - 1).unwrap();
    assert!(twice.recompute);
    assert!(twice.totals.total() < smaller.totals.total());
    let least = plan_training(
        &shape,
        &TrainRequest { recompute: Some(true), micro_batch_tokens: Some(1024), ..training(lora()) },
    );
    let needed = least.unwrap().totals;
    let error = limited(needed.total() - 1).unwrap_err();
    assert_eq!(
        error,
        PlanError::DoesNotFit { needed: needed.total(), limit: needed.total() - 1, totals: needed }
    );
    assert!(limited(needed.total()).is_ok());
}

#[test]
fn full_training_takes_moments_of_8_bits_before_it_is_refused_and_lora_never() {
    let shape = llama_1b();
    let limited = |method, limit: u64| {
        plan_training(&shape, &TrainRequest { memory_limit: Some(limit), ..training(method) })
    };
    let least = |state| TrainRequest {
        recompute: Some(true),
        micro_batch_tokens: Some(1024),
        optimizer_state: Some(state),
        ..training(TrainMethod::Full)
    };
    let [f32, int8] = [OptimizerState::F32, OptimizerState::Int8]
        .map(|state| plan_training(&shape, &least(state)).unwrap().totals);
    // Codes, and two scales for each block; no tensor of this shape has a block that is not full.
    let weights = shape.parameters();
    assert_eq!(f32.optimizer - int8.optimizer, 6 * weights - 8 * weights / MOMENT_BLOCK as u64);
    assert_eq!(f32.total() - int8.total(), f32.optimizer - int8.optimizer);

    let fits = limited(TrainMethod::Full, f32.total()).unwrap();
    assert_eq!((fits.optimizer_state, fits.recompute), (OptimizerState::F32, true));
    // With what the moments leave, nothing needs to be computed twice.
    let few_bits = limited(TrainMethod::Full, f32.total() - 1).unwrap();
    assert_eq!((few_bits.optimizer_state, few_bits.recompute), (OptimizerState::Int8, false));
    let error = limited(TrainMethod::Full, int8.total() - 1).unwrap_err();
    assert_eq!(error, PlanError::DoesNotFit { needed: int8.total(), limit: int8.total() - 1, totals: int8 });

    let mut limit = plan_training(&shape, &training(lora())).unwrap().totals.total();
    while let Ok(plan) = limited(lora(), limit) {
        assert_eq!(plan.optimizer_state, OptimizerState::F32);
        limit = plan.totals.total() - 1;
    }
}

/// Of two tensors of 300 each has two blocks: four together, where 600 in a row would have three.
#[test]
fn blocks_of_moments_do_not_cross_parameters() {
    let lora = LoraSpec { rank: 1, alpha: 1.0, dropout: 0.0, targets: [Target::O].into() };
    let shape = ModelShape { hidden: 300, heads: 3, kv_heads: 3, head_dim: 100, layers: 2, ..llama_1b() };
    let request =
        TrainRequest { optimizer_state: Some(OptimizerState::Int8), ..training(TrainMethod::Lora(lora)) };
    let plan = plan_training(&shape, &request).unwrap();
    let len = |name: &str| plan.buffers.iter().find(|b| b.name == name).unwrap().len;
    assert_eq!((len("moment1"), len("moment1.scales"), len("moment2.scales")), (1200, 8, 8));
}

#[test]
fn a_service_shrinks_its_cache_to_the_limit_but_keeps_one_context() {
    let shape = llama_1b();
    let free = plan_serving(&shape, &serving()).unwrap();
    assert_eq!(free.cache_blocks, 16 * 8192 / 16);
    // Keys and values of 16 layers and 512 columns, in f32.
    assert_eq!(free.totals.cache, 16 * 8192 * 2 * 16 * 512 * 4);
    let rest = free.totals.total() - free.totals.cache;
    let limit = rest + free.totals.cache / 2;
    let half = plan_serving(&shape, &ServeRequest { memory_limit: Some(limit), ..serving() }).unwrap();
    assert_eq!(half.cache_blocks, free.cache_blocks / 2);
    let limit = rest + free.totals.cache / 16 - 1;
    let error = plan_serving(&shape, &ServeRequest { memory_limit: Some(limit), ..serving() }).unwrap_err();
    assert!(matches!(error, PlanError::DoesNotFit { needed, .. } if needed == limit + 1), "{error}");
}

#[test]
fn adapters_are_counted() {
    let adapters = AdapterBudget { slots: 4, max_rank: 16, targets: Target::ALL.into() };
    let plan = plan_serving(&llama_1b(), &ServeRequest { adapters, ..serving() }).unwrap();
    let without = plan_serving(&llama_1b(), &serving()).unwrap();
    assert_eq!(plan.totals.weights - without.totals.weights, 4 * 11_272_192 * 4);
}

#[test]
fn names_are_unique_and_totals_are_sums() {
    let plan = plan_training(&llama_1b(), &training(lora())).unwrap();
    let mut names: Vec<&str> = plan.buffers.iter().map(|b| b.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), plan.buffers.len());
    let kept =
        plan.buffers.iter().filter(|b| b.category == Category::Activations).map(|b| b.bytes()).sum::<u64>();
    assert_eq!(kept, plan.totals.activations);
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<lathe_plan::TrainPlan>(&text).unwrap(), plan);
}

#[rstest]
#[case("vocab", |s: &mut ModelShape| s.vocab = 0)]
#[case("hidden", |s: &mut ModelShape| s.hidden = usize::MAX)]
#[case("layers", |s: &mut ModelShape| s.layers = 1 << 40)]
#[case("kv_heads", |s: &mut ModelShape| s.kv_heads = 5)]
#[case("head_dim", |s: &mut ModelShape| s.head_dim = 63)]
#[case("rope_theta", |s: &mut ModelShape| s.rope_theta = f64::NAN)]
#[case("rms_eps", |s: &mut ModelShape| s.rms_eps = -1.0)]
#[case("rope_scaling.factor", |s: &mut ModelShape| s.rope_scaling = RopeScaling::Linear { factor: 0.0 })]
fn absurd_shapes_are_refused_by_name(#[case] field: &str, #[case] spoil: fn(&mut ModelShape)) {
    let mut shape = llama_1b();
    spoil(&mut shape);
    for error in
        [plan_training(&shape, &training(lora())).unwrap_err(), plan_serving(&shape, &serving()).unwrap_err()]
    {
        assert!(error.to_string().starts_with(&format!("`{field}` must be ")), "{error}");
    }
}

#[test]
fn the_largest_shape_that_is_allowed_does_not_wrap() {
    let shape = ModelShape {
        vocab: 1 << 24,
        hidden: 1 << 17,
        layers: 1 << 10,
        heads: 1 << 10,
        kv_heads: 1 << 10,
        head_dim: 256,
        intermediate: 1 << 20,
        max_position: 1 << 24,
        ..llama_1b()
    };
    let plan = plan_training(&shape, &training(TrainMethod::Full)).unwrap();
    assert!(plan.totals.total() > 1 << 50);
    let request =
        TrainRequest { batch_tokens: 1 << 28, micro_batch_tokens: Some(1 << 28), ..training(lora()) };
    assert!(plan_training(&shape, &request).unwrap().totals.total() > 1 << 50);
}

#[rstest]
#[case("sequenceLength", TrainRequest { max_row_tokens: 1 << 20, ..training(lora()) })]
#[case("sequenceLength", TrainRequest { max_row_tokens: 1, ..training(lora()) })]
#[case("batchTokens", TrainRequest { batch_tokens: 1 << 40, ..training(lora()) })]
#[case("micro_batch_tokens", TrainRequest { micro_batch_tokens: Some(1 << 40), ..training(lora()) })]
fn absurd_requests_are_refused_by_name(#[case] field: &str, #[case] request: TrainRequest) {
    let error = plan_training(&llama_1b(), &request).unwrap_err().to_string();
    assert!(error.starts_with(&format!("`{field}")), "{error}");
}

#[test]
fn estimates_follow_the_arithmetic() {
    let rates = Rates { memory: 80 << 30, bandwidth: 3.35e12, compute: 9.89e14, price_per_hour: 2.5 };
    let shape = llama_1b();
    // 2 N forward, 2 N for inputs' gradients; a frozen base has no weights' gradient.
    let lora = estimate::training_flops_per_token(&shape, &lora(), 1, false) / shape.parameters() as f64;
    let full =
        estimate::training_flops_per_token(&shape, &TrainMethod::Full, 1, false) / shape.parameters() as f64;
    assert!((lora - 4.05).abs() < 0.05 && (full - 6.0).abs() < 0.01, "{lora} {full}");
    let one = estimate::training(&shape, &TrainMethod::Full, 1024, false, 1_000_000, &rates, 1);
    let two = estimate::training(&shape, &TrainMethod::Full, 1024, false, 1_000_000, &rates, 2);
    assert!((one.seconds / two.seconds - 2.0).abs() < 1e-9 && (one.cost / two.cost - 1.0).abs() < 1e-9);
    // One sequence at a time reads all weights for each token.
    let alone = estimate::decoding(&shape, Precision::BF16, 1, 1000, &rates, 1);
    let expected = 3.35e12 * estimate::BANDWIDTH_SHARE / (2.0 * shape.parameters() as f64);
    assert!((alone.tokens_per_second / expected - 1.0).abs() < 1e-9);
}
