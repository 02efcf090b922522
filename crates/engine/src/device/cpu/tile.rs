//! The innermost loop of every product: a tile of `C[rows, 16 * panels] += A B`, held in registers while it runs
//! along K. Each element is one chain of multiply-adds in the order of K that begins with what C holds. So
//! neither the tile's shape, nor cutting K into chunks, nor which rows come together changes a bit.
#![allow(unsafe_code)] // Raw pointers into packed panels; registers must not spill to bounds checks.

use lathe_plan::PANEL;

use super::simd::{LANES, Simd, kernel};

/// Rows of the largest tile: 6 x 16 fills 12 of 16 vector registers.
pub(super) const TILE_ROWS: usize = 6;

/// An element of a packed weight: f32, or bf16 (as bits) widened on load.
pub(super) trait Weight: Copy + Send + Sync {
    /// # Safety
    /// `from` is valid for reading 8 elements.
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(from) }
    }
}

impl Weight for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(from) }
    }
}

/// Where a tile's operands lie. `A[i, k]` at `a + i * a_row + k * a_k`; `B[k, 16 p + j]` at
/// `b + p * b_panel + 16 k + j`; `C[i, 16 p + j]` at `c + i * c_row + p * c_panel + j`.
#[derive(Clone, Copy)]
pub(super) struct Tile<W> {
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_k: usize,
    pub b: *const W,
    pub b_panel: usize,
    pub c: *mut f32,
    pub c_row: usize,
    pub c_panel: usize,
}

#[inline(always)]
unsafe fn fixed<S: Simd, W: Weight, const R: usize, const P: usize>(t: Tile<W>) {
    // SAFETY: the caller of `few` or `column` vouches for all operands.
    unsafe {
        let mut acc = [[[S::splat(0.0); 2]; P]; R];
        for (i, row) in acc.iter_mut().enumerate() {
            for (p, halves) in row.iter_mut().enumerate() {
                let c = t.c.add(i * t.c_row + p * t.c_panel);
                *halves = [S::load(c), S::load(c.add(LANES))];
            }
        }
        for k in 0..t.k {
            let mut b = [[S::splat(0.0); 2]; P];
            for (p, halves) in b.iter_mut().enumerate() {
                let from = t.b.add(p * t.b_panel + k * PANEL);
                *halves = [W::load::<S>(from), W::load::<S>(from.add(LANES))];
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let a = S::splat(*t.a.add(i * t.a_row + k * t.a_k));
                for (sum, b) in row.iter_mut().zip(b) {
                    *sum = [S::fma(a, b[0], sum[0]), S::fma(a, b[1], sum[1])];
                }
            }
        }
        for (i, row) in acc.iter().enumerate() {
            for (p, halves) in row.iter().enumerate() {
                let c = t.c.add(i * t.c_row + p * t.c_panel);
                S::store(c, halves[0]);
                S::store(c.add(LANES), halves[1]);
            }
        }
    }
}

/// One tile of up to 6 rows and one panel, of whose 16 columns `columns` exist in C.
#[inline(always)]
unsafe fn one_panel<S: Simd, W: Weight>(rows: usize, columns: usize, t: Tile<W>) {
    // SAFETY: the caller's; the copy in `edge` has room for 16 columns.
    unsafe {
        if columns < PANEL {
            return edge::<S, W>(rows, columns, t);
        }
        match rows {
            1 => fixed::<S, W, 1, 1>(t),
            2 => fixed::<S, W, 2, 1>(t),
            3 => fixed::<S, W, 3, 1>(t),
            4 => fixed::<S, W, 4, 1>(t),
            5 => fixed::<S, W, 5, 1>(t),
            _ => fixed::<S, W, 6, 1>(t),
        }
    }
}

/// The last panel, where C has fewer than 16 columns: works on a copy.
#[inline(always)]
unsafe fn edge<S: Simd, W: Weight>(rows: usize, columns: usize, t: Tile<W>) {
    let mut copy = [[0.0f32; PANEL]; TILE_ROWS];
    // SAFETY: only existing columns of C are touched.
    unsafe {
        for (i, row) in copy.iter_mut().enumerate().take(rows) {
            for (j, x) in row.iter_mut().enumerate().take(columns) {
                *x = *t.c.add(i * t.c_row + j);
            }
        }
        // Row by row keeps this cold path small; the bits are the same.
        for (i, row) in copy.iter_mut().enumerate().take(rows) {
            let a = t.a.add(i * t.a_row);
            fixed::<S, W, 1, 1>(Tile { a, c: row.as_mut_ptr(), c_row: PANEL, ..t });
        }
        for (i, row) in copy.iter().enumerate().take(rows) {
            for (j, &x) in row.iter().enumerate().take(columns) {
                *t.c.add(i * t.c_row + j) = x;
            }
        }
    }
}

/// All rows of one panel: tiles of 6 and what is left. `columns` of the panel exist in C.
#[inline(always)]
unsafe fn column_of_tiles<S: Simd, W: Weight>(rows: usize, columns: usize, t: Tile<W>) {
    let mut row = 0;
    while row < rows {
        let count = (rows - row).min(TILE_ROWS);
        // SAFETY: the caller's; rows `row..row + count` exist.
        unsafe {
            let (a, c) = (t.a.add(row * t.a_row), t.c.add(row * t.c_row));
            one_panel::<S, W>(count, columns, Tile { a, c, ..t });
        }
        row += count;
    }
}

