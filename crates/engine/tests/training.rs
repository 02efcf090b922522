//! Training: the same bits however a step is cut, and a run that is stopped, damaged or refused loses nothing.
#![allow(clippy::unwrap_used)]

mod common;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::Cursor;

use common::{
    LENGTHS, Noise, floats, hyper, llama, lora, model, qwen, request, rows, state, trained, trainer_of,
};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::plan::{ModelShape, OptimizerState, Precision, TrainMethod, TrainRequest, plan_training};
use lathe_engine::{Adapter, Dtype, Error, Hyper, Model, Row, Trainer};
use rstest::rstest;

/// Rows with answers of unequal length. No two neighbours fit into [`ONE_ROW`] tokens, all of them into [`ALL_ROWS`].
const EIGHT: [usize; 8] = [63, 9, 60, 20, 64, 2, 63, 5];
const ONE_ROW: usize = 64;
const ALL_ROWS: usize = 300;

/// All eight rows at once.
fn whole(method: &TrainMethod, precision: Precision) -> TrainRequest {
    TrainRequest {
        max_row_tokens: ONE_ROW,
        batch_tokens: ALL_ROWS,
        micro_batch_tokens: Some(ALL_ROWS),
        ..request(method, precision)
    }
}

/// Gradients of the first step, and all that a run holds after the third.
fn run(shape: &ModelShape, request: &TrainRequest) -> (Vec<(String, Vec<u8>)>, Vec<u8>) {
    let mut trainer = trained(shape, request, &EIGHT, 1).0;
    let gradients = trainer.gradients().unwrap().into_iter().map(|g| (g.name, g.data)).collect();
    (gradients, trained(shape, request, &EIGHT, 3).1)
}

fn same_bits(shape: &ModelShape, expected: &TrainRequest, other: &TrainRequest) {
    let (expected, found) = (run(shape, expected), run(shape, other));
    for ((name, expected), (_, found)) in expected.0.iter().zip(&found.0) {
        assert!(found == expected, "{other:?}: the gradient of {name} has other bits");
    }
    assert!(found.1 == expected.1, "{other:?}: after three steps the bits differ");
}

#[rstest]
fn eight_micro_batches_of_one_row_are_one_of_eight(
    #[values(llama(), qwen())] shape: ModelShape,
    #[values(TrainMethod::Full, lora(0.3))] method: TrainMethod,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let whole = whole(&method, precision);
    let single = TrainRequest { micro_batch_tokens: Some(ONE_ROW), ..whole.clone() };
    for (request, passes) in [(&whole, 1), (&single, 8)] {
        let asked = Cell::new(0);
        let count = || {
            asked.set(asked.get() + 1);
            false
        };
        trainer_of(&shape, request, hyper()).step_unless(&rows(&shape, &EIGHT), &count).unwrap();
        assert_eq!(asked.get(), passes);
    }
    same_bits(&shape, &whole, &single);
}

#[rstest]
fn what_is_computed_again_is_what_was_kept(
    #[values(llama(), qwen())] shape: ModelShape,
    #[values(TrainMethod::Full, lora(0.3))] method: TrainMethod,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let kept = TrainRequest { recompute: Some(false), ..whole(&method, precision) };
    same_bits(&shape, &kept, &TrainRequest { recompute: Some(true), ..kept.clone() });
}

#[rstest]
fn any_number_of_threads_gives_the_same_bits(
    #[values(llama(), qwen())] shape: ModelShape,
    #[values(TrainMethod::Full, lora(0.3))] method: TrainMethod,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
    #[values(OptimizerState::F32, OptimizerState::Int8)] state: OptimizerState,
) {
    let one = TrainRequest { optimizer_state: Some(state), ..whole(&method, precision) };
    for threads in [2, 3, 5, 8] {
        same_bits(&shape, &one, &TrainRequest { threads, ..one.clone() });
    }
}

/// Rows of a micro-batch lie side by side without padding; each must be as if it were alone.
#[rstest]
fn packed_rows_do_not_see_each_other(
    #[values(llama(), qwen())] shape: ModelShape,
    #[values(TrainMethod::Full, lora(0.3))] method: TrainMethod,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
) {
    let request = whole(&method, precision);
    let mut trainer = trained(&shape, &request, &EIGHT, 1).0;
    let packed = rows(&shape, &EIGHT);
    let mut log_probs = |rows: &[Row]| -> Vec<Vec<u32>> {
        let bits = |row: Vec<f32>| row.iter().map(|x| x.to_bits()).collect();
        trainer.log_probs(rows).unwrap().into_iter().map(bits).collect()
    };
    let together = log_probs(&packed);
    for (row, expected) in packed.iter().zip(together) {
        assert_eq!(log_probs(std::slice::from_ref(row)), [expected]);
    }
    // Rows that nothing is learned from, whatever is in them, change no gradient of the others.
    let gradients = |swap: bool| -> Vec<Vec<f32>> {
        let silent = |(i, row): (usize, &Row)| {
            let mut row = row.clone();
            if i % 2 == 0 {
                row.weights.fill(0.0);
                if swap {
                    row.tokens.reverse();
                }
            }
            row
        };
        let rows: Vec<Row> = packed.iter().enumerate().map(silent).collect();
        let mut trainer = trainer_of(&shape, &request, hyper());
        trainer.step(&rows).unwrap();
        trainer.gradients().unwrap().iter().map(|g| floats(&g.data)).collect()
    };
    assert!(gradients(false) == gradients(true));
}

