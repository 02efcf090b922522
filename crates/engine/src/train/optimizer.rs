//! What is trained, and where its gradients and moments lie.

use std::ops::Range;
use std::sync::Arc;

use lathe_plan::{Element, LoraSpec, ModelShape, OptimizerState, Target, TensorKind, TrainMethod, TrainPlan};

use super::Hyper;
use crate::adapter::{extents, modules};
use crate::decoder::{LayerGradients, LayerLora, Planned};
use crate::device::{Buf, Data, Device, LoraSlot, MOMENT_BLOCK, Moments, Op};
use crate::{Error, Model, Result, host};

/// A trained tensor: its place in the flat ranges, and its weights.
#[derive(Debug, Clone)]
pub(super) struct Parameter {
    range: Range<usize>,
    /// The first of its blocks of moments.
    first_block: usize,
    /// f32: the weights themselves, or the masters of `copy`.
    pub weights: Buf,
    /// The bf16 weights that the model works with.
    copy: Option<Buf>,
    /// Whether weight decay applies: to matrices only.
    decays: bool,
}

/// Where gradients go.
#[derive(Debug, Default)]
pub(super) struct ModelGradients {
    pub layers: Vec<LayerGradients>,
    pub norm: Option<Buf>,
    /// Of the head, also where it is the embedding.
    pub head: Option<Buf>,
    /// Of the embedding's lookups.
    pub lookup: Option<Buf>,
}

/// All that is trained.
pub(super) struct Parameters {
    pub all: Vec<Parameter>,
    pub gradients: ModelGradients,
    flat: Buf,
    /// The lookups' own sum, and the embedding's range of `flat`, where the table is tied.
    tied: Option<(Buf, Buf)>,
    moments: Moments,
    partials: Buf,
    pub norm: Buf,
    settings: Buf,
}

impl Parameters {
    pub(super) fn new(model: &Model, plan: &TrainPlan, planned: &Planned) -> Result<Parameters> {
        let both = |first, second| -> Result<_> { Ok([planned.get(first)?, planned.get(second)?]) };
        let mut parameters = Parameters {
            all: Vec::new(),
            gradients: ModelGradients {
                layers: vec![LayerGradients::default(); model.shape.layers],
                ..ModelGradients::default()
            },
            flat: planned.get("gradients")?,
            tied: None,
            moments: match plan.optimizer_state {
                OptimizerState::F32 => Moments::F32(both("moment1", "moment2")?),
                OptimizerState::Int8 => Moments::Int8 {
                    codes: both("moment1", "moment2")?,
                    scales: both("moment1.scales", "moment2.scales")?,
                },
            },
            partials: planned.get("step.partials")?,
            norm: planned.get("step.norm")?,
            settings: planned.get("step.optimizer")?,
        };
        match &plan.method {
            TrainMethod::Full => parameters.add_model(model, planned)?,
            TrainMethod::Lora(lora) => parameters.add_adapter(&model.shape, lora, planned.get("trained")?)?,
        }
        Ok(parameters)
    }

    fn next(&self, len: usize) -> Range<usize> {
        let start = self.all.last().map_or(0, |p| p.range.end);
        start..start + len
    }

    fn add(&mut self, range: Range<usize>, weights: Buf, copy: Option<Buf>, decays: bool) {
        let first_block = self.all.last().map_or(0, |p| p.first_block + p.range.len().div_ceil(MOMENT_BLOCK));
        self.all.push(Parameter { range, first_block, weights, copy, decays });
    }

    fn gradient(&self, range: &Range<usize>) -> Buf {
        self.flat.part(range.start, range.len())
    }

