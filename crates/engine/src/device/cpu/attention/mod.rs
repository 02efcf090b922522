//! Causal attention of a ragged batch with grouped heads, windows and soft caps, forward and backward, with the softmax
//! taken chunk by chunk (Milakov and Gimelshein, "Online normalizer calculation for softmax"; Dao et al.,
//! "FlashAttention").
//!
//! Chunks of [`KEYS`] keys are counted from position 0, and each score and each output is a sum of its own (see
//! `gemm::tile`). So a row's bits depend on its position alone: prefill in any pieces, decoding and training agree.
//! Chunks that no row of a block sees cost nothing.
#![allow(unsafe_code)] // Threads write disjoint rows and heads.

mod backward;
mod forward;
mod softmax;
mod tile_softmax;
mod tiled;

use std::ops::Range;

use lathe_plan::{
    ATTENTION_KEYS as KEYS, ATTENTION_QUERIES as QUERIES, ATTENTION_TILE_QUERIES as TILE_QUERIES, BLOCK,
};

use super::Cpu;
use super::cells::Cells;
use crate::device::Attention;
pub(super) use backward::backward;
pub(super) use forward::forward;

/// Whether queries, keys, weights and values are rounded to bf16 and meet in tiles.
fn on_tiles(cpu: &Cpu, a: &Attention) -> bool {
    a.bf16 && cpu.level.has_tiles()
}

/// Heads of a batch's queries and keys.
#[derive(Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    /// Width of each.
    dim: usize,
}

impl Heads {
    /// Query heads that share a key head.
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Rows whose queries of one key head are at most so many, or one.
    fn rows(self, queries: usize) -> usize {
        (queries / self.group()).max(1)
    }

    /// Where a row's query heads of one key head lie, one after the other.
    fn query(self, row: usize, kv_head: usize) -> Range<usize> {
        let start = (row * self.heads + kv_head * self.group()) * self.dim;
        start..start + self.group() * self.dim
    }

    /// Copies the queries of `rows` (or what has their shape) to `to[query][dim]`, times `by`.
    fn gather(self, x: Cells<f32>, rows: Range<usize>, kv_head: usize, by: f32, to: Cells<f32>) {
        let width = self.group() * self.dim;
        for (i, row) in rows.enumerate() {
            // SAFETY: x is only read while the operation runs, `to` is the task's scratch.
            unsafe {
                let from = x.part(self.query(row, kv_head)).read();
                let to = to.part(i * width..(i + 1) * width).write();
                to.iter_mut().zip(from).for_each(|(to, x)| *to = by * x);
            }
        }
    }
}

/// Takes parts of a thread's scratch one after the other.
struct Scratch {
    rest: Cells<f32>,
}

impl Scratch {
    fn take(&mut self, len: usize) -> Cells<f32> {
        let taken = self.rest.part(0..len);
        self.rest = self.rest.part(len..self.rest.len());
        taken
    }
}

/// Where the positions of a sequence lie: runs of rows that follow each other, for the positions `positions`.
///
/// `table` has the first row of each page of [`BLOCK`] positions.
fn runs(table: &[u32], positions: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut next = positions.start;
    std::iter::from_fn(move || {
        if next >= positions.end {
            return None;
        }
        let from = next;
        let row = |position: usize| table[position / BLOCK] as usize + position % BLOCK;
        let first = row(from);
        next = (from / BLOCK + 1) * BLOCK;
        while next < positions.end && row(next) == first + next - from {
            next += BLOCK;
        }
        next = next.min(positions.end);
        Some((from, first..first + next - from))
    })
}

/// Which keys of a chunk are among `keys`, counted from the chunk's first.
fn within(keys: Range<usize>, chunk: &Range<usize>) -> Range<usize> {
    let at = |position: usize| position.clamp(chunk.start, chunk.end) - chunk.start;
    at(keys.start)..at(keys.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_follow_each_other_are_one_run() {
        let table = [32, 48, 0, 16, 80];
        let found: Vec<_> = runs(&table, 3..70).collect();
        assert_eq!(found, [(3, 35..64), (32, 0..32), (64, 80..86)]);
        assert_eq!(runs(&table, 16..16).count(), 0);
    }
}
