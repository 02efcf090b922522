//! What happens to one query's scores.
#![allow(unsafe_code)] // Raw scratch.

use std::ops::Range;

use crate::device::cpu::cells::Cells;
use crate::device::cpu::pointwise::{load, store};
use crate::device::cpu::simd::{MOST_LANES, Simd, kernel};

kernel! {
    /// Takes the `seen` ones of a chunk of scores into a softmax: with the new largest score `m'` the scores become
    /// `e^(s - m')`, and the sum and the weighted sum of values so far are brought from `m` to `m'`. `norm` = `(m, sum)`.
    /// Zeros before those seen.
    ///
    /// # Safety
    /// `scores` has room for `seen.end` rounded up to whole vectors, and nobody else uses any of it.
    pub(super) soften = soften_row(scores: Cells<f32>, seen: Range<usize>, norm: &mut [f32], acc: Cells<f32>)
}

#[inline(always)]
unsafe fn soften_row<S: Simd>(scores: Cells<f32>, seen: Range<usize>, norm: &mut [f32], acc: Cells<f32>) {
    // SAFETY: the caller's.
    unsafe {
        scores.part(0..seen.start).write().fill(0.0);
        if seen.is_empty() {
            return;
        }
        let (old, max) = (norm[0], norm[0].max(largest::<S>(scores.part(seen.clone()))));
        let sum = exp_in_place::<S>(scores, seen, max);
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
unsafe fn largest<S: Simd>(x: Cells<f32>) -> f32 {
    let len = x.len();
    let whole = len / S::LANES * S::LANES;
    let mut lanes = [f32::NEG_INFINITY; MOST_LANES];
    // SAFETY: inside of `x`.
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

/// `x = e^(x - max)` for the `seen` elements, 0 for the others of their vectors; returns the sum.
#[inline(always)]
unsafe fn exp_in_place<S: Simd>(x: Cells<f32>, seen: Range<usize>, max: f32) -> f32 {
    // SAFETY: `x` is as long as `seen.end` rounded up to whole vectors.
    unsafe {
        let mut sum = S::splat(0.0);
        // Vectors are counted from the chunk's first key, so that the order of the sum is the position's alone.
        for i in (seen.start / S::LANES * S::LANES..seen.end).step_by(S::LANES) {
            let at = x.ptr_mut().add(i);
            let e = S::exp(S::sub(load::<S>(x, i, seen.end), S::splat(max)));
            S::store(at, e);
            for other in (i..seen.start).chain(seen.end.min(i + S::LANES)..i + S::LANES) {
                *x.ptr_mut().add(other) = 0.0;
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
    /// `x = cap tanh(x / cap)`.
    ///
    /// # Safety
    /// `x` is nobody else's.
    pub(super) capped = capped_row(x: Cells<f32>, cap: f32)
}

#[inline(always)]
unsafe fn capped_row<S: Simd>(x: Cells<f32>, cap: f32) {
    let len = x.len();
    for i in (0..len).step_by(S::LANES) {
        // SAFETY: the caller's.
        unsafe {
            let t = S::tanh(S::div(load::<S>(x, i, len), S::splat(cap)));
            store::<S>(x, i, len, S::mul(t, S::splat(cap)));
        }
    }
}

kernel! {
    /// The gradient through a softmax whose logarithm of the sum is `lse`, and through the cap before it: capped scores
    /// `s` become `p = e^(s - lse)`, and the gradients `d` of `p` become those of the scores before the cap,
    /// `p (d - delta) (1 - (s / cap)^2)`. An infinite `cap` is none. Zeros where a key is not seen.
    ///
    /// # Safety
    /// Both are the caller's alone, and as long as whole vectors.
    pub(super) harden = harden_row(
        s: Cells<f32>, d: Cells<f32>, seen: Range<usize>, lse: f32, delta: f32, cap: f32
    )
}

#[inline(always)]
unsafe fn harden_row<S: Simd>(
    s: Cells<f32>,
    d: Cells<f32>,
    seen: Range<usize>,
    lse: f32,
    delta: f32,
    cap: f32,
) {
    let (first, end) = (seen.start / S::LANES * S::LANES, seen.end);
    // SAFETY: the caller's.
    unsafe {
        for i in (first..end).step_by(S::LANES) {
            let score = load::<S>(s, i, end);
            let p = S::exp(S::sub(score, S::splat(lse)));
            let t = S::mul(score, S::splat(1.0 / cap));
            let slope = S::sub(S::splat(1.0), S::mul(t, t));
            let ds = S::mul(S::mul(p, S::sub(load::<S>(d, i, end), S::splat(delta))), slope);
            store::<S>(s, i, end, p);
            store::<S>(d, i, end, ds);
        }
        for x in [s, d] {
            x.part(0..seen.start).write().fill(0.0);
            x.part(end..x.len()).write().fill(0.0);
        }
    }
}
