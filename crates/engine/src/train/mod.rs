//! Training: rows in, an optimizer step out.

mod batch;
mod optimizer;
mod settings;
mod state;

use std::io::{Read, Seek, Write};

use lathe_plan::{LoraSpec, OptimizerState, TrainMethod, TrainPlan};

use crate::decoder::{
    Batch, Block, Dropout, Gradients, Kept, LayerLora, LossHead, Planned, Work, embedding_gradient,
    write_rope,
};
use crate::device::{Buf, Data, DataMut, Device, Op};
use crate::{Adapter, Dtype, Error, Model, NamedTensor, Result, host};
use batch::{Device as BatchBuffers, Host};
use optimizer::Parameters;
pub use settings::{Hyper, Row, Schedule, StepStats};

/// Trains a model: owns it and the optimizer's state.
pub struct Trainer {
    model: Model,
    plan: TrainPlan,
    hyper: Hyper,
    planned: Planned,
    parameters: Parameters,
    /// Per block; empty slots in full training.
    lora: Vec<LayerLora>,
    /// One per block, or one for all where activations are computed again.
    kept: Vec<Kept>,
    /// `[layers + 1]`: the residual stream before each block and after the last.
    x: Vec<Buf>,
    work: Work,
    d: Gradients,
    head: LossHead,
    batch: BatchBuffers,
    host: Host,
    steps: u64,
}

impl Trainer {
    /// Allocates what the plan lists. A new adapter begins with `A` uniform in +-1/sqrt(in) (as PEFT) and `B` 0.
    ///
    /// # Errors
    /// The plan is another model's, no memory.
    pub fn new(mut model: Model, plan: &TrainPlan, hyper: Hyper) -> Result<Trainer> {
        for (what, same) in [
            ("shape", plan.shape == model.shape),
            ("precision", plan.weights == model.precision),
            ("number of threads", plan.threads == model.device.threads()),
        ] {
            if !same {
                return Err(Error::OtherPlan { what });
            }
        }
        let (dev, shape) = (&mut *model.device, &model.shape);
        let planned = Planned::alloc(dev, shape, &plan.buffers)?;
        let rope = planned.get("rope")?;
        write_rope(dev, shape, rope);
        let slots = if plan.recompute { 1 } else { shape.layers };
        let dropout = match &plan.method {
            TrainMethod::Lora(lora) if lora.dropout > 0.0 => {
                Some(Dropout { rate: lora.dropout, dropped: planned.get("lora.dropped")? })
            }
            _ => None,
        };
        let parameters = Parameters::new(&model, plan, &planned)?;
        let mut trainer = Trainer {
            lora: parameters.lora(&model.shape, &plan.method),
            kept: (0..slots).map(|slot| Kept::of(&planned, slot)).collect::<Result<_>>()?,
            x: (0..=model.shape.layers).map(|l| planned.get(&format!("x.{l}"))).collect::<Result<_>>()?,
            work: Work { n: planned.get("n")?, act: planned.get("act")?, rope, dropout },
            d: Gradients::of(&planned)?,
            head: LossHead::of(&planned, &model.shape)?,
            batch: BatchBuffers::of(&planned)?,
            host: Host::default(),
            steps: 0,
            plan: plan.clone(),
            hyper,
            parameters,
            planned,
            model,
        };
        match &plan.method {
            TrainMethod::Lora(lora) => {
                let fresh = Adapter::init(&trainer.model.shape, lora, trainer.hyper.seed)?;
                trainer.set_adapter(&fresh)?;
            }
            TrainMethod::Full => trainer.parameters.fill_masters(&mut trainer.model),
        }
        Ok(trainer)
    }

    /// One optimizer step over all rows, in micro-batches; the loss is the mean over all weighted tokens, so
    /// how rows fall into micro-batches changes nothing, not even a bit.
    ///
    /// # Errors
    /// [`Error::Row`], or [`Error::NotFinite`] (the weights are then unchanged).
    pub fn step(&mut self, rows: &[Row]) -> Result<StepStats> {
        self.step_unless(rows, &|| false)
    }

