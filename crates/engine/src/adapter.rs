//! A LoRA adapter on the host.

use lathe_plan::{LoraSpec, ModelShape, Target};

use crate::{Dtype, Error, NamedTensor, Result, WeightSource, random};

/// A low-rank adapter: for every target of every block `A [rank, in]` and `B [out, rank]`, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    spec: LoraSpec,
    shape: ModelShape,
    /// `A` and `B`, row-major; by block, then in the order of `spec.targets`.
    pairs: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Adapter {
    /// Reads an adapter under PEFT's names, e.g.
    /// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    ///
    /// # Errors
    /// A tensor is missing or its shape does not fit the base model or the rank.
    pub fn load(shape: &ModelShape, spec: &LoraSpec, source: &dyn WeightSource) -> Result<Adapter> {
        shape.validate()?;
        spec.validate()?;
        let read = |name: String, expected: [usize; 2]| source.tensor(&name)?.to_f32(&name, &expected);
        let pairs = modules(shape, spec)
            .map(|(layer, target)| {
                let (a, b) = extents(shape, spec, target);
                Ok((read(name(layer, target, "A"), a)?, read(name(layer, target, "B"), b)?))
            })
            .collect::<Result<_>>()?;
        Ok(Adapter { spec: spec.clone(), shape: shape.clone(), pairs })
    }

    /// A new adapter as PEFT begins one: `A` uniform in +-1/sqrt(in), `B` 0, so that nothing changes yet.
    ///
    /// # Errors
    /// [`Error::Plan`] for a shape or an adapter that cannot be.
    pub fn init(shape: &ModelShape, spec: &LoraSpec, seed: u64) -> Result<Adapter> {
        shape.validate()?;
        spec.validate()?;
        let pairs = modules(shape, spec).map(|(layer, target)| {
            let ([rank, inputs], [outputs, _]) = extents(shape, spec, target);
            let key = random::key(seed, &name(layer, target, "A"));
            let bound = 1.0 / (inputs as f64).sqrt();
            let uniform = |i| ((2.0 * random::uniform(key, i as u64) - 1.0) * bound) as f32;
            ((0..rank * inputs).map(uniform).collect(), vec![0.0; outputs * rank])
        });
        Ok(Adapter { spec: spec.clone(), shape: shape.clone(), pairs: pairs.collect() })
    }

    /// An adapter of these pairs, in the order of [`Adapter::pairs`].
    pub(crate) fn of(shape: &ModelShape, spec: &LoraSpec, pairs: Vec<(Vec<f32>, Vec<f32>)>) -> Adapter {
        Adapter { spec: spec.clone(), shape: shape.clone(), pairs }
    }

    /// Rank, scale and targets.
    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    /// The base model's dimensions.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// All tensors under PEFT's names, f32, to be written to `adapter_model.safetensors`.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        let mut all = Vec::new();
        for ((layer, target), (a, b)) in modules(&self.shape, &self.spec).zip(&self.pairs) {
            let (a_shape, b_shape) = extents(&self.shape, &self.spec, target);
            all.push(NamedTensor::of(&name(layer, target, "A"), Dtype::F32, &a_shape, a));
            all.push(NamedTensor::of(&name(layer, target, "B"), Dtype::F32, &b_shape, b));
        }
        all
    }

    /// Block, target, `A` and `B` of every pair.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (usize, Target, &[f32], &[f32])> {
        modules(&self.shape, &self.spec)
            .zip(&self.pairs)
            .map(|((layer, target), (a, b))| (layer, target, &a[..], &b[..]))
    }

    /// # Errors
    /// [`Error::Adapter`] where the base model's dimensions are not the adapter's.
    pub(crate) fn check_base(&self, shape: &ModelShape) -> Result<()> {
        let differs = self.shape.layers != shape.layers
            || Target::ALL.iter().any(|&t| self.shape.linear(t) != shape.linear(t));
        if differs {
            let what = "it was made for a base model of other dimensions".to_owned();
            return Err(Error::Adapter { what });
        }
        Ok(())
    }
}

/// Every block and target of an adapter.
pub(crate) fn modules(shape: &ModelShape, spec: &LoraSpec) -> impl Iterator<Item = (usize, Target)> {
    (0..shape.layers).flat_map(|layer| spec.targets.iter().map(move |&target| (layer, target)))
}

/// The shapes of `A` and `B`.
pub(crate) fn extents(shape: &ModelShape, spec: &LoraSpec, target: Target) -> ([usize; 2], [usize; 2]) {
    let (outputs, inputs) = shape.linear(target);
    ([spec.rank, inputs], [outputs, spec.rank])
}

fn name(layer: usize, target: Target, part: &str) -> String {
    format!("base_model.model.{}.lora_{part}.weight", target.module(layer))
}
