//! A plan is a list of named buffers.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tensors::elements;
use crate::{PlanError, QUANT_GROUP};

/// One buffer that a run holds from its start to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Unique within a plan, e.g. `kept.3.gate`; the engine finds its buffers by it.
    pub name: String,
    /// What it is for.
    pub category: Category,
    /// What it holds.
    pub element: Element,
    /// How many elements.
    pub len: usize,
}

/// What a buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Category {
    /// The model's weights and resident adapters.
    Weights,
    /// Gradients of what is trained.
    Gradients,
    /// Moments and f32 masters.
    Optimizer,
    /// What the forward pass keeps for the backward pass.
    Activations,
    /// Everything that is overwritten layer by layer or step by step.
    Workspace,
    /// Keys and values of sequences in flight.
    Cache,
}

/// The type of a buffer's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Element {
    /// IEEE single.
    F32,
    /// The upper half of an IEEE single.
    BF16,
    /// Indices, lengths, positions.
    U32,
    /// Seeds.
    U64,
    /// Sums over a whole step.
    F64,
    /// Codes of moments.
    U8,
    /// A byte of a matrix in 8 bits, see [`Element::quantized_bytes`].
    Int8,
    /// A byte of a matrix in 4 bits.
    Int4,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::U8 | Element::Int8 | Element::Int4 => 1,
            Element::BF16 => 2,
            Element::F32 | Element::U32 => 4,
            Element::U64 | Element::F64 => 8,
        }
    }
}

impl Element {
    /// Bytes of the codes of one row of `columns` weights; the last group is filled up.
    ///
    /// # Panics
    /// The element is no quantized one.
    pub fn code_bytes(self, columns: usize) -> usize {
        let groups = columns.div_ceil(QUANT_GROUP);
        match self {
            Element::Int8 => groups * QUANT_GROUP,
            Element::Int4 => groups * QUANT_GROUP / 2,
            _ => panic!("{self:?} has no codes"),
        }
    }

    /// Bytes of a quantized matrix `[rows, columns]`: the codes of all rows, then the scales (f32) of all groups of all
    /// rows. None where they are more than any memory.
    pub fn quantized_bytes(self, rows: usize, columns: usize) -> Option<usize> {
        elements(&[columns, 1])?;
        let scales = columns.div_ceil(QUANT_GROUP) * size_of::<f32>();
        elements(&[rows, self.code_bytes(columns) + scales])
    }
}

impl Buffer {
    /// Bytes of the buffer.
    pub fn bytes(&self) -> u64 {
        self.len as u64 * self.element.bytes() as u64
    }
}

/// Bytes by category.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// See [`Category::Weights`].
    pub weights: u64,
    /// See [`Category::Gradients`].
    pub gradients: u64,
    /// See [`Category::Optimizer`].
    pub optimizer: u64,
    /// See [`Category::Activations`].
    pub activations: u64,
    /// See [`Category::Workspace`].
    pub workspace: u64,
    /// See [`Category::Cache`].
    pub cache: u64,
}

impl Totals {
    /// Sums buffers by category.
    pub fn of(buffers: &[Buffer]) -> Totals {
        let mut totals = Totals::default();
        for buffer in buffers {
            let sum = match buffer.category {
                Category::Weights => &mut totals.weights,
                Category::Gradients => &mut totals.gradients,
                Category::Optimizer => &mut totals.optimizer,
                Category::Activations => &mut totals.activations,
                Category::Workspace => &mut totals.workspace,
                Category::Cache => &mut totals.cache,
            };
            *sum = sum.saturating_add(buffer.bytes());
        }
        totals
    }

    /// All categories together.
    pub fn total(&self) -> u64 {
        let Totals { weights, gradients, optimizer, activations, workspace, cache } = *self;
        [weights, gradients, optimizer, activations, workspace, cache]
            .iter()
            .fold(0, |a, &b| a.saturating_add(b))
    }
}

/// "weights 1.2 MB, gradients ..., total ...", leaving out what is zero.
impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { weights, gradients, optimizer, activations, workspace, cache } = *self;
        for (name, bytes) in [
            ("weights", weights),
            ("gradients", gradients),
            ("optimizer", optimizer),
            ("activations", activations),
            ("workspace", workspace),
            ("cache", cache),
        ] {
            if bytes > 0 {
                write!(f, "{name} {}, ", Size(bytes))?;
            }
        }
        write!(f, "total {}", Size(self.total()))
    }
}

struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")] {
            if self.0 as f64 >= unit {
                return write!(f, "{:.1} {name}", self.0 as f64 / unit);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// Collects buffers with checked sizes.
#[derive(Default)]
pub(crate) struct List {
    pub buffers: Vec<Buffer>,
}

impl List {
    /// Adds a buffer whose length is the product of `dims`.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        category: Category,
        element: Element,
        dims: &[usize],
    ) -> Result<(), PlanError> {
        let name = name.into();
        let len = elements(dims).ok_or_else(|| PlanError::TooLarge { what: name.clone() })?;
        self.buffers.push(Buffer { name, category, element, len });
        Ok(())
    }
}
