//! The same bits however the work is cut: micro-batches, threads, resumption, batches, chunks, pre-emption.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{hyper, llama, lora, model, noise, qwen, request, rows, trainer_of};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::plan::{
    AdapterBudget, ModelShape, Precision, ServeRequest, Target, TrainMethod, TrainRequest, plan_serving,
    plan_training,
};
use lathe_engine::{Adapter, Emitted, Error, Generator, Model, Sampling, Trainer};
use rstest::rstest;

const LENGTHS: [usize; 6] = [21, 5, 9, 33, 17, 2];

fn trained(shape: &ModelShape, request: &TrainRequest, steps: usize) -> (Trainer, Vec<u8>) {
    let mut trainer = trainer_of(shape, request, hyper());
    let rows = rows(shape, &LENGTHS);
    for _ in 0..steps {
        trainer.step(&rows).unwrap();
    }
    let state = state(&mut trainer);
    (trainer, state)
}

fn state(trainer: &mut Trainer) -> Vec<u8> {
    let mut bytes = Vec::new();
    trainer.save_state(&mut bytes).unwrap();
    bytes
}

#[rstest]
fn training_does_not_depend_on_how_it_is_cut(
    #[values(llama(), qwen())] shape: ModelShape,
    #[values(TrainMethod::Full, lora(0.3))] method: TrainMethod,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let base = request(&method, precision);
    let expected = trained(&shape, &base, 3).1;
    for other in [
        TrainRequest { micro_batch_tokens: Some(40), ..base.clone() },
        TrainRequest { threads: 3, ..base.clone() },
        TrainRequest { recompute: Some(true), threads: 2, micro_batch_tokens: Some(60), ..base.clone() },
    ] {
        assert!(trained(&shape, &other, 3).1 == expected, "{other:?}");
    }
}

#[rstest]
fn a_resumed_run_is_one_that_never_stopped(
    #[values(TrainMethod::Full, lora(0.3))] method: TrainMethod,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let shape = qwen();
    let request = request(&method, precision);
    let expected = trained(&shape, &request, 5).1;
    let stopped = trained(&shape, &request, 2).1;
    let mut resumed = trainer_of(&shape, &request, hyper());
    resumed.load_state(&mut &stopped[..]).unwrap();
    assert_eq!(resumed.steps_done(), 2);
    for _ in 0..3 {
        resumed.step(&rows(&shape, &LENGTHS)).unwrap();
    }
    assert!(state(&mut resumed) == expected);
}

#[test]
fn a_damaged_or_foreign_state_changes_nothing() {
    let request = request(&lora(0.0), Precision::F32);
    let good = trained(&llama(), &request, 2).1;
    let (mut trainer, before) = trained(&llama(), &request, 1);
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for bad in [&good[..good.len() - 1], &good[..40], &flipped, &trained(&qwen(), &request, 1).1, b"PK", b""]
    {
        let error = trainer.load_state(&mut &*bad).unwrap_err();
        assert!(matches!(error, Error::State { .. }), "{error}");
        assert!(state(&mut trainer) == before);
    }
    assert_eq!(trainer.steps_done(), 1);
}

#[test]
fn frozen_weights_do_not_move_and_trained_ones_do() {
    let shape = llama();
    let tensors = |mut model: Model| -> BTreeMap<String, Vec<u8>> {
        let names: Vec<String> = model.tensors().into_iter().map(|t| t.0).collect();
        names
            .into_iter()
            .map(|n| (n.clone(), model.tensor(&n, lathe_engine::Dtype::F32).unwrap().data))
            .collect()
    };
    let before = tensors(model(&shape, Precision::F32, 1));
    let (mut adapted, _) = trained(&shape, &request(&lora(0.1), Precision::F32), 2);
    let fresh = Adapter::init(&shape, adapted.adapter().unwrap().unwrap().spec(), hyper().seed).unwrap();
    for (tensor, fresh) in adapted.adapter().unwrap().unwrap().tensors().iter().zip(fresh.tensors()) {
        assert_ne!(tensor.data, fresh.data, "{} did not move", tensor.name);
    }
    assert_eq!(tensors(adapted.into_model()), before);
    let after = tensors(trained(&shape, &request(&TrainMethod::Full, Precision::F32), 2).0.into_model());
    for (name, data) in after {
        assert_ne!(data, before[&name], "{name} did not move");
    }
}

#[test]
fn a_step_that_is_not_finite_is_refused_and_changes_nothing() {
    let shape = llama();
    let mut request = request(&TrainMethod::Full, Precision::F32);
    request.max_row_tokens = 8;
    let wild = lathe_engine::Hyper { learning_rate: 1e30, max_grad_norm: None, ..hyper() };
    let mut trainer = trainer_of(&shape, &request, wild);
    let rows = rows(&shape, &[8, 8]);
    let error = (0..50).find_map(|_| {
        let before = state(&mut trainer);
        let error = trainer.step(&rows).err()?;
        assert!(state(&mut trainer) == before);
        Some(error)
    });
    assert!(matches!(error, Some(Error::NotFinite { .. })), "{error:?}");
}

