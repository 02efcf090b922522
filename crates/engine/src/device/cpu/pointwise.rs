//! Element by element: sums, rotary angles, dropout.
#![allow(unsafe_code)] // Threads write disjoint ranges.

use super::cells::Cells;
use super::simd::{Simd, kernel};
use super::{Buf, Cpu, Element};
use crate::random::mix;

/// Elements per task: enough work to be worth claiming.
const GRAIN: usize = 1 << 14;

/// `x = 0`, of any type: all bits zero.
pub(super) fn zero(cpu: &Cpu, x: Buf) {
    match x.element() {
        Element::F64 => {
            // SAFETY: operations run one after the other.
            unsafe { cpu.f64(x).write().fill(0.0) };
        }
        _ => {
            let x = cpu.f32(x);
            // SAFETY: each task owns its range.
            cpu.run_ranges(x.len(), GRAIN, |_, range, _| unsafe { x.part(range).write().fill(0.0) });
        }
    }
}

/// `x *= by`.
pub(super) fn scale(cpu: &Cpu, x: Cells<f32>, by: f32) {
    if by == 1.0 {
        return;
    }
    // SAFETY: each task owns its range.
    cpu.run_ranges(x.len(), GRAIN, |_, range, _| unsafe {
        x.part(range).write().iter_mut().for_each(|x| *x *= by);
    });
}

/// `to += from`.
pub(super) fn add(cpu: &Cpu, from: Cells<f32>, to: Cells<f32>) {
    assert_eq!(from.len(), to.len());
    // SAFETY: each task owns its range of `to`.
    cpu.run_ranges(to.len(), GRAIN, |_, range, _| unsafe {
        let from = from.part(range.clone()).read();
        to.part(range).write().iter_mut().zip(from).for_each(|(to, x)| *to += x);
    });
}

/// `to = from`.
pub(super) fn copy(cpu: &Cpu, from: Cells<f32>, to: Cells<f32>) {
    assert_eq!(from.len(), to.len());
    // SAFETY: each task owns its range of `to`.
    cpu.run_ranges(to.len(), GRAIN, |_, range, _| unsafe {
        to.part(range.clone()).write().copy_from_slice(from.part(range).read());
    });
}

/// Turns the pairs `(j, j + head_dim / 2)` of each head of each row.
pub(super) fn rope(
    cpu: &Cpu,
    x: Cells<f32>,
    table: Cells<f32>,
    positions: Cells<u32>,
    heads: usize,
    head_dim: usize,
    back: bool,
) {
    let half = head_dim / 2;
    let sign = if back { -1.0 } else { 1.0 };
    cpu.run_ranges(positions.len(), 16, |_, rows, _| {
        for row in rows {
            // SAFETY: this task owns these rows of x; the rest is only read.
            let (position, x) =
                unsafe { (positions.read()[row] as usize, x.rows(row..row + 1, heads * head_dim).write()) };
            // SAFETY: as above.
            let (cos, sin) = unsafe { table.rows(position..position + 1, head_dim).read() }.split_at(half);
            for head in x.chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let s = sign * s;
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    });
}

/// A vector from `i`, zeros beyond `len`.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(x: Cells<f32>, i: usize, len: usize) -> S::V {
    // SAFETY: the caller's elements are `len` long.
    unsafe {
        let at = x.ptr().add(i);
        if i + S::LANES <= len { S::load(at) } else { S::load_first(at, len - i) }
    }
}

/// Stores a vector from `i`, what is below `len`.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(x: Cells<f32>, i: usize, len: usize, v: S::V) {
    // SAFETY: as `load`.
    unsafe {
        let at = x.ptr_mut().add(i);
        if i + S::LANES <= len { S::store(at, v) } else { S::store_first(at, len - i, v) }
    }
}

/// Which elements are dropped. See [`crate::device::Op::Dropout`].
#[derive(Clone, Copy)]
pub(super) struct Mask {
    pub seeds: Cells<u64>,
    pub starts: Cells<u32>,
    pub positions: Cells<u32>,
    pub salt: u64,
    pub rate: f32,
}

/// `y = x * mask / (1 - rate)`, or `y += ...` where `keep`.
pub(super) fn dropout(cpu: &Cpu, x: Cells<f32>, y: Cells<f32>, mask: Mask, width: usize, keep: bool) {
    let Mask { seeds, starts, positions, salt, rate } = mask;
    cpu.run(starts.len() - 1, |level, sequence, _| {
        // SAFETY: this task owns the rows of its sequence; the rest is only read.
        unsafe {
            let key = mix(seeds.read()[sequence] ^ mix(salt));
            for row in starts.read()[sequence] as usize..starts.read()[sequence + 1] as usize {
                let key = mix(key ^ u64::from(positions.read()[row]));
                let x = x.rows(row..row + 1, width).read();
                let y = y.rows(row..row + 1, width).write();
                dropout_row(level, x, y, key, rate, keep);
            }
        }
    });
}

kernel! { dropout_row = dropout_row_of(x: &[f32], y: &mut [f32], key: u64, rate: f32, keep: bool) }

/// A row: an element falls where the hash of key and column is among the lowest `rate` of all.
#[inline(always)]
unsafe fn dropout_row_of<S: Simd>(x: &[f32], y: &mut [f32], key: u64, rate: f32, keep: bool) {
    let (low, high) = (key as u32, (key >> 32) as u32);
    let below = (f64::from(rate) * f64::from(u32::MAX)) as u32;
    let scale = 1.0 / (1.0 - rate);
    for (column, (x, y)) in (0u32..).zip(x.iter().zip(y)) {
        let falls = hash(column.wrapping_mul(0x9e37_79b9) ^ low).wrapping_add(high) < below;
        let kept = if falls { 0.0 } else { x * scale };
        *y = if keep { *y + kept } else { kept };
    }
}

/// Wellons' lowbias32: 32 bits through two products, which compilers turn into vector code.
#[inline(always)]
fn hash(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}
