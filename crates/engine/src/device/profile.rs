//! A device that takes the time of what is asked of another.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Buf, Data, DataMut, Device, Element, Op, cpu::Level};
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
    /// Floating-point operations; a multiply-add is 2. 0 where they do not matter.
    pub flops: u64,
    /// Bytes of weights, keys and values that were read; 0 where they do not matter.
    pub bytes: u64,
}

/// Passes everything on and takes the time, of a device that runs operations at once (the CPU).
pub struct Profiler<D> {
    inner: D,
    made: Instant,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl<D: Device> Profiler<D> {
    /// Takes the time of what reaches `inner`; the list is shared with the caller.
    pub fn new(inner: D) -> (Profiler<D>, Arc<Mutex<Vec<Span>>>) {
        let spans = Arc::new(Mutex::new(Vec::new()));
        (Profiler { inner, made: Instant::now(), spans: Arc::clone(&spans) }, spans)
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
        self.inner.write(to, data);
    }

    fn enqueue(&mut self, op: Op) {
        let (name, flops, bytes) = (op.label(), op.flops(), op.weight_bytes());
        let start = self.made.elapsed();
        self.inner.enqueue(op);
        let took = self.made.elapsed() - start;
        let span = Span { name, start, took, flops, bytes };
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
            | Op::LinearInputGrad { rows, outputs, inputs, .. }
            | Op::LinearWeightGrad { rows, outputs, inputs, .. } => Some([rows, outputs, inputs]),
            _ => None,
        }
    }

    fn flops(&self) -> u64 {
        self.extent().map_or(0, |extent| 2 * extent.into_iter().map(|d| d as u64).product::<u64>())
    }

    fn weight_bytes(&self) -> u64 {
        match self {
            Op::Linear { w, .. } | Op::LinearInputGrad { w, .. } => (w.len() * w.element().bytes()) as u64,
            _ => 0,
        }
    }
}