#[rstest]
fn a_resumed_run_is_one_that_never_stopped(
    #[values(TrainMethod::Full, lora(0.3))] method: TrainMethod,
    #[values(Precision::F32, Precision::BF16)] precision: Precision,
    #[values(OptimizerState::F32, OptimizerState::Int8)] moments: OptimizerState,
) {
    let shape = qwen();
    let request = TrainRequest { optimizer_state: Some(moments), ..request(&method, precision) };
    let expected = trained(&shape, &request, &LENGTHS, 5).1;
    let stopped = trained(&shape, &request, &LENGTHS, 2).1;
    let mut resumed = trainer_of(&shape, &request, hyper());
    assert_eq!(resumed.load_state(&mut Cursor::new(stopped)).unwrap(), None);
    assert_eq!(resumed.steps_done(), 2);
    for _ in 0..3 {
        resumed.step(&rows(&shape, &LENGTHS)).unwrap();
    }
    assert!(state(&mut resumed) == expected);
}

/// Nodes of one cluster differ: a pod that moves to another kind of processor loses no step.
#[test]
fn a_run_goes_on_with_other_instructions_and_says_so() {
    let shape = qwen();
    let request = request(&lora(0.0), Precision::BF16);
    let plain = || -> Trainer {
        let cpu = Box::new(Cpu::new(1, Level::Portable));
        let model = Model::load_on(cpu, &shape, Precision::BF16, &Noise(shape.clone())).unwrap();
        Trainer::new(model, &plan_training(&shape, &request).unwrap(), hyper()).unwrap()
    };
    let mut there = plain();
    there.step(&rows(&shape, &LENGTHS)).unwrap();
    let state = state(&mut there);
    let mut here = trainer_of(&shape, &request, hyper());
    let other = Level::detect().unwrap() != Level::Portable;
    let told = here.load_state(&mut Cursor::new(&state)).unwrap();
    assert_eq!(told.as_deref(), other.then_some("portable"));
    let [moved, stayed] = [&mut here, &mut there].map(|run| run.step(&rows(&shape, &LENGTHS)).unwrap());
    assert_eq!((moved.step, stayed.step), (2, 2));
    assert!((moved.loss - stayed.loss).abs() < 0.02 * stayed.loss, "{} and {}", moved.loss, stayed.loss);
}

#[test]
fn a_damaged_or_foreign_state_changes_nothing() {
    let request = request(&lora(0.0), Precision::F32);
    let few_bits = TrainRequest { optimizer_state: Some(OptimizerState::Int8), ..request.clone() };
    let good = trained(&llama(), &request, &LENGTHS, 2).1;
    let (mut trainer, before) = trained(&llama(), &request, &LENGTHS, 1);
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for bad in [
        &good[..good.len() - 1],
        &good[..40],
        &flipped,
        &trained(&qwen(), &request, &LENGTHS, 1).1,
        &trained(&llama(), &few_bits, &LENGTHS, 1).1,
        b"PK",
        b"",
    ] {
        let error = trainer.load_state(&mut Cursor::new(bad)).unwrap_err();
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
        names.into_iter().map(|n| (n.clone(), model.tensor(&n, Dtype::F32).unwrap().data)).collect()
    };
    let before = tensors(model(&shape, Precision::F32, 1));
    let (mut adapted, _) = trained(&shape, &request(&lora(0.1), Precision::F32), &LENGTHS, 2);
    let fresh = Adapter::init(&shape, adapted.adapter().unwrap().unwrap().spec(), hyper().seed).unwrap();
    for (tensor, fresh) in adapted.adapter().unwrap().unwrap().tensors().iter().zip(fresh.tensors()) {
        assert_ne!(tensor.data, fresh.data, "{} did not move", tensor.name);
    }
    assert_eq!(tensors(adapted.into_model()), before);
    let after =
        tensors(trained(&shape, &request(&TrainMethod::Full, Precision::F32), &LENGTHS, 2).0.into_model());
    for (name, data) in after {
        assert_ne!(data, before[&name], "{name} did not move");
    }
}

#[test]
fn a_step_that_is_not_finite_is_refused_and_changes_nothing() {
    let shape = llama();
    let mut request = request(&TrainMethod::Full, Precision::F32);
    request.max_row_tokens = 8;
    let wild = Hyper { learning_rate: 1e30, max_grad_norm: None, ..hyper() };
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
    let expected = trained(&shape, &request, &LENGTHS, 2).1;
    let (mut trainer, before) = trained(&shape, &request, &LENGTHS, 1);
    let rows = rows(&shape, &LENGTHS);
    let asked = Cell::new(0);
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
        let model = Model::load_on(device, &shape, Precision::F32, &Noise(shape.clone())).unwrap();
        let plan = plan_training(&shape, &request(&TrainMethod::Full, Precision::F32)).unwrap();
        let mut trainer = Trainer::new(model, &plan, hyper()).unwrap();
        (0..3).map(|_| trainer.step(&rows(&shape, &LENGTHS)).unwrap().loss).collect::<Vec<f64>>()
    });
    for (a, b) in losses[0].iter().zip(&losses[1]) {
        assert!((a - b).abs() < 1e-4, "{losses:?}");
    }
}