    fn add_model(&mut self, model: &Model, planned: &Planned) -> Result<()> {
        let masters = planned.find("trained");
        for tensor in model.shape.tensors() {
            let range = self.next(tensor.elements()?);
            let missing = || Error::MissingTensor { name: tensor.name.clone() };
            let working = *model.tensors.get(&tensor.name).ok_or_else(missing)?;
            let (weights, copy) = match masters {
                Some(masters) if working.element() == Element::BF16 => {
                    (masters.part(range.start, range.len()), Some(working))
                }
                _ => (working, None),
            };
            let gradient = self.gradient(&range);
            match tensor.kind {
                TensorKind::Embedding if model.shape.tie_embeddings => {
                    let lookup = planned.get("gradients.lookup")?;
                    self.tied = Some((lookup, gradient));
                    (self.gradients.lookup, self.gradients.head) = (Some(lookup), Some(gradient));
                }
                TensorKind::Embedding => self.gradients.lookup = Some(gradient),
                TensorKind::Head => self.gradients.head = Some(gradient),
                TensorKind::FinalNorm => self.gradients.norm = Some(gradient),
                kind => place(&mut self.gradients.layers, &tensor.name, kind, gradient)?,
            }
            self.add(range, weights, copy, tensor.is_matrix());
        }
        Ok(())
    }

    fn add_adapter(&mut self, shape: &ModelShape, lora: &LoraSpec, trained: Buf) -> Result<()> {
        for (layer, target) in modules(shape, lora) {
            let (a, b) = extents(shape, lora, target);
            for (extent, is_a) in [(a, true), (b, false)] {
                let range = self.next(extent[0] * extent[1]);
                let gradient = self.gradient(&range);
                let to = &mut self.gradients.layers[layer].linears[target as usize];
                *(if is_a { &mut to.a } else { &mut to.b }) = Some(gradient);
                let weights = trained.part(range.start, range.len());
                self.add(range, weights, None, true);
            }
        }
        Ok(())
    }

