//! AdamW with moments of 8 bits: one update against a plain reference, and a whole training against moments of f32.
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{get, here, put, random};
use common::{hyper, llama, qwen, request, rows, trainer_of};
use half::bf16;
use lathe_engine::Hyper;
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Buf, Data, DataMut, Device, Element, MOMENT_BLOCK, Moments, NORM_CHUNK, Op};
use lathe_engine::plan::{ModelShape, OptimizerState, Precision, TrainMethod, TrainRequest};
use rstest::rstest;

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.99;
const EPSILON: f32 = 1e-8;
const DECAY: f32 = 0.1;
const RATE: f32 = 1e-2;

/// The values of the dynamic code, ascending, as bitsandbytes' `create_dynamic_map` makes them.
fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut map = vec![0.0, 1.0];
    for decade in 0..7 {
        let parts = 2_i32.pow(if signed { decade } else { decade + 1 });
        for part in 0..parts {
            let middle = 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
            let value = (middle * 10_f64.powi(decade as i32 - 6)) as f32;
            map.push(value);
            map.extend(signed.then_some(-value));
        }
    }
    map.sort_by(f32::total_cmp);
    assert_eq!(map.len(), 256);
    map
}

/// A parameter and its moments, plainly.
struct Reference {
    weights: Vec<f32>,
    /// Signed and unsigned.
    maps: [Vec<f32>; 2],
    codes: [Vec<u8>; 2],
    scales: [Vec<f32>; 2],
}

impl Reference {
    fn new(weights: &[f32]) -> Reference {
        let (len, blocks) = (weights.len(), weights.len().div_ceil(MOMENT_BLOCK));
        Reference {
            weights: weights.to_vec(),
            maps: [true, false].map(dynamic_map),
            codes: [vec![0; len], vec![0; len]],
            scales: [vec![0.0; blocks], vec![0.0; blocks]],
        }
    }

    fn step(&mut self, gradients: &[f32], t: i32) {
        let [mut m, mut v] = [0, 1].map(|of| -> Vec<f32> {
            let value = |(i, &code): (usize, &u8)| {
                self.maps[of][usize::from(code)] * self.scales[of][i / MOMENT_BLOCK]
            };
            self.codes[of].iter().enumerate().map(value).collect()
        });
        let [correct1, correct2] = corrections(t);
        for (i, g) in gradients.iter().enumerate() {
            m[i] = BETA1 * m[i] + (1.0 - BETA1) * g;
            v[i] = BETA2 * v[i] + (1.0 - BETA2) * g * g;
            let root = (v[i] * correct2).sqrt() + EPSILON;
            self.weights[i] = self.weights[i] * (1.0 - RATE * DECAY) - RATE * m[i] * correct1 / root;
        }
        for (of, x) in [m, v].iter().enumerate() {
            for (block, x) in x.chunks(MOMENT_BLOCK).enumerate() {
                let scale = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                self.scales[of][block] = scale;
                for (i, x) in x.iter().enumerate() {
                    let x = if scale == 0.0 { 0.0 } else { x / scale };
                    let apart = |code: &u8| (self.maps[of][usize::from(*code)] - x).abs();
                    let nearest = (0..=255).min_by(|a, b| apart(a).total_cmp(&apart(b))).unwrap();
                    let lost = of == 1 && nearest == 0 && x > 0.0;
                    self.codes[of][block * MOMENT_BLOCK + i] = if lost { 1 } else { nearest };
                }
            }
        }
    }
}

fn corrections(t: i32) -> [f32; 2] {
    [BETA1, BETA2].map(|beta| (1.0 / (1.0 - f64::from(beta).powi(t))) as f32)
}

/// A parameter on a device, in the middle of larger buffers.
struct Here {
    cpu: Cpu,
    weights: Buf,
    copy: Buf,
    gradients: Buf,
    codes: [Buf; 2],
    scales: [Buf; 2],
    settings: Buf,
    partials: Buf,
    norm: Buf,
    loss: Buf,
}

impl Here {
    fn new(mut cpu: Cpu, weights: &[f32]) -> Here {
        let len = weights.len();
        let mut new = |element, len| cpu.alloc("test", element, len).unwrap();
        let codes = [(); 2].map(|()| new(Element::U8, len + 10).part(3, len));
        let scales = [(); 2].map(|()| new(Element::F32, len + 10).part(5, len.div_ceil(MOMENT_BLOCK)));
        let copy = new(Element::BF16, len);
        let [norm, loss] = [(); 2].map(|()| new(Element::F64, 1));
        let partials = new(Element::F64, len.div_ceil(NORM_CHUNK));
        let settings = new(Element::F32, 4);
        let [weights, gradients] = [weights, &vec![0.0; len]].map(|values| put(&mut cpu, values));
        Here { cpu, weights, copy, gradients, codes, scales, settings, partials, norm, loss }
    }

    fn step(&mut self, gradients: &[f32], t: i32) {
        let Here { cpu, weights, copy, gradients: to, codes, scales, settings, partials, norm, loss } = self;
        let [correct1, correct2] = corrections(t);
        cpu.write(*settings, Data::F32(&[RATE, correct1, correct2, f32::INFINITY]));
        cpu.write(*to, Data::F32(gradients));
        cpu.enqueue(Op::SquaredNorm { gradients: *to, partials: *partials, norm: *norm });
        cpu.enqueue(Op::AdamW {
            weights: *weights,
            copy: Some(*copy),
            gradients: *to,
            moments: Moments::Int8 { codes: *codes, scales: *scales },
            settings: *settings,
            norm: *norm,
            loss: *loss,
            beta1: BETA1,
            beta2: BETA2,
            epsilon: EPSILON,
            decay: DECAY,
        });
    }

