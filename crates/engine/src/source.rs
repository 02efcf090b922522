//! Where weights come from and what goes out.

use std::borrow::Cow;

use lathe_plan::ModelShape;

use crate::{Error, Result};

/// Gives tensors by their Hugging Face names.
pub trait WeightSource {
    /// The tensor `name`, e.g. `model.layers.0.self_attn.q_proj.weight`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] when there is none, [`Error::Source`] when it cannot be read.
    fn tensor(&self, name: &str) -> Result<TensorView<'_>>;
}

/// The type of a stored tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }
}

/// A tensor as it lies in a file: row-major, little-endian, any alignment.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements' bytes.
    pub data: Cow<'a, [u8]>,
}

/// A tensor to be written: row-major, little-endian.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// Its name in the file.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements' bytes.
    pub data: Vec<u8>,
}

impl TensorView<'_> {
    /// Checks shape and size against what the model asks for and widens to f32.
    ///
    /// # Errors
    /// [`Error::TensorShape`], [`Error::TensorBytes`].
    pub fn to_f32(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        todo!("{name} {expected:?}")
    }
}

/// Random weights for training from scratch: matrices from N(0, 0.02), norms 1, biases 0. Each tensor depends
/// on the seed and its name alone.
#[derive(Debug, Clone)]
pub struct RandomWeights {
    shape: ModelShape,
    seed: u64,
}

impl RandomWeights {
    /// Weights for `shape`.
    pub fn new(shape: &ModelShape, seed: u64) -> RandomWeights {
        RandomWeights { shape: shape.clone(), seed }
    }
}

impl WeightSource for RandomWeights {
    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let _ = (&self.shape, self.seed);
        Err(Error::MissingTensor { name: name.to_owned() })
    }
}