    /// `A`, `B` and the extent of `B` of every pair, in the order of [`modules`].
    pub(super) fn pairs<'a>(
        &'a self,
        shape: &'a ModelShape,
        lora: &'a LoraSpec,
    ) -> impl Iterator<Item = (Buf, Buf, [usize; 2])> + 'a {
        modules(shape, lora).zip(self.all.chunks_exact(2)).map(|((_, target), pair)| {
            let (_, b) = extents(shape, lora, target);
            (pair[0].weights, pair[1].weights, b)
        })
    }

    /// The gradients of `A` and `B` of every pair, as [`Parameters::pairs`].
    pub(super) fn gradient_pairs<'a>(
        &'a self,
        shape: &'a ModelShape,
        lora: &'a LoraSpec,
    ) -> impl Iterator<Item = (Buf, Buf, [usize; 2])> + 'a {
        self.pairs(shape, lora)
            .zip(self.all.chunks_exact(2))
            .map(|((_, _, b), pair)| (self.gradient(&pair[0].range), self.gradient(&pair[1].range), b))
    }

    /// The gradients of all parameters, in their order.
    pub(super) fn gradients_of_all(&self) -> impl Iterator<Item = Buf> + '_ {
        self.all.iter().map(|p| self.gradient(&p.range))
    }

    /// The one adapter in training, as slot 0 of every block.
    pub(super) fn lora(&self, shape: &ModelShape, method: &TrainMethod) -> Vec<LayerLora> {
        let mut layers = vec![LayerLora::default(); shape.layers];
        let TrainMethod::Lora(lora) = method else { return layers };
        for ((layer, target), (a, b, _)) in modules(shape, lora).zip(self.pairs(shape, lora)) {
            let slot = LoraSlot { a, b, rank: lora.rank, scale: lora.scale() };
            layers[layer].slots[target as usize] = Some(Arc::from([slot]));
            layers[layer].stride = lora.rank;
        }
        layers
    }

    /// Masters begin with what the model holds.
    pub(super) fn fill_masters(&self, model: &mut Model) {
        for parameter in &self.all {
            if let Some(copy) = parameter.copy {
                for range in host::chunks(copy.len()) {
                    let part = |buf: Buf| buf.part(range.start, range.len());
                    let values = host::read_f32(&mut *model.device, part(copy));
                    model.device.write(part(parameter.weights), Data::F32(&values));
                }
            }
        }
    }

    /// Gradients to zero, the step's settings to the device.
    pub(super) fn begin_step(&self, dev: &mut dyn Device, hyper: &Hyper, done: u64, learning_rate: f64) {
        let t = (done + 1) as f64;
        let settings = [
            learning_rate as f32,
            (1.0 / (1.0 - hyper.beta1.powf(t))) as f32,
            (1.0 / (1.0 - hyper.beta2.powf(t))) as f32,
            hyper.max_grad_norm.map_or(f32::INFINITY, |norm| norm as f32),
        ];
        dev.write(self.settings, Data::F32(&settings));
        dev.enqueue(Op::Zero { x: self.flat });
        if let Some((lookup, _)) = self.tied {
            dev.enqueue(Op::Zero { x: lookup });
        }
    }

    /// The gradient's norm, then AdamW on each parameter.
    pub(super) fn end_step(&self, dev: &mut dyn Device, hyper: &Hyper, loss: Buf) {
        if let Some((from, to)) = self.tied {
            dev.enqueue(Op::Add { from, to });
        }
        dev.enqueue(Op::SquaredNorm { gradients: self.flat, partials: self.partials, norm: self.norm });
        for parameter in &self.all {
            dev.enqueue(Op::AdamW {
                weights: parameter.weights,
                copy: parameter.copy,
                gradients: self.gradient(&parameter.range),
                moments: self.moments_of(parameter),
                settings: self.settings,
                norm: self.norm,
                loss,
                beta1: hyper.beta1 as f32,
                beta2: hyper.beta2 as f32,
                epsilon: hyper.epsilon as f32,
                decay: if parameter.decays { hyper.weight_decay as f32 } else { 0.0 },
            });
        }
    }

    fn moments_of(&self, parameter: &Parameter) -> Moments {
        let Parameter { range, first_block, .. } = parameter;
        let part = |buf: Buf| buf.part(range.start, range.len());
        let blocks = |buf: Buf| buf.part(*first_block, range.len().div_ceil(MOMENT_BLOCK));
        match self.moments {
            Moments::F32(both) => Moments::F32(both.map(part)),
            Moments::Int8 { codes, scales } => {
                Moments::Int8 { codes: codes.map(part), scales: scales.map(blocks) }
            }
        }
    }

    /// Of every parameter the weights with their bf16 copy, then the moments.
    pub(super) fn states(&self) -> impl Iterator<Item = (Buf, Option<Buf>)> + '_ {
        self.all.iter().flat_map(|parameter| {
            let moments = match self.moments_of(parameter) {
                Moments::F32(both) => both.to_vec(),
                Moments::Int8 { codes: [m, v], scales: [m_scales, v_scales] } => {
                    vec![m, m_scales, v, v_scales]
                }
            };
            let weights = (parameter.weights, parameter.copy);
            std::iter::once(weights).chain(moments.into_iter().map(|moment| (moment, None)))
        })
    }
}

/// Puts a block's tensor's gradient where the block looks for it.
fn place(layers: &mut [LayerGradients], name: &str, kind: TensorKind, gradient: Buf) -> Result<()> {
    let number = name.split('.').nth(2).and_then(|n| n.parse::<usize>().ok());
    let layer = number.and_then(|n| layers.get_mut(n));
    let layer = layer.ok_or_else(|| Error::MissingTensor { name: name.to_owned() })?;
    match kind {
        TensorKind::AttentionNorm => layer.attention_norm = Some(gradient),
        TensorKind::MlpNorm => layer.mlp_norm = Some(gradient),
        TensorKind::Linear(target) => layer.linears[target as usize].w = Some(gradient),
        TensorKind::Bias(target) => layer.linears[target as usize].bias = Some(gradient),
        TensorKind::Embedding | TensorKind::Head | TensorKind::FinalNorm => {}
    }
    Ok(())
}

const _: () = {
    // `linears` and `slots` are indexed by `target as usize`.
    let mut i = 0;
    while i < 7 {
        assert!(Target::ALL[i] as usize == i);
        i += 1;
    }
};
