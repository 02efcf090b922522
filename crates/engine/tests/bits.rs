//! The same bits however the work is cut: batches, chunks, pre-emption, threads, the cache.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{LENGTHS, Noise, hyper, llama, lora, mistral, model, noise, qwen, request, trained};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::plan::{
    AdapterBudget, ModelShape, Precision, ServeRequest, Target, TrainMethod, plan_serving, plan_training,
};
use lathe_engine::{Adapter, Embedded, Emitted, Error, Generator, Model, Row, Sampling, Trainer};
use rstest::rstest;

fn generator(shape: &ModelShape, precision: Precision, change: impl Fn(&mut ServeRequest)) -> Generator {
    let load = |threads| model(shape, precision, threads);
    generator_of(load, shape, precision, change)
}

/// As [`generator`], of a model that is loaded for so many threads.
fn generator_of(
    load: impl FnOnce(usize) -> Model,
    shape: &ModelShape,
    precision: Precision,
    change: impl Fn(&mut ServeRequest),
) -> Generator {
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
    Generator::new(load(request.threads), &plan).unwrap()
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
fn with_the_cache_as_without(
    #[values(llama(), qwen(), mistral())] shape: ModelShape,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let cached = together(&shape, precision, |_| ());
    let mut generator = generator(&shape, precision, |_| ());
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

/// Prompts of which some begin alike, by the base and by an adapter.
fn alike(shape: &ModelShape) -> Vec<Prompt> {
    let tokens = |from: u64, count: usize| -> Vec<u32> {
        (0..count).map(|t| ((noise(from, t as u64) + 1.0) / 2.0 * shape.vocab as f64) as u32).collect()
    };
    let beginning = tokens(1, 36);
    let mut longer = beginning.clone();
    longer.extend(tokens(2, 9));
    let mut other = beginning[..20].to_vec();
    other.extend(tokens(3, 5));
    let greedy = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    let prompt = |tokens: &[u32], adapter| Prompt { tokens: tokens.to_vec(), adapter, sampling: greedy };
    vec![
        prompt(&beginning, None),
        prompt(&longer, None),
        prompt(&other, None),
        prompt(&beginning, Some(0)),
        prompt(&longer, Some(0)),
        prompt(&beginning[..32], None),
        prompt(&longer, None),
    ]
}

#[rstest]
fn a_beginning_that_others_have_read_is_not_read_again_and_gives_the_same_bits(
    #[values(llama(), qwen(), mistral())] shape: ModelShape,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let start = |tokens: Option<usize>| {
        let mut generator = generator(&shape, precision, |r| r.cache_tokens = tokens);
        let id = generator.add_adapter(&adapter(&shape, 2)).unwrap();
        (generator, id)
    };
    let (mut unshared, id) = start(None);
    let mut expected = Answers::new();
    for (i, p) in alike(&shape).into_iter().enumerate() {
        unshared.add_sequence(i as u64, &p.tokens, p.adapter.map(|_| id), p.sampling, ANSWER).unwrap();
        finish(&mut unshared, &mut expected);
    }

    // One after the other: what is read is what is new, and the rest of a block.
    let (mut generator, id) = start(None);
    let (mut answers, mut read, mut cached) = (Answers::new(), Vec::new(), Vec::new());
    for (i, p) in alike(&shape).into_iter().enumerate() {
        generator.add_shared(i as u64, &p.tokens, p.adapter.map(|_| id), p.sampling, ANSWER).unwrap();
        let first = generator.step().unwrap();
        assert_eq!(generator.last_step().generation, 0);
        read.push(generator.last_step().prompt);
        cached.push(first[0].cached);
        answers.entry(i as u64).or_default().push((first[0].token, first[0].log_prob.to_bits()));
        finish(&mut generator, &mut answers);
    }
    assert_eq!(answers, expected);
    assert_eq!(cached, [0, 32, 16, 0, 32, 16, 32]);
    assert_eq!(read, [36, 13, 9, 36, 13, 16, 13]);

    // Together, also where there is so little room that sequences are sent away and begin again.
    for tokens in [None, Some(80), Some(64)] {
        let (mut generator, id) = start(tokens);
        let mut answers = Answers::new();
        for round in 0..2 {
            for (i, p) in alike(&shape).into_iter().enumerate() {
                let adapter = p.adapter.map(|_| id);
                generator.add_shared(i as u64, &p.tokens, adapter, p.sampling, ANSWER).unwrap();
            }
            answers.clear();
            finish(&mut generator, &mut answers);
            assert_eq!(answers, expected, "{tokens:?}, round {round}");
        }
    }
}

#[test]
fn what_is_not_shared_is_not_found_and_finds_nothing() {
    let shape = llama();
    let mut generator = generator(&shape, Precision::F32, |_| ());
    let Prompt { tokens, sampling, .. } = &alike(&shape)[0];
    let mut cached = |shared: bool| {
        let add = if shared { Generator::add_shared } else { Generator::add_sequence };
        add(&mut generator, 1, tokens, None, *sampling, 1).unwrap();
        generator.step().unwrap()[0].cached
    };
    assert_eq!([false, true, false, true].map(&mut cached), [0, 0, 0, 32]);
}

/// Embeds the prompts beside as many answers to them, one after the other or all at once; the bits of each vector.
fn embedded(
    shape: &ModelShape,
    precision: Precision,
    alone: bool,
    change: impl Fn(&mut ServeRequest),
) -> BTreeMap<u64, Vec<u32>> {
    let mut generator = generator(shape, precision, |r| {
        r.context = 64;
        change(r);
    });
    let ids = [2, 4].map(|steps| generator.add_adapter(&adapter(shape, steps)).unwrap());
    let mut vectors = BTreeMap::new();
    let mut finish = |generator: &mut Generator| {
        for _ in 0..2000 {
            generator.step().unwrap();
            for Embedded { sequence, vector, .. } in generator.take_embedded() {
                let bits = vector.into_iter().map(f32::to_bits).collect();
                assert_eq!(vectors.insert(sequence, bits), None);
            }
            if generator.idle() {
                return;
            }
        }
        panic!("the generator does not come to an end");
    };
    let long: Vec<u32> = (0..64).map(|t| t * 7 % shape.vocab as u32).collect();
    let whole = Prompt { tokens: long, adapter: None, sampling: prompts(shape)[0].sampling };
    for (id, p) in prompts(shape).into_iter().chain([whole]).enumerate() {
        let (id, adapter) = (id as u64, p.adapter.map(|a| ids[a]));
        if !alone && p.tokens.len() < 64 {
            generator.add_sequence(100 + id, &p.tokens, adapter, p.sampling, ANSWER).unwrap();
        }
        generator.add_embedding(id, &p.tokens, adapter).unwrap();
        if alone {
            finish(&mut generator);
        }
    }
    if !alone {
        finish(&mut generator);
    }
    vectors
}

#[rstest]
fn an_embedding_does_not_depend_on_its_company(
    #[values(llama(), qwen(), mistral())] shape: ModelShape,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let alone = embedded(&shape, precision, true, |_| ());
    assert_eq!(alone.len(), 7);
    assert!(alone.values().all(|vector| vector.len() == shape.hidden));
    assert_ne!(alone[&3], alone[&4]);
    assert_eq!(embedded(&shape, precision, false, |_| ()), alone);
    assert_eq!(embedded(&shape, precision, false, |r| r.threads = 3), alone);
    // Prompts in chunks of a few tokens.
    assert_eq!(embedded(&shape, precision, false, |r| r.max_batch_tokens = 7), alone);
    // A cache that has room for one context and no token more.
    assert_eq!(embedded(&shape, precision, false, |r| r.cache_tokens = Some(64)), alone);
}

#[test]
fn an_embedding_and_an_answer_share_what_was_read() {
    let shape = llama();
    let mut generator = generator(&shape, Precision::F32, |_| ());
    let Prompt { tokens, sampling, .. } = &alike(&shape)[1];
    let embed = |generator: &mut Generator| {
        generator.add_embedding(1, tokens, None).unwrap();
        generator.step().unwrap();
        generator.take_embedded().remove(0)
    };
    let first = embed(&mut generator);
    assert_eq!(first.cached, 0);
    generator.add_shared(2, tokens, None, *sampling, 1).unwrap();
    assert_eq!(generator.step().unwrap()[0].cached, 32);
    assert_eq!(generator.take_embedded(), []);
    assert_eq!(embed(&mut generator), Embedded { cached: 32, ..first });
}

#[rstest]
fn training_and_generation_see_the_same_model(
    #[values(llama(), qwen(), mistral())] shape: ModelShape,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let answers = together(&shape, precision, |_| ());
    let mut trainer = trained(&shape, &request(&lora(0.0), precision), &LENGTHS, 2).0;
    let prompt = &prompts(&shape)[4];
    let mut tokens = prompt.tokens[10..].to_vec();
    let mut generator = generator(&shape, precision, |_| ());
    let id = generator.add_adapter(&trainer.adapter().unwrap().unwrap()).unwrap();
    generator.add_sequence(9, &tokens, Some(id), prompt.sampling, 8).unwrap();
    let mut answer = Answers::new();
    finish(&mut generator, &mut answer);
    assert_ne!(answer[&9], answers[&4]);
    assert_eq!(answer[&9], as_trained(&mut trainer, &mut tokens, &answer[&9]));
}

/// The answer to the prompt `tokens`, which grow by it, with the bits of the log-probabilities that training sees.
fn as_trained(trainer: &mut Trainer, tokens: &mut Vec<u32>, answer: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let start = tokens.len();
    tokens.extend(answer.iter().map(|a| a.0));
    let row = Row { weights: vec![1.0; tokens.len()], tokens: tokens.clone() };
    let log_probs = trainer.log_probs(&[row]).unwrap().remove(0);
    tokens[start..].iter().copied().zip(log_probs[start..].iter().map(|x| x.to_bits())).collect()
}

/// A long prompt takes gate and up in one pass on tiles; not so beside an adapter that changes them, and in training.
#[rstest]
fn gate_and_up_in_one_pass_have_the_bits_of_two(
    #[values(Level::Portable, Level::AmxEmulated, Level::Amx)] level: Level,
) {
    let (shape, precision) = (qwen(), Precision::BF16);
    let load = |threads| {
        let device = Box::new(Cpu::new(threads, level));
        Model::load_on(device, &shape, precision, &Noise(shape.clone())).unwrap()
    };
    let mut tokens: Vec<u32> = (0..35).map(|t| t * 7 % shape.vocab as u32).collect();
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    let answer = |slots: usize| {
        let mut generator = generator_of(load, &shape, precision, |r| r.adapters.slots = slots);
        if slots > 0 {
            generator.add_adapter(&adapter(&shape, 2)).unwrap();
        }
        generator.add_sequence(0, &tokens, None, sampling, 5).unwrap();
        let mut answers = Answers::new();
        finish(&mut generator, &mut answers);
        answers.remove(&0).unwrap()
    };
    let [one_pass, two] = [0, 1].map(answer);
    assert_eq!(one_pass, two);
    let plan = plan_training(&shape, &request(&TrainMethod::Full, precision)).unwrap();
    let mut trainer = Trainer::new(load(1), &plan, hyper()).unwrap();
    assert_eq!(one_pass, as_trained(&mut trainer, &mut tokens, &one_pass));
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
    // An answer needs room, an embedding none.
    assert!(generator.add_embedding(1, &[0; 61], None).unwrap_err().to_string().contains("1 to 60 tokens"));
    assert!(generator.add_embedding(1, &[], None).unwrap_err().to_string().contains("1 to 60 tokens"));
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
