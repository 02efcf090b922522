//! What happens to one query's scores.
#![allow(unsafe_code)] // Raw scratch.

use crate::device::cpu::cells::Cells;
use crate::device::cpu::pointwise::{load, store};
use crate::device::cpu::simd::{MOST_LANES, Simd, kernel};

kernel! {
    /// Takes a chunk of scores into a softmax: with the new largest score `m'` the scores become `e^(s - m')`, and
    /// the sum and the weighted sum of values so far are brought from `m` to `m'`. `norm` = `(m, sum)`.
    ///
    /// # Safety
    /// `scores` has room for `len` rounded up to whole vectors, and nobody else uses any of it.
    pub(super) soften = soften_row(scores: Cells<f32>, len: usize, norm: &mut [f32], acc: Cells<f32>)
}

#[inline(always)]
unsafe fn soften_row<S: Simd>(scores: Cells<f32>, len: usize, norm: &mut [f32], acc: Cells<f32>) {
    if len == 0 {
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        let (old, max) = (norm[0], norm[0].max(largest::<S>(scores, len)));
        let sum = exp_in_place::<S>(scores, len, max);
        if max > old {
            let by = if old == f32::NEG_INFINITY { 0.0 } else { exp_of::<S>(old - max) };
            norm[1] *= by;
            scaled_row::<S>(acc, by, acc);
        }
        norm[0] = max;
        norm[1] += sum;
    }
}

/// `e^x`, as the vectors have it.
#[inline(always)]
fn exp_of<S: Simd>(x: f32) -> f32 {
    let mut out = [0.0; MOST_LANES];
    // SAFETY: there is room for a vector.
    unsafe { S::store(out.as_mut_ptr(), S::exp(S::splat(x))) };
    out[0]
}

#[inline(always)]
unsafe fn largest<S: Simd>(x: Cells<f32>, len: usize) -> f32 {
    let whole = len / S::LANES * S::LANES;
    let mut lanes = [f32::NEG_INFINITY; MOST_LANES];
    // SAFETY: the caller's elements are `len` long.
    unsafe {
        if whole > 0 {
            let mut max = S::load(x.ptr());
            for i in (S::LANES..whole).step_by(S::LANES) {
                max = S::max(S::load(x.ptr().add(i)), max);
            }
            S::store(lanes.as_mut_ptr(), max);
        }
        let rest = &x.part(whole..len).read();
        lanes.iter().chain(*rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
    }
}

/// `x = e^(x - max)` for the first `len` elements, 0 up to the next whole vector; returns the sum.
#[inline(always)]
unsafe fn exp_in_place<S: Simd>(x: Cells<f32>, len: usize, max: f32) -> f32 {
    // SAFETY: `x` is as long as `len` rounded up to whole vectors.
    unsafe {
        let mut sum = S::splat(0.0);
        for i in (0..len).step_by(S::LANES) {
            let at = x.ptr_mut().add(i);
            let e = S::exp(S::sub(load::<S>(x, i, len), S::splat(max)));
            S::store(at, e);
            for rest in len.min(i + S::LANES)..i + S::LANES {
                *x.ptr_mut().add(rest) = 0.0;
            }
            sum = S::add(sum, S::load(at));
        }
        S::sum(sum)
    }
}

kernel! {
    /// `to = by x`; `to` may be `x`.
    ///
    /// # Safety
    /// `to` is as long as `x` and nobody else's.
    pub(super) scaled = scaled_row(x: Cells<f32>, by: f32, to: Cells<f32>)
}

#[inline(always)]
unsafe fn scaled_row<S: Simd>(x: Cells<f32>, by: f32, to: Cells<f32>) {
    let len = x.len();
    for i in (0..len).step_by(S::LANES) {
        // SAFETY: the caller's.
        unsafe { store::<S>(to, i, len, S::mul(load::<S>(x, i, len), S::splat(by))) };
    }
}

kernel! {
    /// The sum of `a b`.
    ///
    /// # Safety
    /// Nobody writes them meanwhile.
    pub(super) product = product_of(a: Cells<f32>, b: Cells<f32>) -> f32
}

#[inline(always)]
unsafe fn product_of<S: Simd>(a: Cells<f32>, b: Cells<f32>) -> f32 {
    let len = a.len();
    let mut sum = S::splat(0.0);
    for i in (0..len).step_by(S::LANES) {
        // SAFETY: the caller's.
        sum = unsafe { S::fma(load::<S>(a, i, len), load::<S>(b, i, len), sum) };
    }
    S::sum(sum)
}

kernel! {
    /// The gradient through a softmax whose logarithm of the sum is `lse`: scores `s` become `p = e^(s - lse)`, and
    /// the gradients `d` of `p` become those of `s`, `p (d - delta)`. Zeros from `seen` up to the end.
    ///
    /// # Safety
    /// Both are the caller's alone, and as long as whole vectors.
    pub(super) harden = harden_row(s: Cells<f32>, d: Cells<f32>, seen: usize, lse: f32, delta: f32)
}

#[inline(always)]
unsafe fn harden_row<S: Simd>(s: Cells<f32>, d: Cells<f32>, seen: usize, lse: f32, delta: f32) {
    // SAFETY: the caller's.
    unsafe {
        for i in (0..seen).step_by(S::LANES) {
            let p = S::exp(S::sub(load::<S>(s, i, seen), S::splat(lse)));
            let ds = S::mul(p, S::sub(load::<S>(d, i, seen), S::splat(delta)));
            store::<S>(s, i, seen, p);
            store::<S>(d, i, seen, ds);
        }
        s.part(seen..s.len()).write().fill(0.0);
        d.part(seen..d.len()).write().fill(0.0);
    }
}
