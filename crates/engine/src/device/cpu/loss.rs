//! Log-probabilities of target tokens and their gradient.
#![allow(unsafe_code)] // Threads write disjoint rows.

use super::Cpu;
use super::cells::Cells;
use super::pointwise::{load, store};
use super::simd::{MOST_LANES, Simd, kernel};
use lathe_plan::SAMPLE_CHUNK;

/// `stats = (max, sum of exp(x - max), the target's logit)` for each row.
pub(super) fn logit_stats(
    cpu: &Cpu,
    logits: Cells<f32>,
    targets: Cells<u32>,
    stats: Cells<f32>,
    vocab: usize,
    first: usize,
) {
    cpu.run_ranges(targets.len(), 1, |level, rows, _| {
        for row in rows {
            let logits = logits.rows(row..row + 1, vocab);
            // SAFETY: this task owns these rows of `stats`; the rest is only read.
            unsafe {
                let (max, sum) = max_and_sum(level, logits);
                let target = (targets.read()[row] as usize).wrapping_sub(first);
                let at_target = logits.read().get(target).copied().unwrap_or(0.0);
                stats.rows(row..row + 1, 3).write().copy_from_slice(&[max, sum, at_target]);
            }
        }
    });
}

kernel! { max_and_sum = max_and_sum_of(x: Cells<f32>) -> (f32, f32) }

#[inline(always)]
unsafe fn max_and_sum_of<S: Simd>(x: Cells<f32>) -> (f32, f32) {
    // SAFETY: nobody writes logits meanwhile.
    unsafe {
        let max = max_of::<S>(x);
        (max, sum_of_exps_of::<S>(x, max, 1.0))
    }
}

/// The largest; what is no number does not count. Several vectors at a time, for each comparison waits for the one before.
#[inline(always)]
unsafe fn max_of<S: Simd>(x: Cells<f32>) -> f32 {
    const AT_ONCE: usize = 4;
    let whole = x.len() / (AT_ONCE * S::LANES) * (AT_ONCE * S::LANES);
    let mut lanes = [f32::NEG_INFINITY; AT_ONCE * MOST_LANES];
    // SAFETY: the caller's; the loads stay inside, and there is room for the widest vectors.
    unsafe {
        let mut max = [S::splat(f32::NEG_INFINITY); AT_ONCE];
        for i in (0..whole).step_by(AT_ONCE * S::LANES) {
            for (n, max) in max.iter_mut().enumerate() {
                *max = S::max(S::load(x.ptr().add(i + n * S::LANES)), *max);
            }
        }
        for (n, max) in max.into_iter().enumerate() {
            S::store(lanes.as_mut_ptr().add(n * S::LANES), max);
        }
        let rest = &x.read()[whole..];
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
    }
}

kernel! { sum_of_exps = sum_of_exps_of(x: Cells<f32>, max: f32, by: f32) -> f32 }

/// The sum of `exp((x - max) * by)`.
#[inline(always)]
unsafe fn sum_of_exps_of<S: Simd>(x: Cells<f32>, max: f32, by: f32) -> f32 {
    let len = x.len();
    // SAFETY: the loads stay inside.
    unsafe {
        let mut sum = S::splat(0.0);
        let whole = len / S::LANES * S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            sum = S::add(sum, scaled_exp::<S>(S::load(x.ptr().add(i)), max, by));
        }
        let mut total = S::sum(sum);
        if whole < len {
            let mut rest = [0.0; MOST_LANES];
            S::store_first(
                rest.as_mut_ptr(),
                len - whole,
                scaled_exp::<S>(load::<S>(x, whole, len), max, by),
            );
            total += rest.iter().sum::<f32>();
        }
        total
    }
}

/// `exp((x - max) * by)`. No closure: called at two places it would be a call of its own, compiled for no level.
#[inline(always)]
fn scaled_exp<S: Simd>(x: S::V, max: f32, by: f32) -> S::V {
    S::exp(S::mul(S::sub(x, S::splat(max)), S::splat(by)))
}

/// The sums of `exp((x - max) / temperature)` of each row's chunks.
pub(super) fn sample_sums(
    cpu: &Cpu,
    logits: Cells<f32>,
    stats: Cells<f32>,
    temperatures: Cells<f32>,
    sums: Cells<f32>,
    vocab: usize,
) {
    let chunks = vocab.div_ceil(SAMPLE_CHUNK);
    cpu.run_ranges(temperatures.len() * chunks, 16, |level, numbers, _| {
        for number in numbers {
            let (row, first) = (number / chunks, number % chunks * SAMPLE_CHUNK);
            let chunk = logits.rows(row..row + 1, vocab).part(first..(first + SAMPLE_CHUNK).min(vocab));
            // SAFETY: this task owns this sum; the rest is only read.
            unsafe {
                let (max, temperature) = (stats.read()[3 * row], temperatures.read()[row]);
                let by = 1.0 / temperature;
                let sum =
                    if temperature < f32::MIN_POSITIVE { 0.0 } else { sum_of_exps(level, chunk, max, by) };
                sums.part(number..number + 1).write()[0] = sum;
            }
        }
    });
}

/// `log p = logit - max - ln(sum)`.
pub(super) fn log_probs(stats: Cells<f32>, log_probs: Cells<f32>) {
    // SAFETY: operations run one after the other.
    unsafe {
        for (stats, out) in stats.read().chunks_exact(3).zip(log_probs.write()) {
            *out = (stats[2] - stats[0]) - stats[1].ln();
        }
    }
}

/// In place: `coefficient * (softmax - onehot(target))`.
pub(super) fn logit_grad(
    cpu: &Cpu,
    logits: Cells<f32>,
    targets: Cells<u32>,
    stats: Cells<f32>,
    coefficients: Cells<f32>,
    vocab: usize,
    first: usize,
) {
    cpu.run_ranges(targets.len(), 1, |level, rows, _| {
        for row in rows {
            let logits = logits.rows(row..row + 1, vocab);
            // SAFETY: this task owns these rows of `logits`; the rest is only read.
            unsafe {
                let (stats, coefficient) = (stats.rows(row..row + 1, 3).read(), coefficients.read()[row]);
                softmax_times(level, logits, stats[0], coefficient / stats[1]);
                let target = (targets.read()[row] as usize).wrapping_sub(first);
                if let Some(x) = logits.write().get_mut(target) {
                    *x -= coefficient;
                }
            }
        }
    });
}

kernel! { softmax_times = softmax_times_of(x: Cells<f32>, max: f32, by: f32) }

#[inline(always)]
unsafe fn softmax_times_of<S: Simd>(x: Cells<f32>, max: f32, by: f32) {
    let len = x.len();
    for i in (0..len).step_by(S::LANES) {
        // SAFETY: `load` and `store` stay inside.
        unsafe {
            let e = S::exp(S::sub(load::<S>(x, i, len), S::splat(max)));
            store::<S>(x, i, len, S::mul(e, S::splat(by)));
        }
    }
}

/// `loss -= sum coefficients * log_probs`, in the order of rows.
pub(super) fn sum_loss(log_probs: Cells<f32>, coefficients: Cells<f32>, loss: Cells<f64>) {
    // SAFETY: operations run one after the other.
    unsafe {
        let loss = &mut loss.write()[0];
        for (&p, &c) in log_probs.read().iter().zip(coefficients.read()) {
            *loss -= f64::from(c) * f64::from(p);
        }
    }
}
