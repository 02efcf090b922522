//! The gate of the MLP.
//!
//! Both activations are `x s(z)` with the logistic function `s` of some `z(x)`, because `(1 + tanh(z / 2)) / 2 = s(z)`: so one
//! kernel has them, and no sum of nearly opposite numbers.
#![allow(unsafe_code)] // Threads write disjoint ranges.

use super::Cpu;
use super::cells::Cells;
use super::pointwise::{load, store};
use super::simd::{Simd, kernel};
use crate::device::Activation;

/// Elements per task: enough work to be worth claiming.
const GRAIN: usize = 1 << 12;

/// `out = activation(gate) * up`.
pub(super) fn forward(cpu: &Cpu, activation: Activation, gate: Cells<f32>, up: Cells<f32>, out: Cells<f32>) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    cpu.run_ranges(out.len(), GRAIN, |level, range, _| {
        let at = |x: Cells<f32>| x.part(range.clone());
        // SAFETY: each task owns its range of `out`.
        unsafe { glu(level, activation, at(gate), at(up), at(out)) };
    });
}

/// `dgate`, `dup` for the gradient `dout`: `dup = dout gate s` and `dgate = dout up s (1 + gate z' (1 - s))`.
pub(super) fn backward(
    cpu: &Cpu,
    activation: Activation,
    gate: Cells<f32>,
    up: Cells<f32>,
    dout: Cells<f32>,
    dgate: Cells<f32>,
    dup: Cells<f32>,
) {
    assert!([up.len(), dout.len(), dgate.len(), dup.len()].iter().all(|&len| len == gate.len()));
    cpu.run_ranges(gate.len(), GRAIN, |level, range, _| {
        let at = |x: Cells<f32>| x.part(range.clone());
        // SAFETY: each task owns its range of `dgate` and `dup`.
        unsafe { glu_grad(level, activation, at(gate), at(up), at(dout), at(dgate), at(dup)) };
    });
}

kernel! { glu = glu_of(activation: Activation, gate: Cells<f32>, up: Cells<f32>, out: Cells<f32>) }

#[inline(always)]
unsafe fn glu_of<S: Simd>(activation: Activation, gate: Cells<f32>, up: Cells<f32>, out: Cells<f32>) {
    let len = out.len();
    for i in (0..len).step_by(S::LANES) {
        // SAFETY: all three are `len` long; `load` and `store` stay inside.
        unsafe {
            store::<S>(out, i, len, gated::<S>(activation, load::<S>(gate, i, len), load::<S>(up, i, len)));
        }
    }
}

/// `activation(gate) * up`.
#[inline(always)]
pub(super) fn gated<S: Simd>(activation: Activation, gate: S::V, up: S::V) -> S::V {
    let s = logistic::<S>(inner::<S>(activation, gate).0);
    S::mul(S::mul(gate, s), up)
}

kernel! {
    glu_grad = glu_grad_of(
        activation: Activation,
        gate: Cells<f32>,
        up: Cells<f32>,
        dout: Cells<f32>,
        dgate: Cells<f32>,
        dup: Cells<f32>,
    )
}

#[inline(always)]
unsafe fn glu_grad_of<S: Simd>(
    activation: Activation,
    gate: Cells<f32>,
    up: Cells<f32>,
    dout: Cells<f32>,
    dgate: Cells<f32>,
    dup: Cells<f32>,
) {
    let len = gate.len();
    let one = S::splat(1.0);
    for i in (0..len).step_by(S::LANES) {
        // SAFETY: all five are `len` long; `load` and `store` stay inside.
        unsafe {
            let (g, u, d) = (load::<S>(gate, i, len), load::<S>(up, i, len), load::<S>(dout, i, len));
            let (z, growth) = inner::<S>(activation, g);
            let s = logistic::<S>(z);
            let slope = S::mul(s, S::fma(growth, S::sub(one, s), one));
            store::<S>(dgate, i, len, S::mul(S::mul(d, u), slope));
            store::<S>(dup, i, len, S::mul(d, S::mul(g, s)));
        }
    }
}

/// `2 sqrt(2 / pi)`.
const GELU: f32 = 1.595_769;
const GELU_CUBE: f32 = 0.044_715;
/// Beyond it GELU is 0 or `x`, and a cube stays finite.
const GELU_END: f32 = 16.0;

/// `z(x)` and `x z'(x)`.
#[inline(always)]
fn inner<S: Simd>(activation: Activation, x: S::V) -> (S::V, S::V) {
    match activation {
        Activation::Silu => (x, x),
        Activation::GeluTanh => {
            let x = S::min(S::max(x, S::splat(-GELU_END)), S::splat(GELU_END));
            let (square, by) = (S::mul(x, x), S::mul(x, S::splat(GELU)));
            let plus = |cube| S::mul(by, S::fma(square, S::splat(cube), S::splat(1.0)));
            (plus(GELU_CUBE), plus(3.0 * GELU_CUBE))
        }
    }
}

#[inline(always)]
fn logistic<S: Simd>(x: S::V) -> S::V {
    let one = S::splat(1.0);
    S::div(one, S::add(one, S::exp(S::sub(S::splat(0.0), x))))
}
