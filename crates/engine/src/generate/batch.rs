//! Chunks of sequences to one ragged batch.

use lathe_plan::BLOCK;

use super::{Sequence, Wanted};
use crate::Result;
use crate::decoder::{Batch, Layout, Planned};
use crate::device::{Buf, Data, Device as Dev, NO_ADAPTER};

/// The batch's buffers on the device.
pub(super) struct Device {
    batch: Batch,
    /// Where each row's key and value go.
    slots: Buf,
    /// Rows whose logits are wanted, and behind them those whose states are.
    pub rows: Buf,
    /// At which their tokens are drawn.
    pub temperatures: Buf,
}

impl Device {
    pub(super) fn of(planned: &Planned) -> Result<Device> {
        let slots = planned.get("batch.slots")?;
        let batch = Batch { slots: Some(slots), ..Batch::of(planned)? };
        let (rows, temperatures) = (planned.get("batch.rows")?, planned.get("head.temperatures")?);
        Ok(Device { batch, slots, rows, temperatures })
    }
}

/// A batch on the host; the vectors are used again and again.
#[derive(Default)]
pub(super) struct Host {
    layout: Layout,
    adapters: Vec<u32>,
    slots: Vec<u32>,
    /// Whose next tokens are wanted.
    chosen: Vec<u32>,
    /// Whose states are wanted.
    embedded: Vec<u32>,
    /// Of the chosen.
    temperatures: Vec<f32>,
}

impl Host {
    /// Lays out `rows` tokens of each sequence from the first that is not in the cache.
    pub(super) fn fill<'a>(&mut self, chunks: impl Iterator<Item = (&'a Sequence, usize)>, context: usize) {
        let Host { layout, adapters, slots, chosen, embedded, temperatures } = self;
        layout.clear();
        temperatures.clear();
        for vector in [&mut *adapters, slots, chosen, embedded] {
            vector.clear();
        }
        let Layout { tokens, positions, starts, table_starts, tables } = layout;
        let table = context.div_ceil(BLOCK);
        for (i, (sequence, rows)) in chunks.enumerate() {
            starts.push(tokens.len() as u32);
            let range = sequence.computed..sequence.computed + rows;
            tokens.extend(&sequence.tokens[range.clone()]);
            positions.extend(range.clone().map(|p| p as u32));
            adapters.extend(range.clone().map(|_| sequence.adapter.map_or(NO_ADAPTER, |slot| slot as u32)));
            slots.extend(
                range.clone().map(|p| sequence.blocks[p / BLOCK] * BLOCK as u32 + (p % BLOCK) as u32),
            );
            table_starts.push((i * table) as u32);
            tables.extend(sequence.blocks.iter().map(|block| block * BLOCK as u32));
            tables.resize((i + 1) * table, 0);
            if range.end == sequence.tokens.len() {
                let row = tokens.len() as u32 - 1;
                match sequence.wanted {
                    Wanted::Tokens(sampling, _) => {
                        chosen.push(row);
                        temperatures.push(sampling.temperature);
                    }
                    Wanted::Embedding => embedded.push(row),
                }
            }
        }
        starts.push(tokens.len() as u32);
    }

    /// Sequences whose next token this batch gives, and those whose embedding.
    pub(super) fn chosen(&self) -> (usize, usize) {
        (self.chosen.len(), self.embedded.len())
    }

    pub(super) fn write(&self, dev: &mut dyn Dev, to: &Device) -> Batch {
        let batch = self.layout.write(dev, to.batch);
        let embedded = to.rows.part(self.chosen.len(), self.embedded.len());
        for (to, from) in [
            (batch.adapters, &self.adapters),
            (to.slots, &self.slots),
            (to.rows, &self.chosen),
            (embedded, &self.embedded),
        ] {
            dev.write(to.first(from.len()), Data::U32(from));
        }
        dev.write(to.temperatures.first(self.temperatures.len()), Data::F32(&self.temperatures));
        batch
    }
}
