//! The seam to a device.
//!
//! An engine run allocates its buffers once, as the plan lists them, and then only enqueues [`Op`]s over handles
//! to them. An operation returns nothing; results are read back explicitly by [`Device::read`]. Whatever changes
//! from step to step (positions, lengths, block tables, seeds, learning rate) lies in buffers, so two steps of
//! the same shape enqueue the same operations, and a device may record and replay them.

pub mod cpu;
mod op;
mod profile;
mod record;

pub use lathe_plan::Element;
pub(crate) use op::summed_together;
pub use op::{
    Activation, Attention, LoraSlot, MOMENT_BLOCK, Moments, NO_ADAPTER, NORM_CHUNK, Op, SAMPLE_CHUNK, Start,
};
pub use profile::{Profiler, Span, Work};
pub use record::{Event, Recorder};

use crate::Result;
use crate::files::Mapped;

/// A handle to a range of a buffer on a device. It says nothing about where the bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Buf {
    id: u32,
    start: usize,
    len: usize,
    element: Element,
}

impl Buf {
    /// A handle to a whole new buffer; for devices.
    pub fn whole(id: u32, element: Element, len: usize) -> Buf {
        Buf { id, start: 0, len, element }
    }

    /// The buffer that this is a range of; for devices.
    pub fn id(self) -> usize {
        self.id as usize
    }

    /// The first element in the buffer.
    pub fn start(self) -> usize {
        self.start
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether the range is empty.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn element(self) -> Element {
        self.element
    }

    /// The part `start..start + len` of this range.
    ///
    /// # Panics
    /// The part is not inside the range: a mistake of the engine, never of its input.
    pub fn part(self, start: usize, len: usize) -> Buf {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "{start}+{len} outside {self:?}");
        Buf { start: self.start + start, len, ..self }
    }

    /// The first `len` elements.
    pub fn first(self, len: usize) -> Buf {
        self.part(0, len)
    }
}

/// Elements on the host, to be written to a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Data<'a> {
    /// Singles.
    F32(&'a [f32]),
    /// The bits of bf16 numbers.
    BF16(&'a [u16]),
    /// Indices.
    U32(&'a [u32]),
    /// Seeds.
    U64(&'a [u64]),
    /// Codes of moments.
    U8(&'a [u8]),
}

/// Room on the host, to be read into from a device.
#[derive(Debug)]
pub enum DataMut<'a> {
    /// Singles.
    F32(&'a mut [f32]),
    /// The bits of bf16 numbers.
    BF16(&'a mut [u16]),
    /// Doubles.
    F64(&'a mut [f64]),
    /// Codes of moments.
    U8(&'a mut [u8]),
}

/// A place where operations run.
pub trait Device: Send {
    /// A new buffer of zeros. `name` is the plan's, for error texts.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    fn alloc(&mut self, name: &str, element: Element, len: usize) -> Result<Buf>;

    /// A buffer of the bytes of a file where they lie, little-endian elements, if the device can use them so. Writing to
    /// it does not change the file.
    fn adopt(&mut self, element: Element, bytes: &Mapped) -> Option<Buf>;

    /// Gives a buffer back. Its handles must not be used again.
    fn free(&mut self, buf: Buf);

    /// Names the buffer that gives each thread its scratch.
    fn set_scratch(&mut self, scratch: Buf);

    /// Copies from the host, in order with the operations.
    fn write(&mut self, to: Buf, data: Data<'_>);

    /// Adds an operation to the queue.
    fn enqueue(&mut self, op: Op);

    /// Waits for everything enqueued so far and copies to the host.
    fn read(&mut self, from: Buf, into: DataMut<'_>);

    /// Which kernels run; results are bit-equal only within a level.
    fn level(&self) -> cpu::Level;

    /// Threads that work.
    fn threads(&self) -> usize;
}
