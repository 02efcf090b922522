//! The gradient's norm and AdamW.
#![allow(unsafe_code)] // Threads write disjoint ranges.

use half::bf16;

use super::Cpu;
use super::cells::Cells;
use super::simd::Simd;
use super::simd::kernel;
use crate::device::NORM_CHUNK;

/// `norm = sum of gradients^2`: one f64 sum per chunk, then over chunks in order.
pub(super) fn squared_norm(cpu: &Cpu, gradients: Cells<f32>, partials: Cells<f64>, norm: Cells<f64>) {
    let chunks = gradients.len().div_ceil(NORM_CHUNK);
    let partials = partials.part(0..chunks);
    cpu.run(chunks, |_, chunk, _| {
        let range = chunk * NORM_CHUNK..((chunk + 1) * NORM_CHUNK).min(gradients.len());
        // SAFETY: this task owns its partial sum; gradients are only read.
        unsafe {
            let mut lanes = [0.0f64; 8];
            for eight in gradients.part(range).read().chunks(8) {
                for (sum, &g) in lanes.iter_mut().zip(eight) {
                    *sum += f64::from(g) * f64::from(g);
                }
            }
            partials.part(chunk..chunk + 1).write()[0] = lanes.iter().sum();
        }
    });
    // SAFETY: all tasks are done.
    unsafe { norm.write()[0] = partials.read().iter().sum() };
}

/// The buffers of one flat range.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub weights: Cells<f32>,
    pub copy: Option<Cells<u16>>,
    pub gradients: Cells<f32>,
    pub moment1: Cells<f32>,
    pub moment2: Cells<f32>,
}

/// What does not change in a run.
#[derive(Clone, Copy)]
pub(super) struct Constants {
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub decay: f32,
}

/// `settings` = (learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t), largest norm). Does nothing where norm or
/// loss is not finite.
pub(super) fn adamw(
    cpu: &Cpu,
    state: State,
    settings: Cells<f32>,
    norm: Cells<f64>,
    loss: Cells<f64>,
    constants: Constants,
) {
    // SAFETY: only read while the operation runs.
    let (settings, norm, loss) = unsafe { (settings.read(), norm.read()[0].sqrt(), loss.read()[0]) };
    if !norm.is_finite() || !loss.is_finite() {
        return;
    }
    let largest = f64::from(settings[3]);
    // As torch's clip_grad_norm_: the scale never exceeds 1.
    let clip = (largest / (norm + 1e-6)).min(1.0) as f32;
    let step = Step { rate: settings[0], correct1: settings[1], correct2: settings[2], clip, constants };
    cpu.run_ranges(state.weights.len(), NORM_CHUNK, |level, range, _| {
        let part = |x: Cells<f32>| x.part(range.clone());
        let state = State {
            weights: part(state.weights),
            copy: state.copy.map(|c| c.part(range.clone())),
            gradients: part(state.gradients),
            moment1: part(state.moment1),
            moment2: part(state.moment2),
        };
        // SAFETY: this task owns its range of all buffers.
        unsafe { update(level, state, step) };
    });
}

#[derive(Clone, Copy)]
struct Step {
    rate: f32,
    correct1: f32,
    correct2: f32,
    clip: f32,
    constants: Constants,
}

kernel! { update = update_range(state: State, step: Step) }

/// Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2, in torch's order.
#[inline(always)]
unsafe fn update_range<S: Simd>(state: State, step: Step) {
    let Step { rate, correct1, correct2, clip, constants: Constants { beta1, beta2, epsilon, decay } } = step;
    // SAFETY: the caller owns the ranges.
    let (w, g, m, v) = unsafe {
        (state.weights.write(), state.gradients.read(), state.moment1.write(), state.moment2.write())
    };
    let keep = 1.0 - rate * decay;
    for i in 0..w.len() {
        let g = g[i] * clip;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * (g * g);
        let root = (v[i] * correct2).sqrt() + epsilon;
        w[i] = w[i] * keep - rate * (m[i] * correct1) / root;
    }
    if let Some(copy) = state.copy {
        // SAFETY: as above.
        let copy = unsafe { copy.write() };
        copy.iter_mut().zip(w).for_each(|(to, w)| *to = bf16::from_f32(*w).to_bits());
    }
}
