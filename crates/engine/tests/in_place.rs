//! Weights used where their file lies: nothing is copied, and whatever a trainer does, the file stays as it is.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, hyper, qwen, request, rows, written};
use half::bf16;
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Event, Recorder};
use lathe_engine::files::SafetensorsFile;
use lathe_engine::plan::{ModelShape, Precision, TrainMethod, plan_training};
use lathe_engine::{Dtype, Model, Trainer, WeightSource};
use rstest::rstest;

fn loaded(shape: &ModelShape, precision: Precision, source: &dyn WeightSource) -> (Model, usize) {
    let (device, events) = Recorder::new(Cpu::new(1, Level::detect().expect("a level")));
    let model = Model::load_on(Box::new(device), shape, precision, source).unwrap();
    let written = events.lock().unwrap().iter().filter(|e| matches!(e, Event::Write(_))).count();
    (model, written)
}

#[rstest]
#[case::all(Dtype::F32, Precision::F32, 0)]
// Norms (2 x 2 + 1) and biases (2 x 3) are held in f32.
#[case::matrices(Dtype::BF16, Precision::BF16, 11)]
#[case::none_widened(Dtype::BF16, Precision::F32, 26)]
fn what_a_file_has_in_the_right_precision_is_not_copied(
    #[case] dtype: Dtype,
    #[case] precision: Precision,
    #[case] copied: usize,
) {
    let shape = qwen();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    written(&path, &shape, dtype);
    let file = SafetensorsFile::open(&path).unwrap();
    let (mut model, writes) = loaded(&shape, precision, &file);
    assert_eq!(writes, copied);
    drop(file);
    for (name, _) in model.tensors() {
        let (_, values) = Noise(shape.clone()).values(&name).unwrap();
        let stored = |x: f32| if dtype == Dtype::F32 { x } else { bf16::from_f32(x).to_f32() };
        let expected: Vec<f32> = values.into_iter().map(stored).collect();
        assert_eq!(common::floats(&model.tensor(&name, Dtype::F32).unwrap().data), expected, "{name}");
    }
}

#[rstest]
fn training_every_weight_changes_neither_the_file_nor_another_model_of_it(
    #[values((Dtype::F32, Precision::F32), (Dtype::BF16, Precision::BF16))] held: (Dtype, Precision),
) {
    let shape = qwen();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    written(&path, &shape, held.0);
    let before = std::fs::read(&path).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    let request = request(&TrainMethod::Full, held.1);
    let plan = plan_training(&shape, &request).unwrap();
    let steps = |model: Model| {
        let mut trainer = Trainer::new(model, &plan, hyper()).unwrap();
        for _ in 0..3 {
            trainer.step(&rows(&shape, &[21, 9, 30])).unwrap();
        }
        let mut model = trainer.into_model();
        model.tensor("model.layers.1.mlp.up_proj.weight", Dtype::F32).unwrap().data
    };
    let first = steps(loaded(&shape, held.1, &file).0);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let again = SafetensorsFile::open(&path).unwrap();
    let second = steps(loaded(&shape, held.1, &again).0);
    assert!(first == second, "the second model began with other weights");
}
