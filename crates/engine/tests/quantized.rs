//! Weights of 8 and 4 bits against their formulas in f64.
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{cpu, get, here, numbers, put, random};
use common::noise;
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Buf, Device, Element, Op, Start};
use lathe_engine::plan::QUANT_GROUP;
use rstest::rstest;

fn quantized(cpu: &mut Cpu, element: Element, weights: &[f32], [outputs, inputs]: [usize; 2]) -> Buf {
    let from = put(cpu, weights);
    let to = cpu.alloc("test", element, element.quantized_bytes(outputs, inputs).unwrap()).unwrap();
    // In two pieces, as a large file comes.
    let half = outputs / 2;
    for (first, rows) in [(0, half), (half, outputs - half)] {
        let from = from.part(first * inputs, rows * inputs);
        cpu.enqueue(Op::Quantize { from, to, first, rows, outputs, inputs });
    }
    to
}

/// What is looked up is what products take.
fn widened(cpu: &mut Cpu, table: Buf, [rows, width]: [usize; 2]) -> Vec<f32> {
    let tokens = numbers(cpu, &(0..rows as u32).collect::<Vec<_>>());
    let out = put(cpu, &vec![0.0; rows * width]);
    cpu.enqueue(Op::Embed { table, tokens, out, rows, vocab: rows, width });
    get(cpu, out)
}

/// `x` rounded to 8 bits in groups of a row.
fn rounded(x: &[f32], inputs: usize) -> Vec<f64> {
    let group = |x: &[f32]| {
        let scale = x.iter().fold(0.0_f32, |a, b| a.max(b.abs())) / 127.0;
        x.iter()
            .map(|x| (f64::from(*x) / f64::from(scale)).round_ties_even() * f64::from(scale))
            .collect::<Vec<_>>()
    };
    x.chunks(inputs).flat_map(|row| row.chunks(QUANT_GROUP).flat_map(group).collect::<Vec<_>>()).collect()
}

#[rstest]
fn products_are_their_formulas(
    #[values((1, 40, 7), (1, 130, 300), (3, 33, 128), (5, 17, 1), (6, 31, 17), (13, 48, 640), (131, 22, 50), (4, 5, 5000), (100, 35, 2700))]
    extent: (usize, usize, usize),
    #[values(Element::Int8, Element::Int4)] element: Element,
    #[values(Level::AmxEmulated, Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)]
    level: Level,
    #[values(1, 3)] threads: usize,
) {
    let Some(mut cpu) = here(threads, level) else { return };
    let (rows, outputs, inputs) = extent;
    let (x, dy) = (random(1, rows * inputs), random(2, rows * outputs));
    let w = quantized(&mut cpu, element, &random(3, outputs * inputs), [outputs, inputs]);
    let weights = widened(&mut cpu, w, [outputs, inputs]);
    let bias = random(4, outputs);
    let (x_buf, dy_buf, bias_buf) = (put(&mut cpu, &x), put(&mut cpu, &dy), put(&mut cpu, &bias));
    let y = put(&mut cpu, &vec![9.0; rows * outputs]);
    let start = Start::Bias(bias_buf);
    cpu.enqueue(Op::Linear { x: x_buf, w, y, rows, outputs, inputs, start });
    let found = get(&mut cpu, y);
    let taken = rounded(&x, inputs);
    for (i, found) in found.iter().enumerate() {
        let (r, o) = (i / outputs, i % outputs);
        let product = |k| taken[r * inputs + k] * f64::from(weights[o * inputs + k]);
        let expected = f64::from(bias[o]) + (0..inputs).map(product).sum::<f64>();
        assert!(
            (f64::from(*found) - expected).abs() < 4e-6 * (inputs as f64).sqrt() + 1e-6,
            "{found} instead of {expected}"
        );
    }
    // One row alone has the bits that it has among others.
    let last = rows - 1;
    let (alone, there) = (x_buf.part(last * inputs, inputs), y.part(last * outputs, outputs));
    cpu.enqueue(Op::Linear { x: alone, w, y: there, rows: 1, outputs, inputs, start });
    assert_eq!(get(&mut cpu, there), found[last * outputs..]);

    let dx = put(&mut cpu, &vec![9.0; rows * inputs]);
    cpu.enqueue(Op::LinearInputGrad { dy: dy_buf, w, dx, rows, outputs, inputs, keep: false });
    for (i, found) in get(&mut cpu, dx).iter().enumerate() {
        let (r, k) = (i / inputs, i % inputs);
        let product = |o| f64::from(dy[r * outputs + o]) * f64::from(weights[o * inputs + k]);
        let expected = (0..outputs).map(product).sum::<f64>();
        assert!((f64::from(*found) - expected).abs() < 1e-6 * (outputs as f64).sqrt() + 1e-6);
    }
}

#[rstest]
fn eight_bits_are_within_half_a_step(#[values(1, 100, 128, 300)] inputs: usize) {
    let mut cpu = cpu(2, Level::Portable);
    let weights = random(5, 6 * inputs);
    let table = quantized(&mut cpu, Element::Int8, &weights, [6, inputs]);
    let found = widened(&mut cpu, table, [6, inputs]);
    for (weights, found) in weights.chunks(inputs).zip(found.chunks(inputs)) {
        for (weights, found) in weights.chunks(QUANT_GROUP).zip(found.chunks(QUANT_GROUP)) {
            let step = weights.iter().fold(0.0_f32, |a, b| a.max(b.abs())) / 127.0;
            for (w, found) in weights.iter().zip(found) {
                assert!((w - found).abs() <= 0.5001 * step, "{found} instead of {w} in steps of {step}");
            }
        }
    }
}

/// The plain way: the largest number becomes 7 or -7.
fn plain_error(weights: &[f32]) -> f64 {
    let scale = weights.iter().fold(0.0_f32, |a, b| a.max(b.abs())) / 7.0;
    weights.iter().map(|w| f64::from(w - (w / scale).round() * scale).powi(2)).sum()
}

#[test]
fn four_bits_are_better_than_the_plain_way() {
    let mut cpu = cpu(2, Level::detect().unwrap());
    // Near a normal distribution, as weights are.
    let weights: Vec<f32> = (0..64 * 512).map(|i| (0..6).map(|j| noise(j, i as u64) as f32).sum()).collect();
    let table = quantized(&mut cpu, Element::Int4, &weights, [64, 512]);
    let found = widened(&mut cpu, table, [64, 512]);
    let error: f64 = weights.iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let plain: f64 = weights.chunks(QUANT_GROUP).map(plain_error).sum();
    assert!(error < 0.85 * plain, "{error} against {plain}");
}

#[rstest]
fn what_is_no_number_stays_none(#[values(Element::Int8, Element::Int4)] element: Element) {
    let mut cpu = cpu(1, Level::detect().unwrap());
    let mut weights = random(1, 2 * 200);
    weights[3] = f32::NAN;
    let w = quantized(&mut cpu, element, &weights, [2, 200]);
    let mut rows = random(2, 2 * 200);
    rows[250] = f32::INFINITY;
    let x = put(&mut cpu, &rows);
    let y = put(&mut cpu, &[0.0; 4]);
    cpu.enqueue(Op::Linear { x, w, y, rows: 2, outputs: 2, inputs: 200, start: Start::Zero });
    let found = get(&mut cpu, y);
    assert!(
        found[0].is_nan() && found[1].is_finite() && !found[2].is_finite() && !found[3].is_finite(),
        "{found:?}"
    );
}
