//! The seam to a device: steps of one shape enqueue the same operations, and nothing is read back on the way.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::{Noise, hyper, lora, qwen, request, rows};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Event, Recorder};
use lathe_engine::plan::{
    AdapterBudget, Precision, ServeRequest, Target, TrainMethod, TrainRequest, plan_serving, plan_training,
};
use lathe_engine::{Generator, Model, Row, Sampling, Trainer};
use rstest::rstest;

fn recorded() -> (Model, Arc<Mutex<Vec<Event>>>) {
    let shape = qwen();
    let (device, events) = Recorder::new(Cpu::new(1, Level::detect().expect("a level")));
    (Model::load_on(Box::new(device), &shape, Precision::F32, &Noise(shape.clone())).unwrap(), events)
}

fn take(events: &Mutex<Vec<Event>>) -> Vec<Event> {
    std::mem::take(&mut events.lock().unwrap())
}

fn reads_come_last(events: &[Event]) -> bool {
    let is_read = |e: &Event| matches!(e, Event::Read(_));
    let first = events.iter().position(is_read).unwrap_or(events.len());
    events[first..].iter().all(is_read)
}

#[rstest]
fn training_steps_of_one_shape_enqueue_the_same(#[values(TrainMethod::Full, lora(0.2))] method: TrainMethod) {
    let shape = qwen();
    let (model, events) = recorded();
    let request = TrainRequest { micro_batch_tokens: Some(40), ..request(&method, Precision::F32) };
    let mut trainer = Trainer::new(model, &plan_training(&shape, &request).unwrap(), hyper()).unwrap();
    take(&events);
    let first = rows(&shape, &[21, 9, 30]);
    let other_tokens = |row: Row| Row { tokens: row.tokens.into_iter().rev().collect(), ..row };
    let second = first.clone().into_iter().map(other_tokens).collect::<Vec<_>>();
    trainer.step(&first).unwrap();
    let recorded = take(&events);
    trainer.step(&second).unwrap();
    assert!(recorded == take(&events), "two steps of one shape differ");
    assert!(recorded.len() > 50 && reads_come_last(&recorded));
    assert!(!recorded.iter().any(|e| matches!(e, Event::Alloc(_) | Event::Free(_))));
}

#[test]
fn decoding_steps_of_one_shape_enqueue_the_same() {
    let shape = qwen();
    let (model, events) = recorded();
    let request = ServeRequest {
        weights: Precision::F32,
        context: 60,
        max_sequences: 4,
        max_batch_tokens: 64,
        cache_tokens: None,
        adapters: AdapterBudget { slots: 1, max_rank: 4, targets: Target::ALL.into() },
        threads: 1,
        memory_limit: None,
    };
    let mut generator = Generator::new(model, &plan_serving(&shape, &request).unwrap()).unwrap();
    let greedy = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
    for (id, prompt) in [[1u32, 2, 3], [4, 5, 6]].iter().enumerate() {
        generator.add_sequence(id as u64, prompt, None, greedy, 40).unwrap();
    }
    generator.step().unwrap();
    take(&events);
    generator.step().unwrap();
    let first = take(&events);
    // Far enough that a new block begins.
    for _ in 0..20 {
        generator.step().unwrap();
        assert!(first == take(&events), "two decoding steps differ");
    }
    assert!(reads_come_last(&first));
}

#[test]
fn models_give_their_memory_back() {
    let shape = qwen();
    let (model, events) = recorded();
    let plan = plan_training(&shape, &request(&lora(0.2), Precision::F32)).unwrap();
    take(&events);
    let model = Trainer::new(model, &plan, hyper()).unwrap().into_model();
    let events = take(&events);
    let count = |f: fn(&Event) -> bool| events.iter().filter(|e| f(e)).count();
    assert_eq!(count(|e| matches!(e, Event::Alloc(_))), count(|e| matches!(e, Event::Free(_))));
    assert_eq!(model.tensors().len(), shape.tensors().len());
}
