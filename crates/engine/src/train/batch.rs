//! Rows to ragged micro-batches.

use lathe_plan::BLOCK;

use super::Row;
use crate::Result;
use crate::decoder::{Batch, Layout, LossHead, Planned};
use crate::device::{Buf, Data, Device as Dev};

/// Cuts rows, in their order, into runs of at most `tokens` tokens (a longer row is a run of its own).
pub(super) fn micro_batches(rows: &[Row], tokens: usize) -> impl Iterator<Item = &[Row]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = |row: &&Row| {
            sum += row.tokens.len();
            sum <= tokens
        };
        let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (now, later) = rest.split_at(count);
        rest = later;
        (!now.is_empty()).then_some(now)
    })
}

/// The batch's buffers on the device.
pub(super) struct Device {
    batch: Batch,
    seeds: Buf,
}

impl Device {
    pub(super) fn of(planned: &Planned) -> Result<Device> {
        let seeds = planned.get("batch.seeds")?;
        Ok(Device { batch: Batch { seeds: Some(seeds), ..Batch::of(planned)? }, seeds })
    }
}

/// A micro-batch on the host; the vectors are used again and again.
#[derive(Default)]
pub(super) struct Host {
    layout: Layout,
    seeds: Vec<u64>,
    chosen: Vec<u32>,
    places: Vec<u32>,
    targets: Vec<u32>,
    coefficients: Vec<f32>,
}

impl Host {
    /// Lays out `rows`. A row's last token predicts nothing, so it is only a target. `total` is the sum of the
    /// weights of the whole step.
    pub(super) fn fill(&mut self, rows: &[Row], total: f64, seed: impl Fn(usize) -> u64) -> &Host {
        let Host { layout, seeds, chosen, places, targets, coefficients } = self;
        layout.clear();
        chosen.clear();
        places.clear();
        targets.clear();
        seeds.clear();
        coefficients.clear();
        let Layout { tokens, positions, starts, table_starts, tables } = layout;
        for (i, row) in rows.iter().enumerate() {
            let (first, len) = (tokens.len() as u32, row.tokens.len() - 1);
            tokens.extend(&row.tokens[..len]);
            positions.extend(0..len as u32);
            starts.push(first);
            table_starts.push(tables.len() as u32);
            tables.extend((0..len as u32).step_by(BLOCK).map(|page| first + page));
            seeds.push(seed(i));
            let chosen_before = chosen.len();
            for (at, (&token, &weight)) in row.tokens.iter().zip(&row.weights).enumerate().skip(1) {
                if weight != 0.0 {
                    places.push((chosen.len() - chosen_before) as u32);
                    chosen.push(first + at as u32 - 1);
                    targets.push(token);
                    coefficients.push((f64::from(weight) / total) as f32);
                }
            }
        }
        starts.push(tokens.len() as u32);
        self
    }

    /// Rows that predict a weighted token.
    pub(super) fn chosen(&self) -> usize {
        self.chosen.len()
    }

    /// Each one's place among those of its sequence.
    pub(super) fn places(&self) -> &[u32] {
        &self.places
    }

    pub(super) fn write(&self, dev: &mut dyn Dev, to: &Device, head: &LossHead) -> Batch {
        let batch = self.layout.write(dev, to.batch);
        let numbers =
            [(head.chosen, &self.chosen), (head.places, &self.places), (head.targets, &self.targets)];
        for (to, from) in numbers {
            dev.write(to.first(from.len()), Data::U32(from));
        }
        dev.write(to.seeds.first(self.seeds.len()), Data::U64(&self.seeds));
        dev.write(head.coefficients.first(self.coefficients.len()), Data::F32(&self.coefficients));
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(len: usize) -> Row {
        Row { tokens: vec![0; len], weights: vec![1.0; len] }
    }

    #[test]
    fn micro_batches_keep_the_order_and_the_limit() {
        let rows: Vec<Row> = [3, 3, 5, 20, 1, 9].map(row).into();
        let cut: Vec<Vec<usize>> =
            micro_batches(&rows, 10).map(|m| m.iter().map(|r| r.tokens.len()).collect()).collect();
        assert_eq!(cut, [vec![3, 3], vec![5], vec![20], vec![1, 9]]);
    }

    #[test]
    fn a_prompt_is_read_but_not_learned() {
        let rows = [
            Row { tokens: vec![7, 8, 9], weights: vec![0.0, 0.0, 1.0] },
            Row { tokens: vec![4, 5], weights: vec![1.0, 3.0] },
        ];
        let mut host = Host::default();
        let host = host.fill(&rows, 4.0, |_| 0);
        assert_eq!(host.layout.tokens, [7, 8, 4]);
        assert_eq!(host.layout.positions, [0, 1, 0]);
        assert_eq!(host.layout.starts, [0, 2, 3]);
        assert_eq!((&host.chosen[..], &host.targets[..]), (&[1, 2][..], &[9, 5][..]));
        assert_eq!(host.places, [0, 0]);
        assert_eq!(host.coefficients, [0.25, 0.75]);
    }
}
