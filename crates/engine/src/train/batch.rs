//! Rows to ragged micro-batches.

use lathe_plan::BLOCK;

use super::Row;
use crate::Result;
use crate::decoder::{Batch, LossHead, Planned};
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
    tokens: Buf,
    positions: Buf,
    starts: Buf,
    table_starts: Buf,
    tables: Buf,
    adapters: Buf,
    seeds: Buf,
}

impl Device {
    pub(super) fn of(planned: &Planned) -> Result<Device> {
        let get = |name: &str| planned.get(&format!("batch.{name}"));
        Ok(Device {
            tokens: get("tokens")?,
            positions: get("positions")?,
            starts: get("starts")?,
            table_starts: get("table_starts")?,
            tables: get("tables")?,
            adapters: get("adapters")?,
            seeds: get("seeds")?,
        })
    }
}

/// A micro-batch on the host; the vectors are used again and again.
#[derive(Default)]
pub(super) struct Host {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    starts: Vec<u32>,
    table_starts: Vec<u32>,
    tables: Vec<u32>,
    seeds: Vec<u64>,
    chosen: Vec<u32>,
    targets: Vec<u32>,
    coefficients: Vec<f32>,
}

impl Host {
    /// Lays out `rows`. A row's last token predicts nothing, so it is only a target. `total` is the sum of the
    /// weights of the whole step.
    pub(super) fn fill(&mut self, rows: &[Row], total: f64, seed: impl Fn(usize) -> u64) -> &Host {
        let Host { tokens, positions, starts, table_starts, tables, seeds, chosen, targets, coefficients } =
            self;
        for vector in [&mut *tokens, positions, starts, table_starts, tables, chosen, targets] {
            vector.clear();
        }
        seeds.clear();
        coefficients.clear();
        for (i, row) in rows.iter().enumerate() {
            let (first, len) = (tokens.len() as u32, row.tokens.len() - 1);
            tokens.extend(&row.tokens[..len]);
            positions.extend(0..len as u32);
            starts.push(first);
            table_starts.push(tables.len() as u32);
            tables.extend((0..len as u32).step_by(BLOCK).map(|page| first + page));
            seeds.push(seed(i));
            for (at, (&token, &weight)) in row.tokens.iter().zip(&row.weights).enumerate().skip(1) {
                if weight != 0.0 {
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

    pub(super) fn write(&self, dev: &mut dyn Dev, to: &Device, head: &LossHead) -> Batch {
        for (to, from) in [
            (to.tokens, &self.tokens),
            (to.positions, &self.positions),
            (to.starts, &self.starts),
            (to.table_starts, &self.table_starts),
            (to.tables, &self.tables),
            (head.chosen, &self.chosen),
            (head.targets, &self.targets),
        ] {
            dev.write(to.first(from.len()), Data::U32(from));
        }
        dev.write(to.seeds.first(self.seeds.len()), Data::U64(&self.seeds));
        dev.write(head.coefficients.first(self.coefficients.len()), Data::F32(&self.coefficients));
        Batch {
            rows: self.tokens.len(),
            sequences: self.seeds.len(),
            tokens: to.tokens,
            positions: to.positions,
            starts: to.starts,
            table_starts: to.table_starts,
            tables: to.tables,
            adapters: to.adapters,
            seeds: Some(to.seeds),
            slots: None,
        }
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
        assert_eq!(host.tokens, [7, 8, 4]);
        assert_eq!(host.positions, [0, 1, 0]);
        assert_eq!(host.starts, [0, 2, 3]);
        assert_eq!((&host.chosen[..], &host.targets[..]), (&[1, 2][..], &[9, 5][..]));
        assert_eq!(host.coefficients, [0.25, 0.75]);
    }
}
