//! RMS norm and sums over rows.
#![allow(unsafe_code)] // Threads write disjoint rows or columns.

use super::Cpu;
use super::cells::Cells;
use super::pointwise::{load, store};
use super::simd::{Simd, kernel};

const ROWS: usize = 16;
const COLUMNS: usize = 64;

/// `inv = 1 / sqrt(mean(x^2) + eps)`, `out = x inv weight`, for each row.
#[allow(clippy::too_many_arguments)]
pub(super) fn rms_norm(
    cpu: &Cpu,
    x: Cells<f32>,
    weight: Cells<f32>,
    out: Cells<f32>,
    inv: Cells<f32>,
    rows: usize,
    width: usize,
    eps: f32,
) {
    assert_eq!(weight.len(), width);
    cpu.run_ranges(rows, ROWS, |level, range, _| {
        for row in range {
            let at = |m: Cells<f32>| m.rows(row..row + 1, width);
            // SAFETY: this task owns these rows of `out` and `inv`.
            unsafe { inv.part(row..row + 1).write()[0] = norm_row(level, at(x), weight, at(out), eps) };
        }
    });
}

kernel! { norm_row = norm_row_of(x: Cells<f32>, weight: Cells<f32>, out: Cells<f32>, eps: f32) -> f32 }

#[inline(always)]
unsafe fn norm_row_of<S: Simd>(x: Cells<f32>, weight: Cells<f32>, out: Cells<f32>, eps: f32) -> f32 {
    let len = x.len();
    // SAFETY: all three are `len` long; `load` and `store` stay inside.
    unsafe {
        let mut sum = S::splat(0.0);
        for i in (0..len).step_by(S::LANES) {
            let x = load::<S>(x, i, len);
            sum = S::fma(x, x, sum);
        }
        let inv = 1.0 / (S::sum(sum) / len as f32 + eps).sqrt();
        for i in (0..len).step_by(S::LANES) {
            let y = S::mul(S::mul(load::<S>(x, i, len), S::splat(inv)), load::<S>(weight, i, len));
            store::<S>(out, i, len, y);
        }
        inv
    }
}

/// `dx += inv (g - x inv^2 mean(g x))` with `g = dout weight`.
#[allow(clippy::too_many_arguments)]
pub(super) fn rms_norm_grad(
    cpu: &Cpu,
    x: Cells<f32>,
    weight: Cells<f32>,
    inv: Cells<f32>,
    dout: Cells<f32>,
    dx: Cells<f32>,
    rows: usize,
    width: usize,
) {
    assert_eq!(weight.len(), width);
    cpu.run_ranges(rows, ROWS, |level, range, _| {
        for row in range {
            let at = |m: Cells<f32>| m.rows(row..row + 1, width);
            // SAFETY: this task owns these rows of dx; the rest is only read.
            unsafe { norm_grad_row(level, at(x), weight, inv.read()[row], at(dout), at(dx)) };
        }
    });
}

kernel! {
    norm_grad_row = norm_grad_row_of(
        x: Cells<f32>, weight: Cells<f32>, inv: f32, dout: Cells<f32>, dx: Cells<f32>
    )
}

#[inline(always)]
unsafe fn norm_grad_row_of<S: Simd>(
    x: Cells<f32>,
    weight: Cells<f32>,
    inv: f32,
    dout: Cells<f32>,
    dx: Cells<f32>,
) {
    let len = x.len();
    // SAFETY: all four are `len` long; `load` and `store` stay inside.
    unsafe {
        let mut dot = S::splat(0.0);
        for i in (0..len).step_by(S::LANES) {
            let g = S::mul(load::<S>(dout, i, len), load::<S>(weight, i, len));
            dot = S::fma(g, load::<S>(x, i, len), dot);
        }
        let along = S::splat(-inv * inv * inv * S::sum(dot) / len as f32);
        for i in (0..len).step_by(S::LANES) {
            let g = S::mul(load::<S>(dout, i, len), load::<S>(weight, i, len));
            let sum = S::fma(g, S::splat(inv), load::<S>(dx, i, len));
            store::<S>(dx, i, len, S::fma(along, load::<S>(x, i, len), sum));
        }
    }
}

/// `dweight += sum over rows of dout x inv`, in the order of rows.
pub(super) fn rms_norm_weight_grad(
    cpu: &Cpu,
    x: Cells<f32>,
    inv: Cells<f32>,
    dout: Cells<f32>,
    dweight: Cells<f32>,
    rows: usize,
    width: usize,
) {
    cpu.run_ranges(width, COLUMNS, |_, columns, _| {
        // SAFETY: this task owns these columns of dweight; the rest is only read.
        unsafe {
            let sum = dweight.part(columns.clone()).write();
            for row in 0..rows {
                let at = row * width + columns.start..row * width + columns.end;
                let (x, d, inv) = (x.part(at.clone()).read(), dout.part(at).read(), inv.read()[row]);
                sum.iter_mut().zip(d.iter().zip(x)).for_each(|(sum, (d, x))| *sum += d * (x * inv));
            }
        }
    });
}

/// `sum += sum over rows of x`, in the order of rows.
pub(super) fn column_sum(cpu: &Cpu, x: Cells<f32>, sum: Cells<f32>, rows: usize, width: usize) {
    cpu.run_ranges(width, COLUMNS, |_, columns, _| {
        // SAFETY: this task owns these columns of `sum`; x is only read.
        unsafe {
            let sum = sum.part(columns.clone()).write();
            for row in 0..rows {
                let from = x.part(row * width + columns.start..row * width + columns.end).read();
                sum.iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
            }
        }
    });
}
