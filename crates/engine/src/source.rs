//! Where weights come from and what goes out.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use lathe_plan::{Element, ModelShape, Tensor, TensorKind};

use crate::files::Mapped;
use crate::{Error, Result, random};

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
    /// As a device holds it; none for IEEE halves.
    pub(crate) fn element(self) -> Option<Element> {
        match self {
            Dtype::F32 => Some(Element::F32),
            Dtype::BF16 => Some(Element::BF16),
            Dtype::F16 => None,
        }
    }

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
    /// The same bytes, where a device may use them where they lie.
    pub in_place: Option<Mapped>,
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
    /// Checks shape and size against what the model asks for.
    ///
    /// # Errors
    /// [`Error::TensorShape`], [`Error::TensorBytes`].
    pub fn check(&self, name: &str, expected: &[usize]) -> Result<()> {
        if self.shape != expected {
            let (expected, found) = (expected.to_vec(), self.shape.clone());
            return Err(Error::TensorShape { name: name.to_owned(), expected, found });
        }
        let elements = expected.iter().try_fold(self.dtype.bytes(), |product, &d| product.checked_mul(d));
        match elements {
            Some(bytes) if bytes == self.data.len() => Ok(()),
            _ => Err(Error::TensorBytes {
                name: name.to_owned(),
                expected: elements.unwrap_or(usize::MAX),
                found: self.data.len(),
            }),
        }
    }

    /// Elements `range`, widened to f32. The range must be inside the data.
    pub(crate) fn widen(&self, range: Range<usize>) -> impl Iterator<Item = f32> + '_ {
        let width = self.dtype.bytes();
        self.data[range.start * width..range.end * width].chunks_exact(width).map(|b| match self.dtype {
            Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
            Dtype::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        })
    }

    /// Checks shape and size and widens all elements to f32.
    ///
    /// # Errors
    /// [`Error::TensorShape`], [`Error::TensorBytes`].
    pub fn to_f32(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        self.check(name, expected)?;
        Ok(self.widen(0..self.data.len() / self.dtype.bytes()).collect())
    }
}

impl NamedTensor {
    /// A tensor of `values`, rounded to nearest where `dtype` is narrower than f32.
    pub(crate) fn of(name: &str, dtype: Dtype, shape: &[usize], values: &[f32]) -> NamedTensor {
        let mut data = Vec::with_capacity(values.len() * dtype.bytes());
        for &x in values {
            match dtype {
                Dtype::F32 => data.extend(x.to_le_bytes()),
                Dtype::F16 => data.extend(f16::from_f32(x).to_le_bytes()),
                Dtype::BF16 => data.extend(bf16::from_f32(x).to_le_bytes()),
            }
        }
        NamedTensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data }
    }
}

/// Random weights for training from scratch: matrices from N(0, 0.02), norms 1, biases 0. Each tensor depends
/// on the seed and its name alone.
#[derive(Debug, Clone)]
pub struct RandomWeights {
    tensors: Vec<Tensor>,
    seed: u64,
}

impl RandomWeights {
    /// Weights for `shape`.
    pub fn new(shape: &ModelShape, seed: u64) -> RandomWeights {
        RandomWeights { tensors: shape.tensors(), seed }
    }
}

impl WeightSource for RandomWeights {
    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let missing = || Error::MissingTensor { name: name.to_owned() };
        let tensor = self.tensors.iter().find(|t| t.name == name).ok_or_else(missing)?;
        let key = random::key(self.seed, name);
        let value = |i: usize| match tensor.kind {
            TensorKind::AttentionNorm | TensorKind::MlpNorm | TensorKind::FinalNorm => 1.0,
            TensorKind::Bias(_) => 0.0,
            _ => (0.02 * random::normal(key, i as u64)) as f32,
        };
        let data = (0..tensor.shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect();
        Ok(TensorView {
            dtype: Dtype::F32,
            shape: tensor.shape.clone(),
            data: Cow::Owned(data),
            in_place: None,
        })
    }
}
