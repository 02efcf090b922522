//! Reading ahead what a processor does not foresee.

use crate::device::cpu::simd::prefetch;

/// Bytes of a cache line: a tile's row.
pub(super) const LINE: usize = 64;

/// Reads rows that come next ahead, one after the other: processors foresee the order of memory, but not that of tiles, a
/// line of each of sixteen rows.
pub(super) struct Ahead {
    row: *const u8,
    row_stride: usize,
    at: usize,
    bytes: usize,
    rows: usize,
    lines: usize,
}

impl Ahead {
    /// So many rows of so many bytes each, `lines` at a time.
    pub(super) fn of(row: *const u8, row_stride: usize, bytes: usize, rows: usize, lines: usize) -> Ahead {
        Ahead { row, row_stride, at: 0, bytes, rows, lines }
    }

    pub(super) fn nothing() -> Ahead {
        Ahead::of(std::ptr::null(), 0, 0, 0, 0)
    }

    /// Some lines more, as long as there are rows.
    #[inline(always)]
    pub(super) fn lines(&mut self) {
        let mut left = self.lines;
        while left > 0 && self.rows > 0 {
            let some = left.min((self.bytes - self.at).div_ceil(LINE));
            let from = self.row.wrapping_add(self.at);
            for line in 0..some {
                prefetch(from.wrapping_add(line * LINE));
            }
            left -= some;
            self.at += some * LINE;
            if self.at >= self.bytes {
                (self.at, self.row, self.rows) = (0, self.row.wrapping_add(self.row_stride), self.rows - 1);
            }
        }
    }
}