/// A few rows over many panels (decoding): wide tiles keep enough chains in flight to hide the latency of an
/// addition, and the weights are read once, in order.
#[inline(always)]
unsafe fn few_rows<S: Simd, W: Weight>(rows: usize, columns: usize, t: Tile<W>) {
    let wide = match rows {
        1 => 4,
        2 | 3 => 2,
        _ => 1,
    };
    let mut column = 0;
    while column < columns {
        let panel = column / PANEL;
        // SAFETY: the caller's; panels `panel..` exist up to `columns`.
        unsafe {
            let here = Tile { b: t.b.add(panel * t.b_panel), c: t.c.add(panel * t.c_panel), ..t };
            if columns - column >= wide * PANEL && wide > 1 {
                match rows {
                    1 => fixed::<S, W, 1, 4>(here),
                    2 => fixed::<S, W, 2, 2>(here),
                    _ => fixed::<S, W, 3, 2>(here),
                }
                column += wide * PANEL;
            } else {
                column_of_tiles::<S, W>(rows, (columns - column).min(PANEL), here);
                column += PANEL;
            }
        }
    }
}

kernel! {
    /// All `rows` of one panel of f32; `columns` of it exist in C.
    ///
    /// # Safety
    /// The operands of all tiles are valid, C is nobody else's.
    pub(super) column = column_f32(rows: usize, columns: usize, tile: Tile<f32>)
}

#[inline(always)]
unsafe fn column_f32<S: Simd>(rows: usize, columns: usize, tile: Tile<f32>) {
    // SAFETY: the caller's.
    unsafe { column_of_tiles::<S, f32>(rows, columns, tile) }
}

kernel! {
    /// A few rows over `columns` columns of an f32 weight.
    ///
    /// # Safety
    /// As [`column`].
    pub(super) few_f32 = few_rows_f32(rows: usize, columns: usize, tile: Tile<f32>)
}

#[inline(always)]
unsafe fn few_rows_f32<S: Simd>(rows: usize, columns: usize, tile: Tile<f32>) {
    // SAFETY: the caller's.
    unsafe { few_rows::<S, f32>(rows, columns, tile) }
}

kernel! {
    /// A few rows over `columns` columns of a bf16 weight.
    ///
    /// # Safety
    /// As [`column`].
    pub(super) few_bf16 = few_rows_bf16(rows: usize, columns: usize, tile: Tile<u16>)
}

#[inline(always)]
unsafe fn few_rows_bf16<S: Simd>(rows: usize, columns: usize, tile: Tile<u16>) {
    // SAFETY: the caller's.
    unsafe { few_rows::<S, u16>(rows, columns, tile) }
}

kernel! {
    /// `to[..len] = from[..len]` widened; `len` is a multiple of 8.
    ///
    /// # Safety
    /// Both are valid for `len` elements.
    pub(super) widen = widen_bf16(from: *const u16, to: *mut f32, len: usize)
}

#[inline(always)]
unsafe fn widen_bf16<S: Simd>(from: *const u16, to: *mut f32, len: usize) {
    for i in (0..len).step_by(LANES) {
        // SAFETY: the caller's.
        unsafe { S::store(to.add(i), S::load_bf16(from.add(i))) };
    }
}

/// `to[o * 16 + i] = from[i * 16 + o]`: a 16 x 16 block of a panel with inputs and outputs exchanged, widened.
#[inline(always)]
unsafe fn transposed<S: Simd, W: Weight>(from: *const W, to: *mut f32) {
    for (i, o) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
        // SAFETY: the caller gives 256 elements each.
        unsafe {
            let rows = std::array::from_fn(|r| W::load::<S>(from.add((i + r) * PANEL + o)));
            for (r, row) in S::transpose(rows).into_iter().enumerate() {
                S::store(to.add((o + r) * PANEL + i), row);
            }
        }
    }
}

kernel! {
    /// Exchanges inputs and outputs of a 16 x 16 block of an f32 panel.
    ///
    /// # Safety
    /// Both are valid for 256 elements.
    pub(super) transpose_f32 = transposed_f32(from: *const f32, to: *mut f32)
}

#[inline(always)]
unsafe fn transposed_f32<S: Simd>(from: *const f32, to: *mut f32) {
    // SAFETY: the caller's.
    unsafe { transposed::<S, f32>(from, to) }
}

kernel! {
    /// Exchanges inputs and outputs of a 16 x 16 block of a bf16 panel, widened.
    ///
    /// # Safety
    /// Both are valid for 256 elements.
    pub(super) transpose_bf16 = transposed_bf16(from: *const u16, to: *mut f32)
}

#[inline(always)]
unsafe fn transposed_bf16<S: Simd>(from: *const u16, to: *mut f32) {
    // SAFETY: the caller's.
    unsafe { transposed::<S, u16>(from, to) }
}
