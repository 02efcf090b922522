//! A device that notes what is asked of another.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Buf, Data, DataMut, Device, Element, Op, cpu::Level};
use crate::Result;
use crate::files::Mapped;

/// Something that was asked of a device.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A buffer was allocated.
    Alloc(Buf),
    /// A buffer was given back.
    Free(Buf),
    /// The host wrote.
    Write(Buf),
    /// An operation was enqueued.
    Op(Box<Op>),
    /// The host read back.
    Read(Buf),
}

/// Passes everything on and keeps a list of it: shows that steps of one shape enqueue the same operations and
/// that nothing is read back between them.
pub struct Recorder<D> {
    inner: D,
    events: Arc<Mutex<Vec<Event>>>,
}

impl<D: Device> Recorder<D> {
    /// Records what reaches `inner`; the list is shared with the caller.
    pub fn new(inner: D) -> (Recorder<D>, Arc<Mutex<Vec<Event>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        (Recorder { inner, events: Arc::clone(&events) }, events)
    }

    fn note(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }
}

impl<D: Device> Device for Recorder<D> {
    fn alloc(&mut self, name: &str, element: Element, len: usize) -> Result<Buf> {
        let buf = self.inner.alloc(name, element, len)?;
        self.note(Event::Alloc(buf));
        Ok(buf)
    }

    fn adopt(&mut self, element: Element, bytes: &Mapped) -> Option<Buf> {
        let buf = self.inner.adopt(element, bytes)?;
        self.note(Event::Alloc(buf));
        Some(buf)
    }

    fn free(&mut self, buf: Buf) {
        self.note(Event::Free(buf));
        self.inner.free(buf);
    }

    fn set_scratch(&mut self, scratch: Buf) {
        self.inner.set_scratch(scratch);
    }

    fn write(&mut self, to: Buf, data: Data<'_>) {
        self.note(Event::Write(to));
        self.inner.write(to, data);
    }

    fn enqueue(&mut self, op: Op) {
        self.note(Event::Op(Box::new(op.clone())));
        self.inner.enqueue(op);
    }

    fn read(&mut self, from: Buf, into: DataMut<'_>) {
        self.note(Event::Read(from));
        self.inner.read(from, into);
    }

    fn level(&self) -> Level {
        self.inner.level()
    }

    fn threads(&self) -> usize {
        self.inner.threads()
    }
}
