//! The gradient's norm and AdamW.
#![allow(unsafe_code)] // Threads write disjoint ranges.

use half::bf16;

use std::ops::Range;

use super::cells::Cells;
use super::dynamic::{SIGNED, UNSIGNED};
use super::simd::Simd;
use super::simd::kernel;
use super::{Cpu, Element};
use crate::device::{self, MOMENT_BLOCK, NORM_CHUNK};

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

/// The buffers of one parameter, or of a part of it that begins with a block.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub weights: Cells<f32>,
    pub copy: Option<Cells<u16>>,
    pub gradients: Cells<f32>,
    pub moments: Moments,
}

/// See [`device::Moments`].
#[derive(Clone, Copy)]
pub(super) enum Moments {
    F32([Cells<f32>; 2]),
    Int8 { codes: [Cells<u8>; 2], scales: [Cells<f32>; 2] },
}

impl Moments {
    pub(super) fn of(cpu: &Cpu, moments: device::Moments) -> Moments {
        match moments {
            device::Moments::F32(both) => Moments::F32(both.map(|moment| cpu.f32(moment))),
            device::Moments::Int8 { codes, scales } => Moments::Int8 {
                codes: codes.map(|codes| cpu.cells(codes, Element::U8)),
                scales: scales.map(|scales| cpu.f32(scales)),
            },
        }
    }

    fn part(self, range: Range<usize>) -> Moments {
        match self {
            Moments::F32(both) => Moments::F32(both.map(|moment| moment.part(range.clone()))),
            Moments::Int8 { codes, scales } => {
                let blocks = range.start / MOMENT_BLOCK..range.end.div_ceil(MOMENT_BLOCK);
                Moments::Int8 {
                    codes: codes.map(|codes| codes.part(range.clone())),
                    scales: scales.map(|scales| scales.part(blocks.clone())),
                }
            }
        }
    }
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
        let state = State {
            weights: state.weights.part(range.clone()),
            copy: state.copy.map(|c| c.part(range.clone())),
            gradients: state.gradients.part(range.clone()),
            moments: state.moments.part(range),
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

#[inline(always)]
unsafe fn update_range<S: Simd>(state: State, step: Step) {
    // SAFETY: the caller owns the ranges.
    let (w, g) = unsafe { (state.weights.write(), state.gradients.read()) };
    match state.moments {
        // SAFETY: as above.
        Moments::F32([m, v]) => step.apply(w, g, unsafe { m.write() }, unsafe { v.write() }),
        Moments::Int8 { codes: [m_codes, v_codes], scales: [m_scales, v_scales] } => {
            // SAFETY: as above.
            let (m_codes, v_codes) = unsafe { (m_codes.write(), v_codes.write()) };
            // SAFETY: as above.
            let (m_scales, v_scales) = unsafe { (m_scales.write(), v_scales.write()) };
            let w_and_g = w.chunks_mut(MOMENT_BLOCK).zip(g.chunks(MOMENT_BLOCK));
            let codes = m_codes.chunks_mut(MOMENT_BLOCK).zip(v_codes.chunks_mut(MOMENT_BLOCK));
            let scales = m_scales.iter_mut().zip(v_scales);
            for (((w, g), (m_codes, v_codes)), (m_scale, v_scale)) in w_and_g.zip(codes).zip(scales) {
                let (mut m, mut v) = ([0.0; MOMENT_BLOCK], [0.0; MOMENT_BLOCK]);
                let (m, v) = (&mut m[..w.len()], &mut v[..w.len()]);
                SIGNED.decode(m_codes, *m_scale, m);
                UNSIGNED.decode(v_codes, *v_scale, v);
                step.apply(w, g, m, v);
                *m_scale = SIGNED.encode(m, m_codes);
                *v_scale = UNSIGNED.encode(v, v_codes);
            }
        }
    }
    if let Some(copy) = state.copy {
        // SAFETY: as above.
        let (copy, w) = unsafe { (copy.write(), state.weights.read()) };
        copy.iter_mut().zip(w).for_each(|(to, w)| *to = bf16::from_f32(*w).to_bits());
    }
}

impl Step {
    /// Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2, in torch's order.
    #[inline(always)]
    fn apply(self, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let Step { rate, correct1, correct2, clip, constants } = self;
        let Constants { beta1, beta2, epsilon, decay } = constants;
        let keep = 1.0 - rate * decay;
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * clip;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * (g * g);
            let root = (*v * correct2).sqrt() + epsilon;
            *w = *w * keep - rate * (*m * correct1) / root;
        }
    }
}
