//! A model's weights on a device.

use std::collections::HashMap;

use lathe_plan::{Element, ModelShape, Precision, Target};

use crate::decoder::{LayerWeights, Linear, Weights};
use crate::device::cpu::{Cpu, Level};
use crate::device::{Buf, Device, Op};
use crate::{Dtype, Error, NamedTensor, Result, TensorView, WeightSource, host};

/// Numbers of a copy that are quantized together.
const ROWS_AT_A_TIME: usize = 1 << 18;

/// A model on a device, ready for a [`crate::Trainer`] or a [`crate::Generator`], which take it and give it back.
pub struct Model {
    pub(crate) device: Box<dyn Device>,
    pub(crate) shape: ModelShape,
    pub(crate) precision: Precision,
    pub(crate) weights: Weights,
    /// By Hugging Face's names.
    pub(crate) tensors: HashMap<String, Buf>,
}

impl Model {
    /// Loads every tensor of `shape` from `source` to the CPU, holds the matrices in `precision`, and works with
    /// `threads` threads (see [`Model::default_threads`]). What a file has in that precision is used where it lies, without
    /// a copy.
    ///
    /// # Errors
    /// The shape is absurd, a tensor is missing or has another shape, the source cannot be read, no memory.
    pub fn load(
        shape: &ModelShape,
        precision: Precision,
        source: &dyn WeightSource,
        threads: usize,
    ) -> Result<Model> {
        Model::load_on(Box::new(Cpu::new(threads, Level::detect()?)), shape, precision, source)
    }

    /// Loads to a given device.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_on(
        mut device: Box<dyn Device>,
        shape: &ModelShape,
        precision: Precision,
        source: &dyn WeightSource,
    ) -> Result<Model> {
        shape.validate()?;
        let mut tensors = HashMap::new();
        for tensor in shape.tensors() {
            let view = source.tensor(&tensor.name)?;
            view.check(&tensor.name, &tensor.shape)?;
            let (element, len) = precision.storage(&tensor)?;
            let as_it_lies = view.dtype.element() == Some(element);
            let adopted =
                view.in_place.as_ref().filter(|_| as_it_lies).and_then(|b| device.adopt(element, b));
            let buf = match adopted {
                Some(buf) => buf,
                None => {
                    let buf = device.alloc(&tensor.name, element, len)?;
                    match (element, &tensor.shape[..]) {
                        (Element::Int8 | Element::Int4, &[outputs, inputs]) => {
                            quantize(&mut *device, buf, [outputs, inputs], &view)?;
                        }
                        _ => host::write_tensor(&mut *device, buf, &view),
                    }
                    buf
                }
            };
            tensors.insert(tensor.name, buf);
        }
        let weights = find_weights(shape, &tensors)?;
        Ok(Model { device, shape: shape.clone(), precision, weights, tensors })
    }

    /// Threads that this process may use, from its CPU affinity and its cgroup's quota.
    pub fn default_threads() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// The model's dimensions.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// How the matrices are held.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Which instructions the kernels use.
    pub fn level(&self) -> Level {
        self.device.level()
    }

    /// Threads that work.
    pub fn threads(&self) -> usize {
        self.device.threads()
    }

    /// Names and shapes of all tensors, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.shape.tensors().into_iter().map(|t| (t.name, t.shape)).collect()
    }

    /// One tensor by its name, to be written to a file as `dtype`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Quantized`].
    pub fn tensor(&mut self, name: &str, dtype: Dtype) -> Result<NamedTensor> {
        let missing = || Error::MissingTensor { name: name.to_owned() };
        let tensor = self.shape.tensors().into_iter().find(|t| t.name == name).ok_or_else(missing)?;
        let buf = *self.tensors.get(name).ok_or_else(missing)?;
        if matches!(buf.element(), Element::Int8 | Element::Int4) {
            return Err(Error::Quantized { name: name.to_owned() });
        }
        let values = host::read_f32(&mut *self.device, buf);
        Ok(NamedTensor::of(name, dtype, &tensor.shape, &values))
    }
}

/// Fills the quantized matrix `to` from floating-point numbers where they lie, or from some rows of a copy at a time.
fn quantize(
    device: &mut dyn Device,
    to: Buf,
    [outputs, inputs]: [usize; 2],
    view: &TensorView<'_>,
) -> Result<()> {
    let all = |from, first, rows| Op::Quantize { from, to, first, rows, outputs, inputs };
    let element = view.dtype.element().zip(view.in_place.as_ref());
    if let Some(from) = element.and_then(|(element, bytes)| device.adopt(element, bytes)) {
        device.enqueue(all(from, 0, outputs));
        device.free(from);
        return Ok(());
    }
    let most = (ROWS_AT_A_TIME / inputs).clamp(1, outputs);
    let copy = device.alloc("rows to quantize", Element::F32, most * inputs)?;
    for first in (0..outputs).step_by(most) {
        let rows = most.min(outputs - first);
        let values: Vec<f32> = view.widen(first * inputs..(first + rows) * inputs).collect();
        host::write_f32(device, copy.first(values.len()), &values);
        device.enqueue(all(copy.first(values.len()), first, rows));
    }
    device.free(copy);
    Ok(())
}

fn find_weights(shape: &ModelShape, tensors: &HashMap<String, Buf>) -> Result<Weights> {
    let get = |name: String| tensors.get(&name).copied().ok_or(Error::MissingTensor { name });
    let layer = |layer: usize| {
        let linear = |target: Target| {
            let (outputs, inputs) = shape.linear(target);
            let module = target.module(layer);
            let bias = tensors.get(&format!("{module}.bias")).copied();
            Ok(Linear { w: get(format!("{module}.weight"))?, bias, outputs, inputs })
        };
        Ok(LayerWeights {
            attention_norm: get(format!("model.layers.{layer}.input_layernorm.weight"))?,
            mlp_norm: get(format!("model.layers.{layer}.post_attention_layernorm.weight"))?,
            linears: Target::ALL.into_iter().map(linear).collect::<Result<_>>()?,
        })
    };
    let embedding = get("model.embed_tokens.weight".to_owned())?;
    Ok(Weights {
        embedding,
        layers: (0..shape.layers).map(layer).collect::<Result<_>>()?,
        norm: get("model.norm.weight".to_owned())?,
        head: if shape.tie_embeddings { embedding } else { get("lm_head.weight".to_owned())? },
    })
}