    /// As [`Trainer::step`], but asks `stop` before each micro-batch: a large step takes minutes, and whoever must
    /// save before it is killed has seconds.
    ///
    /// # Errors
    /// As [`Trainer::step`], and [`Error::Interrupted`] (the weights are then unchanged).
    pub fn step_unless(&mut self, rows: &[Row], stop: &dyn Fn() -> bool) -> Result<StepStats> {
        self.check(rows)?;
        let total: f64 = rows.iter().flat_map(|row| &row.weights[1..]).map(|&w| f64::from(w)).sum();
        if total <= 0.0 {
            let what = "no token of the step has a weight above 0, so there is nothing to learn".to_owned();
            return Err(Error::Row { row: 0, what });
        }
        let learning_rate = self.hyper.learning_rate_at(self.steps);
        let mut planned_loss = [0.0f64];
        let mut squared = [0.0f64];
        self.parameters.begin_step(&mut *self.model.device, &self.hyper, self.steps, learning_rate);
        self.model.device.enqueue(Op::Zero { x: self.head.loss });
        let mut first = 0;
        for micro in batch::micro_batches(rows, self.plan.micro_batch_tokens) {
            if stop() {
                return Err(Error::Interrupted);
            }
            let seed = |row: usize| self.hyper.row_seed(self.steps, first + row);
            let batch =
                self.host.fill(micro, total, seed).write(&mut *self.model.device, &self.batch, &self.head);
            first += micro.len();
            self.forward(&batch, self.work);
            self.backward(&batch);
        }
        self.parameters.end_step(&mut *self.model.device, &self.hyper, self.head.loss);
        self.model.device.read(self.head.loss, DataMut::F64(&mut planned_loss));
        self.model.device.read(self.parameters.norm, DataMut::F64(&mut squared));
        let (loss, grad_norm) = (planned_loss[0], squared[0].sqrt());
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::NotFinite { step: self.steps + 1, loss, grad_norm });
        }
        self.steps += 1;
        let tokens = rows.iter().map(|row| row.tokens.len() as u64).sum();
        Ok(StepStats { step: self.steps, loss, tokens, grad_norm, learning_rate })
    }

    /// Per row and token the log-probability of the token after the tokens before it, without dropout; 0 where
    /// the row's weight is 0 and for the first token.
    ///
    /// # Errors
    /// [`Error::Row`].
    pub fn log_probs(&mut self, rows: &[Row]) -> Result<Vec<Vec<f32>>> {
        self.check(rows)?;
        let mut all = Vec::with_capacity(rows.len());
        let mut read = Vec::new();
        for micro in batch::micro_batches(rows, self.plan.micro_batch_tokens) {
            let batch =
                self.host.fill(micro, 1.0, |_| 0).write(&mut *self.model.device, &self.batch, &self.head);
            self.forward(&batch, Work { dropout: None, ..self.work });
            let count = self.host.chosen();
            let last = (self.x[self.model.shape.layers], self.work.n, batch.rows);
            let (dev, shape) = (&mut *self.model.device, &self.model.shape);
            self.head.log_probs(dev, shape, &self.model.weights, last, count);
            read.resize(count, 0.0);
            dev.read(self.head.log_probs.first(count), DataMut::F32(&mut read));
            let mut next = read.iter();
            for row in micro {
                let of = |(i, &w): (usize, &f32)| {
                    if i == 0 || w == 0.0 { 0.0 } else { *next.next().unwrap_or(&0.0) }
                };
                all.push(row.weights.iter().enumerate().map(of).collect());
            }
        }
        Ok(all)
    }

    /// Steps done so far.
    pub fn steps_done(&self) -> u64 {
        self.steps
    }

    /// Writes what a resumed run needs to go on bit for bit: trained weights, moments, step, seeds, and an
    /// identity of model, method and kernel level. The frozen base is not in it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save_state(&mut self, to: &mut dyn Write) -> Result<()> {
        let identity = self.identity();
        let level = self.model.device.level();
        state::save(&mut *self.model.device, &identity, level, self.steps, &self.parameters, to)
    }

    /// Takes up a state written by [`Trainer::save_state`], also on a machine with other instructions: then the name of the
    /// kernel level that it was written at is returned, since the run's bits are not those of one that stayed. Reads it twice, first to check it, so that no second copy of
    /// it is ever in memory.
    ///
    /// # Errors
    /// [`Error::State`] for a damaged state or one of another run, [`Error::Io`] where it cannot be read; the trainer is then
    /// unchanged. Only where the second reading fails has it taken up a part: [`Trainer::steps_done`] is then the state's.
    pub fn load_state(&mut self, from: &mut (impl Read + Seek)) -> Result<Option<String>> {
        let (steps, level) = state::check(&self.identity(), &self.parameters, from)?;
        self.steps = steps;
        state::take_up(&mut *self.model.device, &self.parameters, from)?;
        Ok(Some(level).filter(|level| level != self.model.device.level().name()))
    }

    /// The adapter as trained so far; `None` when every weight is trained.
    ///
    /// # Errors
    /// Reading back from the device failed.
    pub fn adapter(&mut self) -> Result<Option<Adapter>> {
        let TrainMethod::Lora(lora) = &self.plan.method else { return Ok(None) };
        let (dev, shape) = (&mut *self.model.device, &self.model.shape);
        let pairs = self
            .parameters
            .pairs(shape, lora)
            .map(|(a, b, b_shape)| (host::read_f32(dev, a), read_b(dev, b, b_shape)));
        Ok(Some(Adapter::of(shape, lora, pairs.collect())))
    }

    /// The gradients of the last step, before clipping, in f32: under Hugging Face's names, or PEFT's for an
    /// adapter.
    ///
    /// # Errors
    /// Reading back from the device failed.
    pub fn gradients(&mut self) -> Result<Vec<NamedTensor>> {
        let (dev, shape) = (&mut *self.model.device, &self.model.shape);
        match &self.plan.method {
            TrainMethod::Lora(lora) => {
                let pairs = self
                    .parameters
                    .gradient_pairs(shape, lora)
                    .map(|(a, b, b_shape)| (host::read_f32(dev, a), read_b(dev, b, b_shape)));
                Ok(Adapter::of(shape, lora, pairs.collect()).tensors())
            }
            TrainMethod::Full => {
                let all = shape.tensors().into_iter().zip(self.parameters.gradients_of_all());
                let named = all.map(|(tensor, buf)| {
                    let values = host::read_f32(dev, buf);
                    NamedTensor::of(&tensor.name, Dtype::F32, &tensor.shape, &values)
                });
                Ok(named.collect())
            }
        }
    }

    /// Begins from an adapter instead of a new one.
    ///
    /// # Errors
    /// [`Error::Adapter`] where rank, targets or base are not the plan's.
    pub fn set_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        let refuse = |what: &str| Err(Error::Adapter { what: what.to_owned() });
        let TrainMethod::Lora(lora) = &self.plan.method else {
            return refuse("full training has no adapter");
        };
        let LoraSpec { rank, targets, .. } = adapter.spec();
        if *rank != lora.rank || *targets != lora.targets {
            return refuse("its rank or targets are not the plan's");
        }
        adapter.check_base(&self.model.shape)?;
        let places: Vec<_> = self.parameters.pairs(&self.model.shape, lora).collect();
        for ((a_buf, b_buf, b_shape), (_, _, a, b)) in places.into_iter().zip(adapter.pairs()) {
            self.model.device.write(a_buf, Data::F32(a));
            self.model.device.write(b_buf, Data::F32(&host::transposed(b, b_shape)));
        }
        Ok(())
    }

    /// The model, with trained weights after full training (read them by [`Model::tensor`]), and untouched
    /// after LoRA. Frees everything else.
    pub fn into_model(mut self) -> Model {
        self.planned.free(&mut *self.model.device);
        self.model
    }

    fn forward(&mut self, batch: &Batch, work: Work) {
        let Model { device, shape, weights, .. } = &mut self.model;
        let (rows, tokens) = (batch.rows, batch.tokens);
        let (table, out, width) = (weights.embedding, self.x[0].first(rows * shape.hidden), shape.hidden);
        device.enqueue(Op::Embed { table, tokens, out, rows, vocab: shape.vocab, width });
        for layer in 0..shape.layers {
            let (weights, lora) = (&weights.layers[layer], &self.lora[layer]);
            let block = Block { shape, layer, weights, lora, batch, work: &work };
            let kept = &self.kept[layer % self.kept.len()];
            block.forward(&mut **device, self.x[layer], self.x[layer + 1], kept, None);
        }
    }

    fn backward(&mut self, batch: &Batch) {
        let Model { device, shape, weights, .. } = &mut self.model;
        let (gradients, places) = (&self.parameters.gradients, self.host.places());
        let last = (self.x[shape.layers], self.work.n, batch.rows);
        let (dhead, dnorm) = (gradients.head, gradients.norm);
        self.head.backward(&mut **device, shape, weights, last, places, &self.d, dhead, dnorm);
        for layer in (0..shape.layers).rev() {
            let (weights, lora) = (&weights.layers[layer], &self.lora[layer]);
            let block = Block { shape, layer, weights, lora, batch, work: &self.work };
            let kept = &self.kept[layer % self.kept.len()];
            if self.plan.recompute {
                block.forward(&mut **device, self.x[layer], self.x[layer + 1], kept, None);
            }
            block.backward(&mut **device, self.x[layer], kept, &self.d, &gradients.layers[layer]);
        }
        if let Some(to) = gradients.lookup {
            embedding_gradient(&mut **device, shape, batch, &self.d, to);
        }
    }

    fn check(&self, rows: &[Row]) -> Result<()> {
        let (vocab, longest) = (self.model.shape.vocab, self.plan.max_row_tokens);
        for (row, Row { tokens, weights }) in rows.iter().enumerate() {
            let len = tokens.len();
            let refuse = |what: String| Err(Error::Row { row, what });
            if len < 2 || len > longest {
                return refuse(format!("a row must have 2 to {longest} tokens (found {len})"));
            }
            if weights.len() != len {
                return refuse(format!(
                    "`weights` must be as long as `tokens` ({len}; found {})",
                    weights.len()
                ));
            }
            if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
                return refuse(format!("token {token} is outside the vocabulary of {vocab}"));
            }
            if let Some(weight) = weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
                return refuse(format!("a weight must be a finite number of at least 0 (found {weight})"));
            }
        }
        Ok(())
    }

    fn identity(&self) -> String {
        let TrainPlan { shape, method, weights, optimizer_state, .. } = &self.plan;
        // Of f32 it is what it was before there were others, so that states of that time can be taken up.
        let moments = match optimizer_state {
            OptimizerState::F32 => "",
            OptimizerState::Int8 => " moments Int8",
        };
        format!("{shape:?} {method:?} {weights:?} seed {}{moments}", self.hyper.seed)
    }
}

/// `B [outputs, rank]`, which the device holds the other way round.
fn read_b(dev: &mut dyn Device, buf: Buf, [outputs, rank]: [usize; 2]) -> Vec<f32> {
    host::transposed(&host::read_f32(dev, buf), [rank, outputs])
}
