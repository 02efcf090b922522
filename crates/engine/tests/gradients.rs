//! Losses and gradients against the decoder in f64 and its finite differences.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;

use common::reference::Reference;
use common::{floats, hyper, llama, lora, mistral, noise, qwen, request, rows, trainer_of};
use lathe_engine::plan::{ModelShape, Precision, TrainMethod};
use lathe_engine::{Hyper, NamedTensor, Trainer};
use rstest::rstest;

/// Long enough that attention crosses a page.
const LENGTHS: [usize; 3] = [21, 5, 9];

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() < 2e-3 * expected.abs() + 3e-6
}

fn check_gradients(mut reference: Reference, gradients: &[NamedTensor], shape: &ModelShape) {
    let rows = rows(shape, &LENGTHS);
    for tensor in gradients {
        let values = floats(&tensor.data);
        assert!(values.iter().any(|&g| g != 0.0), "{} has no gradient", tensor.name);
        for i in 0..6 {
            let at = ((noise(9, i) + 1.0) / 2.0 * values.len() as f64) as usize;
            let expected = reference.derivative(&tensor.name, at, &rows);
            let found = f64::from(values[at]);
            assert!(close(found, expected), "{}[{at}]: {found} instead of {expected}", tensor.name);
        }
    }
}

#[rstest]
fn full_gradients_are_the_finite_differences(
    #[values(llama(), qwen(), mistral())] shape: ModelShape,
    #[values(false, true)] recompute: bool,
) {
    let mut request = request(&TrainMethod::Full, Precision::F32);
    request.recompute = Some(recompute);
    let mut trainer = trainer_of(&shape, &request, hyper());
    let rows = rows(&shape, &LENGTHS);
    let reference = Reference::new(&shape);
    let stats = trainer.step(&rows).unwrap();
    assert!((stats.loss - reference.loss(&rows)).abs() < 1e-5, "{} {}", stats.loss, reference.loss(&rows));
    let gradients = trainer.gradients().unwrap();
    assert_eq!(gradients.len(), shape.tensors().len());
    let norm =
        gradients.iter().flat_map(|t| floats(&t.data)).map(|g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    assert!((norm - stats.grad_norm).abs() < 1e-6 * norm, "{norm} {}", stats.grad_norm);
    check_gradients(reference, &gradients, &shape);
}

/// An adapter with both halves far from their beginnings.
fn stirred(shape: &ModelShape, method: &TrainMethod, hyper: Hyper) -> Trainer {
    let TrainMethod::Lora(spec) = method else { panic!("a LoRA method") };
    let mut trainer = trainer_of(shape, &request(method, Precision::F32), hyper);
    let start = trainer.adapter().unwrap().unwrap();
    let mut stirred: HashMap<String, NamedTensor> = HashMap::new();
    for (number, mut tensor) in start.tensors().into_iter().enumerate() {
        let len = tensor.data.len() / 4;
        tensor.data = (0..len)
            .flat_map(|i| (0.3 * noise(500 + number as u64, i as u64) as f32).to_le_bytes())
            .collect();
        stirred.insert(tensor.name.clone(), tensor);
    }
    let adapter = lathe_engine::Adapter::load(shape, spec, &common::Tensors(stirred)).unwrap();
    trainer.set_adapter(&adapter).unwrap();
    trainer
}

#[rstest]
fn adapter_gradients_are_the_finite_differences(#[values(llama(), qwen(), mistral())] shape: ModelShape) {
    let mut trainer = stirred(&shape, &lora(0.0), hyper());
    let rows = rows(&shape, &LENGTHS);
    let reference = Reference::new(&shape).with_adapter(&trainer.adapter().unwrap().unwrap());
    let stats = trainer.step(&rows).unwrap();
    assert!((stats.loss - reference.loss(&rows)).abs() < 1e-5);
    let gradients = trainer.gradients().unwrap();
    assert_eq!(gradients.len(), 2 * 7 * shape.layers);
    check_gradients(reference, &gradients, &shape);
}

/// With dropout there is no closed reference; but moving along the gradient must change the loss of the same mask
/// by the gradient's length.
#[test]
fn the_gradient_through_dropout_is_the_slope_of_its_own_loss() {
    let shape = llama();
    let TrainMethod::Lora(spec) = lora(0.4) else { panic!("a LoRA method") };
    let still = Hyper { learning_rate: 0.0, ..hyper() };
    let rows = rows(&shape, &LENGTHS);
    let mut trainer = stirred(&shape, &lora(0.4), still.clone());
    let stats = trainer.step(&rows).unwrap();
    let without = stirred(&shape, &lora(0.0), still.clone()).step(&rows).unwrap();
    assert!((stats.loss - without.loss).abs() > 1e-3, "dropout changes nothing");
    let start = trainer.adapter().unwrap().unwrap();
    let gradients = trainer.gradients().unwrap();
    let loss_at = |length: f64| {
        let moved = start.tensors().into_iter().zip(&gradients).map(|(mut tensor, g)| {
            let moved = floats(&tensor.data).into_iter().zip(floats(&g.data));
            let by = |(x, g): (f32, f32)| (f64::from(x) + length * f64::from(g) / stats.grad_norm) as f32;
            tensor.data = moved.flat_map(|pair| by(pair).to_le_bytes()).collect();
            (tensor.name.clone(), tensor)
        });
        let adapter = lathe_engine::Adapter::load(&shape, &spec, &common::Tensors(moved.collect())).unwrap();
        // A new trainer, so that step and mask are the same.
        let mut trainer = stirred(&shape, &lora(0.4), still.clone());
        trainer.set_adapter(&adapter).unwrap();
        trainer.step(&rows).unwrap().loss
    };
    let slope = (loss_at(0.01) - loss_at(-0.01)) / 0.02;
    assert!((slope / stats.grad_norm - 1.0).abs() < 0.01, "{slope} {}", stats.grad_norm);
}

#[rstest]
fn log_probs_are_the_references(#[values(llama(), qwen(), mistral())] shape: ModelShape) {
    let mut trainer = trainer_of(&shape, &request(&lora(0.5), Precision::F32), hyper());
    let reference = Reference::new(&shape);
    let rows = rows(&shape, &LENGTHS);
    for (row, found) in rows.iter().zip(trainer.log_probs(&rows).unwrap()) {
        assert_eq!(found.len(), row.tokens.len());
        for (i, expected) in reference.log_probs(&row.tokens).into_iter().enumerate() {
            let expected = if row.weights[i + 1] == 0.0 { 0.0 } else { expected };
            assert!((f64::from(found[i + 1]) - expected).abs() < 1e-5, "{} {expected}", found[i + 1]);
        }
    }
}