#[test]
fn an_interrupted_step_changes_nothing() {
    let shape = llama();
    let request =
        TrainRequest { micro_batch_tokens: Some(40), ..request(&TrainMethod::Full, Precision::F32) };
    let expected = trained(&shape, &request, 2).1;
    let (mut trainer, before) = trained(&shape, &request, 1);
    let rows = rows(&shape, &LENGTHS);
    let asked = std::cell::Cell::new(0);
    let second_pass = || {
        asked.set(asked.get() + 1);
        asked.get() == 2
    };
    let error = trainer.step_unless(&rows, &second_pass).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    assert!(state(&mut trainer) == before);
    trainer.step(&rows).unwrap();
    assert!(state(&mut trainer) == expected);
}

#[test]
fn levels_agree_within_rounding() {
    let shape = llama();
    let losses = [Level::Portable, Level::detect().expect("a level")].map(|level| {
        let device = Box::new(Cpu::new(1, level));
        let model = Model::load_on(device, &shape, Precision::F32, &common::Noise(shape.clone())).unwrap();
        let plan = plan_training(&shape, &request(&TrainMethod::Full, Precision::F32)).unwrap();
        let mut trainer = Trainer::new(model, &plan, hyper()).unwrap();
        (0..3).map(|_| trainer.step(&rows(&shape, &LENGTHS)).unwrap().loss).collect::<Vec<f64>>()
    });
    for (a, b) in losses[0].iter().zip(&losses[1]) {
        assert!((a - b).abs() < 1e-4, "{losses:?}");
    }
}

fn generator(shape: &ModelShape, precision: Precision, change: impl Fn(&mut ServeRequest)) -> Generator {
    let mut request = ServeRequest {
        weights: precision,
        context: 60,
        max_sequences: 5,
        max_batch_tokens: 64,
        cache_tokens: None,
        adapters: AdapterBudget { slots: 2, max_rank: 6, targets: Target::ALL.into() },
        threads: 1,
        memory_limit: None,
    };
    change(&mut request);
    let plan = plan_serving(shape, &request).unwrap();
    Generator::new(model(shape, precision, request.threads), &plan).unwrap()
}

/// An adapter after some training, so that it says something else than the base.
fn adapter(shape: &ModelShape, steps: usize) -> Adapter {
    let mut trainer = trained(shape, &request(&lora(0.0), Precision::F32), steps).0;
    trainer.adapter().unwrap().unwrap()
}

struct Prompt {
    tokens: Vec<u32>,
    adapter: Option<usize>,
    sampling: Sampling,
}

fn prompts(shape: &ModelShape) -> Vec<Prompt> {
    let prompt = |i: usize| Prompt {
        tokens: (0..[3, 30, 17, 1, 40, 16][i])
            .map(|t| ((noise(300 + i as u64, t as u64) + 1.0) / 2.0 * shape.vocab as f64) as u32)
            .collect(),
        adapter: [None, Some(0), None, Some(1), Some(0), Some(1)][i],
        sampling: Sampling { temperature: [0.0, 1.0][i % 2], top_p: 0.9, top_k: 0, seed: i as u64 },
    };
    (0..6).map(prompt).collect()
}

type Answers = BTreeMap<u64, Vec<(u32, u32)>>;

/// Runs to the end; per sequence its tokens and the bits of their log-probabilities.
fn finish(generator: &mut Generator, answers: &mut Answers) {
    for _ in 0..2000 {
        for Emitted { sequence, token, log_prob, .. } in generator.step().unwrap() {
            answers.entry(sequence).or_default().push((token, log_prob.to_bits()));
        }
        if generator.idle() {
            let capacity = generator.capacity();
            assert_eq!(capacity.free_blocks, capacity.total_blocks);
            return;
        }
    }
    panic!("the generator does not come to an end");
}

const ANSWER: usize = 12;

fn together(shape: &ModelShape, precision: Precision, change: impl Fn(&mut ServeRequest)) -> Answers {
    let mut generator = generator(shape, precision, change);
    let ids = [2, 4].map(|steps| generator.add_adapter(&adapter(shape, steps)).unwrap());
    for (id, p) in prompts(shape).into_iter().enumerate() {
        let adapter = p.adapter.map(|a| ids[a]);
        generator.add_sequence(id as u64, &p.tokens, adapter, p.sampling, ANSWER).unwrap();
    }
    let mut answers = Answers::new();
    finish(&mut generator, &mut answers);
    answers
}

