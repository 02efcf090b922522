//! Training of tiny fully random models against PyTorch's and PEFT's: every gradient, every parameter.
#![allow(clippy::unwrap_used)]

mod hf;

use hf::{folder, hyper, json, load, lora, numbers, rms, rows, trainer, wide};
use lathe_engine::files::{SafetensorsFile, StoredDtype};
use lathe_engine::plan::{ModelShape, Precision, TrainMethod};
use lathe_engine::{Adapter, Dtype, NamedTensor, StepStats, TensorView, Trainer, WeightSource};
use rstest::rstest;
use serde_json::Value;

/// `training-METHOD.json` and `.safetensors` of a model.
struct Fixture {
    record: Value,
    tensors: SafetensorsFile,
}

/// What the script keeps under names that begin with `kind`.
struct Kind<'a>(&'a SafetensorsFile, &'a str);

impl WeightSource for Kind<'_> {
    fn tensor(&self, name: &str) -> lathe_engine::Result<TensorView<'_>> {
        self.0.tensor(&format!("{}.{name}", self.1))
    }
}

impl Kind<'_> {
    fn values(&self, name: &str) -> Vec<f64> {
        let tensor = self.0.get(&format!("{}.{name}", self.1)).unwrap();
        wide(tensor.dtype, tensor.bytes)
    }

    /// Without the kind, sorted.
    fn names(&self) -> Vec<&str> {
        let all = self.0.header().tensors.keys();
        let mut names: Vec<&str> =
            all.filter_map(|name| name.strip_prefix(self.1)?.strip_prefix('.')).collect();
        names.sort_unstable();
        names
    }
}

impl Fixture {
    fn read(name: &str, method: &str) -> Fixture {
        let tensors =
            SafetensorsFile::open(&folder(name).join(format!("training-{method}.safetensors"))).unwrap();
        Fixture { record: json(name, &format!("training-{method}.json")), tensors }
    }

    fn kind<'a>(&'a self, kind: &'a str) -> Kind<'a> {
        Kind(&self.tensors, kind)
    }

    /// A trainer at the script's start.
    fn trainer(&self, name: &str, method: &str, precision: Precision) -> (Trainer, ModelShape) {
        let (model, shape) = load(name, precision);
        let hyper = hyper(&self.record);
        if method == "full" {
            return (trainer(model, TrainMethod::Full, hyper), shape);
        }
        let adapter = Adapter::load(&shape, &lora(), &self.kind("before")).unwrap();
        let mut trainer = trainer(model, TrainMethod::Lora(lora()), hyper);
        trainer.set_adapter(&adapter).unwrap();
        (trainer, shape)
    }
}

/// What is trained, as it is now.
fn parameters(mut trainer: Trainer, shape: &ModelShape) -> Vec<NamedTensor> {
    if let Some(adapter) = trainer.adapter().unwrap() {
        return adapter.tensors();
    }
    let mut model = trainer.into_model();
    shape.tensors().iter().map(|tensor| model.tensor(&tensor.name, Dtype::F32).unwrap()).collect()
}

/// Of all tensors that the script keeps, by how much of its norm each of ours differs.
fn apart(ours: &[NamedTensor], theirs: &Kind<'_>) -> Vec<(String, f64)> {
    let mut names: Vec<&str> = ours.iter().map(|tensor| &*tensor.name).collect();
    names.sort_unstable();
    assert_eq!(names, theirs.names());
    let relative = |tensor: &NamedTensor| {
        let theirs = theirs.values(&tensor.name);
        let norm = rms(&theirs, &vec![0.0; theirs.len()]);
        (tensor.name.clone(), rms(&wide(StoredDtype::F32, &tensor.data), &theirs) / norm)
    };
    ours.iter().map(relative).collect()
}

#[rstest]
fn every_gradient_and_every_parameter_is_pytorchs(
    #[values("llama-gqa", "qwen2", "mistral")] name: &str,
    #[values("full", "lora")] method: &str,
) {
    let fixture = Fixture::read(name, method);
    let rows = rows(&fixture.record);
    let (mut trainer, shape) = fixture.trainer(name, method, Precision::F32);
    let [losses, norms, rates] =
        ["losses", "grad_norms", "learning_rates"].map(|field| numbers(&fixture.record, field));
    assert_eq!(losses.len(), 3);
    for step in 0..losses.len() {
        let StepStats { loss, grad_norm, learning_rate, .. } = trainer.step(&rows).unwrap();
        for (what, ours, theirs) in [
            ("loss", loss, losses[step]),
            ("norm", grad_norm, norms[step]),
            ("rate", learning_rate, rates[step]),
        ] {
            assert!((ours - theirs).abs() < 1e-5 * theirs, "step {step}: {what} {ours} instead of {theirs}");
        }
        if step == 0 {
            for (tensor, apart) in apart(&trainer.gradients().unwrap(), &fixture.kind("gradient")) {
                assert!(apart < 1e-5, "the gradient of {tensor} is {apart:.1e} of its norm apart");
            }
        }
    }
    for (tensor, apart) in apart(&parameters(trainer, &shape), &fixture.kind("after")) {
        assert!(apart < 1e-5, "after three steps {tensor} is {apart:.1e} of its norm apart");
    }
}

#[rstest]
fn gradients_of_bf16_weights_are_as_close_to_the_truth_as_pytorchs(
    #[values("llama-gqa", "qwen2", "mistral")] name: &str,
    #[values("full", "lora")] method: &str,
) {
    let fixture = Fixture::read(name, method);
    let (mut trainer, _) = fixture.trainer(name, method, Precision::BF16);
    trainer.step(&rows(&fixture.record)).unwrap();
    let (truth, bf16) = (fixture.kind("gradient_f64"), fixture.kind("gradient_bf16"));
    for (tensor, ours) in apart(&trainer.gradients().unwrap(), &truth) {
        let exact = truth.values(&tensor);
        let theirs = rms(&bf16.values(&tensor), &exact) / rms(&exact, &vec![0.0; exact.len()]);
        assert!(ours <= 1.25 * theirs, "{tensor}: our error is {ours:.2e}, PyTorch's {theirs:.2e}");
    }
}
