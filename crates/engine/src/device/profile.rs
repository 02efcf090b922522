//! A device that takes the time of what is asked of another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Attention, Buf, Data, DataMut, Device, Element, Moments, Op, cpu::Level};
use crate::Result;
use crate::files::Mapped;

/// One operation that ran.
#[derive(Debug, Clone)]
pub struct Span {
    /// The operation, and the extent of a product: `Linear 512x4864x896`.
    pub name: String,
    /// Since the device was made.
    pub start: Duration,
    /// How long it took.
    pub took: Duration,
    /// What is known of its work.
    pub work: Work,
}

/// What an operation cannot do without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiplications and additions of products; a multiply-add is 2.
    pub flops: u64,
    /// What is multiplied: the weights' type; f32 where there are none.
    pub element: Option<Element>,
    /// Bytes of weights, keys and values that products read once, or of all that passes through where nothing is multiplied.
    pub bytes: u64,
}

/// Passes everything on and takes the time, of a device that runs operations at once (the CPU).
pub struct Profiler<D> {
    inner: D,
    made: Instant,
    /// Positions of rows, by buffer: what attention costs depends on them.
    numbers: HashMap<usize, Vec<u32>>,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl<D: Device> Profiler<D> {
    /// Takes the time of what reaches `inner`; the list is shared with the caller.
    pub fn new(inner: D) -> (Profiler<D>, Arc<Mutex<Vec<Span>>>) {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let numbers = HashMap::new();
        (Profiler { inner, made: Instant::now(), numbers, spans: Arc::clone(&spans) }, spans)
    }
}

impl<D: Device> Device for Profiler<D> {
    fn alloc(&mut self, name: &str, element: Element, len: usize) -> Result<Buf> {
        self.inner.alloc(name, element, len)
    }

    fn adopt(&mut self, element: Element, bytes: &Mapped) -> Option<Buf> {
        self.inner.adopt(element, bytes)
    }

    fn free(&mut self, buf: Buf) {
        self.inner.free(buf);
    }

    fn set_scratch(&mut self, scratch: Buf) {
        self.inner.set_scratch(scratch);
    }

    fn write(&mut self, to: Buf, data: Data<'_>) {
        if let (Data::U32(numbers), 0) = (data, to.start()) {
            self.numbers.insert(to.id(), numbers.to_vec());
        }
        self.inner.write(to, data);
    }

    fn enqueue(&mut self, op: Op) {
        let (name, work) =
            (op.label(), op.work(|buf| self.numbers.get(&buf.id()).map_or(&[], Vec::as_slice)));
        let start = self.made.elapsed();
        self.inner.enqueue(op);
        let took = self.made.elapsed() - start;
        let span = Span { name, start, took, work };
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push(span);
    }

    fn read(&mut self, from: Buf, into: DataMut<'_>) {
        self.inner.read(from, into);
    }

    fn level(&self) -> Level {
        self.inner.level()
    }

    fn threads(&self) -> usize {
        self.inner.threads()
    }
}

impl Op {
    /// Its name, with the extent of a product.
    fn label(&self) -> String {
        let debug = format!("{self:?}");
        let name = debug.split([' ', '(']).next().unwrap_or_default();
        match self.extent() {
            Some([rows, outputs, inputs]) => format!("{name} {rows}x{outputs}x{inputs}"),
            None => name.to_owned(),
        }
    }

    /// Rows, outputs and inputs of a product with a weight.
    fn extent(&self) -> Option<[usize; 3]> {
        match *self {
            Op::Linear { rows, outputs, inputs, .. }
            | Op::LinearGlu { rows, outputs, inputs, .. }
            | Op::LinearInputGrad { rows, outputs, inputs, .. }
            | Op::LinearWeightGrad { rows, outputs, inputs, .. } => Some([rows, outputs, inputs]),
            _ => None,
        }
    }

    /// What it costs at least; `numbers` gives what was last written to a buffer of indices.
    fn work<'a>(&self, numbers: impl Fn(Buf) -> &'a [u32]) -> Work {
        let size = |buf: Buf| (buf.len() * buf.element().bytes()) as u64;
        let moved = |bytes: u64| Work { bytes, ..Work::default() };
        let product = |[rows, outputs, inputs]: [usize; 3], element, bytes| Work {
            flops: 2 * (rows * outputs * inputs) as u64,
            element: Some(element),
            bytes,
        };
        let f32s = |count: usize| 4 * count as u64;
        match *self {
            Op::Linear { w, rows, outputs, inputs, .. }
            | Op::LinearInputGrad { w, rows, outputs, inputs, .. } => {
                product([rows, outputs, inputs], w.element(), size(w))
            }
            Op::LinearGlu { w: [gate, up], rows, outputs, inputs, .. } => {
                product([rows, 2 * outputs, inputs], gate.element(), size(gate) + size(up))
            }
            Op::LinearWeightGrad { dw, rows, outputs, inputs, .. } => {
                product([rows, outputs, inputs], Element::F32, size(dw))
            }
            Op::Attention(a) => attention(&a, numbers(a.positions), FORWARD),
            // Scores and their gradient, and those of queries, keys and values: five products for the forward pass's two.
            Op::AttentionGrad { forward, .. } => attention(&forward, numbers(forward.positions), 10),
            Op::Zero { x } => moved(size(x)),
            Op::Scale { x, .. } | Op::Rope { x, .. } => moved(2 * size(x)),
            Op::Copy { from, .. } => moved(2 * size(from)),
            Op::Add { from, .. } => moved(3 * size(from)),
            Op::Glu { gate, .. } => moved(3 * size(gate)),
            Op::GluGrad { gate, .. } => moved(5 * size(gate)),
            Op::RmsNorm { rows, width, .. } => moved(2 * f32s(rows * width)),
            Op::RmsNormGrad { rows, width, .. } => moved(4 * f32s(rows * width)),
            Op::Embed { rows, width, .. } | Op::StoreRows { rows, width, .. } => {
                moved(2 * f32s(rows * width))
            }
            Op::Gather { count, width, .. } | Op::Scatter { count, width, .. } => {
                moved(2 * f32s(count * width))
            }
            Op::LogitStats { rows, vocab, .. } | Op::SampleSums { rows, vocab, .. } => {
                moved(f32s(rows * vocab))
            }
            Op::LogitGrad { rows, vocab, .. } => moved(2 * f32s(rows * vocab)),
            Op::SquaredNorm { gradients, .. } => moved(size(gradients)),
            // Weights and moments are read and written, gradients read.
            Op::AdamW { weights, copy, moments, .. } => {
                let state: u64 = match moments {
                    Moments::F32(both) => both.into_iter().map(size).sum(),
                    Moments::Int8 { codes, scales } => codes.into_iter().chain(scales).map(size).sum(),
                };
                moved(3 * size(weights) + 2 * state + copy.map_or(0, size))
            }
            _ => Work::default(),
        }
    }
}

/// Operations of attention's forward pass on each number of a head that a query meets.
const FORWARD: u64 = 4;

/// Each row meets the keys that it sees; `flops` for each of them and each number of a head.
fn attention(a: &Attention, positions: &[u32], flops: u64) -> Work {
    let keys = positions.iter().take(a.rows).map(|&position| a.seen(position as usize).len() as u64);
    let width = (a.heads * a.head_dim) as u64;
    let last = keys.clone().max().unwrap_or(0) * a.sequences as u64;
    let bytes = 2 * 4 * last * (a.kv_heads * a.head_dim) as u64;
    let element = (flops == FORWARD && a.bf16).then_some(Element::BF16);
    Work { flops: flops * width * keys.sum::<u64>(), element, bytes }
}