#[rstest]
fn an_answer_does_not_depend_on_its_company(
    #[values(llama(), qwen())] shape: ModelShape,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let mut alone = Answers::new();
    let mut generator = generator(&shape, precision, |_| ());
    let ids = [2, 4].map(|steps| generator.add_adapter(&adapter(&shape, steps)).unwrap());
    for (id, p) in prompts(&shape).into_iter().enumerate() {
        let adapter = p.adapter.map(|a| ids[a]);
        generator.add_sequence(id as u64, &p.tokens, adapter, p.sampling, ANSWER).unwrap();
        finish(&mut generator, &mut alone);
    }
    assert!(alone.values().all(|answer| answer.len() == ANSWER));
    assert_ne!(alone[&3], alone[&4]);
    assert_eq!(together(&shape, precision, |_| ()), alone);
    assert_eq!(together(&shape, precision, |r| r.threads = 3), alone);
    // Prompts in chunks of a few tokens.
    assert_eq!(together(&shape, precision, |r| r.max_batch_tokens = 7), alone);
    // A cache so small that sequences are sent away and computed again.
    assert_eq!(together(&shape, precision, |r| r.cache_tokens = Some(80)), alone);
}

#[rstest]
fn with_the_cache_as_without(#[values(llama(), qwen())] shape: ModelShape) {
    let cached = together(&shape, Precision::F32, |_| ());
    let mut generator = generator(&shape, Precision::F32, |_| ());
    let ids = [2, 4].map(|steps| generator.add_adapter(&adapter(&shape, steps)).unwrap());
    for (id, p) in prompts(&shape).into_iter().enumerate() {
        let mut tokens = p.tokens;
        for &expected in &cached[&(id as u64)] {
            let adapter = p.adapter.map(|a| ids[a]);
            generator.add_sequence(0, &tokens, adapter, p.sampling, 1).unwrap();
            let mut next = Answers::new();
            finish(&mut generator, &mut next);
            assert_eq!(next[&0], [expected]);
            tokens.push(expected.0);
        }
    }
}

#[test]
fn training_and_generation_see_the_same_model() {
    let shape = llama();
    let answers = together(&shape, Precision::F32, |_| ());
    let mut trainer = trained(&shape, &request(&lora(0.0), Precision::F32), 2).0;
    let prompt = &prompts(&shape)[4];
    let mut tokens = prompt.tokens[10..].to_vec();
    let mut generator = generator(&shape, Precision::F32, |_| ());
    let id = generator.add_adapter(&adapter(&shape, 2)).unwrap();
    generator.add_sequence(9, &tokens, Some(id), prompt.sampling, 8).unwrap();
    let mut answer = Answers::new();
    finish(&mut generator, &mut answer);
    assert_ne!(answer[&9], answers[&4]);
    let start = tokens.len();
    tokens.extend(answer[&9].iter().map(|a| a.0));
    let row = lathe_engine::Row { weights: vec![1.0; tokens.len()], tokens };
    let log_probs = trainer.log_probs(&[row]).unwrap();
    for (a, b) in answer[&9].iter().zip(&log_probs[0][start..]) {
        assert!((f32::from_bits(a.1) - b).abs() < 1e-5);
    }
}

#[test]
fn requests_that_cannot_be_are_refused_with_what_is_allowed() {
    let shape = llama();
    let mut generator = generator(&shape, Precision::F32, |_| ());
    let fine = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 0 };
    let mut refused = |tokens: &[u32], sampling, most| {
        generator.add_sequence(1, tokens, None, sampling, most).unwrap_err().to_string()
    };
    assert!(refused(&[], fine, 1).contains("1 to 59 tokens (found 0)"));
    assert!(refused(&[0; 60], fine, 1).contains("found 60"));
    assert!(refused(&[43], fine, 1).contains("vocabulary of 43"));
    assert!(refused(&[1], fine, 0).contains("max_new_tokens"));
    assert!(refused(&[1], Sampling { top_p: 0.0, ..fine }, 1).contains("top_p"));
    assert!(refused(&[1], Sampling { temperature: f32::NAN, ..fine }, 1).contains("temperature"));
    generator.add_sequence(1, &[1], None, fine, 5).unwrap();
    assert!(generator.add_sequence(1, &[1], None, fine, 5).unwrap_err().to_string().contains("in use"));

    let id = generator.add_adapter(&adapter(&shape, 1)).unwrap();
    generator.add_sequence(2, &[1], Some(id), fine, 5).unwrap();
    generator.remove_adapter(id).unwrap();
    assert!(matches!(generator.add_sequence(3, &[1], Some(id), fine, 5), Err(Error::Adapter { .. })));
    assert_eq!(generator.capacity().free_adapter_slots, 1);
    generator.remove(2);
    assert_eq!(generator.capacity().free_adapter_slots, 2);
    assert!(matches!(generator.add_adapter(&adapter(&qwen(), 1)), Err(Error::Adapter { .. })));
}
