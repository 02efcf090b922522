//! The same bits however the work is cut: batches, chunks, pre-emption, threads, the cache.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{LENGTHS, llama, lora, mistral, model, noise, qwen, request, trained};
use lathe_engine::plan::{AdapterBudget, ModelShape, Precision, ServeRequest, Target, plan_serving};
use lathe_engine::{Adapter, Emitted, Error, Generator, Sampling};
use rstest::rstest;

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
    let mut trainer = trained(shape, &request(&lora(0.0), Precision::F32), &LENGTHS, steps).0;
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
    #[values(llama(), qwen(), mistral())] shape: ModelShape,
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
fn with_the_cache_as_without(#[values(llama(), qwen(), mistral())] shape: ModelShape) {
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
    let mut trainer = trained(&shape, &request(&lora(0.0), Precision::F32), &LENGTHS, 2).0;
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
