//! A ragged batch: what every one has, whether it is learned from or answered.

use super::Planned;
use crate::Result;
use crate::device::{Buf, Data, Device};

/// A ragged batch on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch {
    pub rows: usize,
    pub sequences: usize,
    /// `[T]`
    pub tokens: Buf,
    /// `[T]`
    pub positions: Buf,
    /// `[sequences + 1]`
    pub starts: Buf,
    /// `[sequences]`
    pub table_starts: Buf,
    pub tables: Buf,
    /// `[T]`
    pub adapters: Buf,
    /// `[sequences]`, for dropout.
    pub seeds: Option<Buf>,
    /// `[T]`: where each row's key and value go in the cache.
    pub slots: Option<Buf>,
}

impl Batch {
    /// The buffers of a plan, with no rows in them yet; neither seeds nor slots.
    pub(crate) fn of(planned: &Planned) -> Result<Batch> {
        let get = |name: &str| planned.get(&format!("batch.{name}"));
        Ok(Batch {
            rows: 0,
            sequences: 0,
            tokens: get("tokens")?,
            positions: get("positions")?,
            starts: get("starts")?,
            table_starts: get("table_starts")?,
            tables: get("tables")?,
            adapters: get("adapters")?,
            seeds: None,
            slots: None,
        })
    }
}

/// A batch on the host; the vectors are used again and again.
#[derive(Default)]
pub(crate) struct Layout {
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    pub starts: Vec<u32>,
    pub table_starts: Vec<u32>,
    pub tables: Vec<u32>,
}

impl Layout {
    pub(crate) fn clear(&mut self) {
        let Layout { tokens, positions, starts, table_starts, tables } = self;
        for vector in [tokens, positions, starts, table_starts, tables] {
            vector.clear();
        }
    }

    /// Writes the rows to the buffers of `to`.
    pub(crate) fn write(&self, dev: &mut dyn Device, to: Batch) -> Batch {
        let Layout { tokens, positions, starts, table_starts, tables } = self;
        for (to, from) in [
            (to.tokens, tokens),
            (to.positions, positions),
            (to.starts, starts),
            (to.table_starts, table_starts),
            (to.tables, tables),
        ] {
            dev.write(to.first(from.len()), Data::U32(from));
        }
        Batch { rows: tokens.len(), sequences: starts.len() - 1, ..to }
    }
}
