//! A model's weights on a device.

use lathe_plan::{ModelShape, Precision};

use crate::device::cpu::Level;
use crate::{Dtype, NamedTensor, Result, WeightSource};

/// A model on a device, ready for a [`crate::Trainer`] or a [`crate::Generator`], which take it and give it back.
pub struct Model {
    shape: ModelShape,
    precision: Precision,
}

impl Model {
    /// Loads every tensor of `shape` from `source`, holds the matrices in `precision`, and works with `threads`
    /// threads (see [`Model::default_threads`]).
    ///
    /// # Errors
    /// The shape is absurd, a tensor is missing or has another shape, the source cannot be read, no memory.
    pub fn load(
        shape: &ModelShape,
        precision: Precision,
        source: &dyn WeightSource,
        threads: usize,
    ) -> Result<Model> {
        let _ = (shape, precision, source, threads);
        todo!()
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
        todo!()
    }

    /// Names and shapes of all tensors, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.shape.tensors().into_iter().map(|t| (t.name, t.shape)).collect()
    }

    /// One tensor by its name, to be written to a file as `dtype` (F32 or BF16).
    ///
    /// # Errors
    /// [`crate::Error::MissingTensor`].
    pub fn tensor(&mut self, name: &str, dtype: Dtype) -> Result<NamedTensor> {
        let _ = (name, dtype);
        todo!()
    }
}