    /// Weights, scales and codes.
    fn state(&mut self) -> (Vec<f32>, [Vec<f32>; 2], [Vec<u8>; 2]) {
        let codes = self.codes.map(|buf| {
            let mut codes = vec![0; buf.len()];
            self.cpu.read(buf, DataMut::U8(&mut codes));
            codes
        });
        (get(&mut self.cpu, self.weights), self.scales.map(|buf| get(&mut self.cpu, buf)), codes)
    }
}

/// Blocks of very different sizes, one of zeros, and within a block numbers of every size.
fn gradients(key: u64, len: usize) -> Vec<f32> {
    let sized = |(i, x): (usize, f32)| match i / MOMENT_BLOCK % 5 {
        1 => 0.0,
        block => x.powi(7) * 10_f32.powi(block as i32 * 2 - 6),
    };
    random(key, len).into_iter().enumerate().map(sized).collect()
}

#[rstest]
fn an_update_is_its_formula_at_every_level(
    #[values(1, 255, 256, 257, 1000, NORM_CHUNK + 300)] len: usize,
    #[values(1, 3)] threads: usize,
) {
    let weights = random(1, len);
    let mut reference = Reference::new(&weights);
    let mut devices: Vec<Here> =
        Level::ALL.into_iter().filter_map(|level| Some(Here::new(here(threads, level)?, &weights))).collect();
    for t in 1..=4 {
        let gradients = gradients(t as u64, len);
        reference.step(&gradients, t);
        let states: Vec<_> = devices
            .iter_mut()
            .map(|device| {
                device.step(&gradients, t);
                device.state()
            })
            .collect();
        assert!(states.iter().all(|state| *state == states[0]), "levels differ");
        let (weights, scales, codes) = &states[0];
        for (ours, expected) in weights.iter().zip(&reference.weights) {
            assert!((ours - expected).abs() <= 2e-5 * RATE + 1e-6 * expected.abs(), "{ours} and {expected}");
        }
        for of in [0, 1] {
            for (ours, expected) in scales[of].iter().zip(&reference.scales[of]) {
                assert!((ours - expected).abs() <= 1e-5 * expected, "scale {ours:e} and {expected:e}");
            }
            let other =
                codes[of].iter().zip(&reference.codes[of]).filter(|(ours, expected)| ours != expected);
            // A number right in the middle between two values may fall to either.
            let other = other.map(|(ours, expected)| ours.abs_diff(*expected)).collect::<Vec<_>>();
            assert!(other.len() <= len / 1000 && other.iter().all(|by| *by == 1), "{of}: {other:?}");
        }
        let mut copy = vec![0; len];
        let from = devices[0].copy;
        devices[0].cpu.read(from, DataMut::BF16(&mut copy));
        assert!(copy.iter().zip(weights).all(|(copy, w)| *copy == bf16::from_f32(*w).to_bits()));
        // The next step begins from equal states.
        let (weights, scales, codes) = states[0].clone();
        reference = Reference { weights, scales, codes, ..reference };
    }
}

#[rstest]
fn a_gradient_that_is_no_number_changes_nothing(#[values(f32::NAN, f32::INFINITY)] bad: f32) {
    let Some(cpu) = here(1, Level::Portable) else { return };
    let mut device = Here::new(cpu, &random(1, 600));
    device.step(&gradients(2, 600), 1);
    let before = device.state();
    let mut spoilt = gradients(3, 600);
    spoilt[400] = bad;
    device.step(&spoilt, 2);
    assert_eq!(device.state(), before);
}

/// A row that is seen once, beside one that is seen always with gradients a million times as large.
#[test]
fn a_small_moment_beside_large_ones_does_not_run_away() {
    let Some(cpu) = here(1, Level::Portable) else { return };
    let mut device = Here::new(cpu, &[0.0; 64]);
    for t in 1..=20 {
        let mut gradients = [1.0; 64];
        gradients[32..].fill(if t == 1 { 1e-5 } else { 0.0 });
        device.step(&gradients, t);
    }
    let weights = device.state().0;
    assert!(weights[32..].iter().all(|w| w.abs() < weights[0].abs()), "{weights:?}");
}

/// The mean loss of the last steps of 300 over the same rows.
fn learned(shape: &ModelShape, learning_rate: f64, state: OptimizerState) -> f64 {
    let request =
        TrainRequest { optimizer_state: Some(state), ..request(&TrainMethod::Full, Precision::F32) };
    let hyper = Hyper { learning_rate, warmup_steps: 20, total_steps: 300, beta2: 0.999, ..hyper() };
    let mut trainer = trainer_of(shape, &request, hyper);
    let rows = rows(shape, &[33; 16]);
    let losses: Vec<f64> =
        (0..300).map(|step| trainer.step(&rows[step % 4 * 4..][..4]).unwrap().loss).collect();
    losses[280..].iter().sum::<f64>() / 20.0
}

#[rstest]
fn training_ends_where_it_ends_with_f32(
    #[values(llama(), qwen())] shape: ModelShape,
    #[values(1e-3, 3e-3)] learning_rate: f64,
) {
    let [full, few] =
        [OptimizerState::F32, OptimizerState::Int8].map(|state| learned(&shape, learning_rate, state));
    println!("loss with moments of f32 {full:.4}, of 8 bits {few:.4}");
    assert!((few - full).abs() < 0.1 * full, "{full} with f32, {few} with 8 bits");
}
