//! Every operation of the backward pass against finite differences of its forward formula in f64, at widths that are no
//! multiple of a vector. (LoRA has no operation of its own there: `gradients.rs` has its differences, and the whole
//! decoder's.)
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{get, here, numbers, put, random};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Activation, Attention, Buf, Data, Device, Element, Op};
use rstest::rstest;

const ROWS: usize = 7;
const WIDTH: usize = 21;
const OUTPUTS: usize = 19;

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// The gradient of `sum(dout * forward(x))` by central differences.
fn differences(x: &[f32], dout: &[f32], forward: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let (mut x, step) = (f64s(x), 1e-5);
    let sum = |x: &[f64]| -> f64 {
        let y = forward(x);
        assert_eq!(y.len(), dout.len());
        y.iter().zip(dout).map(|(y, &d)| y * f64::from(d)).sum()
    };
    (0..x.len())
        .map(|i| {
            let here = x[i];
            x[i] = here + step;
            let above = sum(&x);
            x[i] = here - step;
            let below = sum(&x);
            x[i] = here;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// By how much of its norm `found` may differ from the differences.
const ALLOWED: f64 = 3e-6;

fn same(what: &str, found: &[f32], expected: &[f64]) {
    within(ALLOWED, what, found, expected);
}

fn within(allowed: f64, what: &str, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm: f64 = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let off: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
    assert!(norm > 0.1 && off < allowed * norm, "{what}: {off:.1e} of {norm:.1e} apart");
}

fn plus(start: &[f32], gradient: Vec<f64>) -> Vec<f64> {
    gradient.into_iter().zip(start).map(|(g, &s)| g + f64::from(s)).collect()
}

fn product(x: &[f64], w: &[f64], bias: &[f64]) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        w.chunks(WIDTH).zip(bias).map(|(w, b)| b + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
    };
    x.chunks(WIDTH).flat_map(row).collect()
}

#[rstest]
fn of_a_linear_layer(
    #[values(Level::AmxEmulated, Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)]
    level: Level,
) {
    let Some(mut cpu) = here(2, level) else { return };
    let (rows, outputs, inputs) = (ROWS, OUTPUTS, WIDTH);
    // What bf16 keeps, so that one formula is both weights'.
    let w: Vec<f32> =
        random(1, outputs * inputs).iter().map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)).collect();
    let (x, bias, dout) = (random(2, rows * inputs), random(3, outputs), random(4, rows * outputs));
    let (x64, w64, bias64) = (f64s(&x), f64s(&w), f64s(&bias));
    let [x_buf, dy] = [&x, &dout].map(|v| put(&mut cpu, v));

    let dx64 = differences(&x, &dout, |x| product(x, &w64, &bias64));
    let wide = put(&mut cpu, &w);
    let narrow = cpu.alloc("test", Element::BF16, w.len()).unwrap();
    cpu.write(narrow, Data::BF16(&w.iter().map(|x| (x.to_bits() >> 16) as u16).collect::<Vec<u16>>()));
    for w in [wide, narrow] {
        // There what meets a bf16 weight is rounded to bf16.
        let rounded = level.rounds_to_bf16() && w == narrow;
        let allowed = if rounded { 1.0 / 256.0 } else { ALLOWED };
        let start = random(5, x.len());
        let dx = put(&mut cpu, &start);
        cpu.enqueue(Op::LinearInputGrad { dy, w, dx, rows, outputs, inputs, keep: true });
        within(allowed, "dx, added", &get(&mut cpu, dx), &plus(&start, dx64.clone()));
        cpu.enqueue(Op::LinearInputGrad { dy, w, dx, rows, outputs, inputs, keep: false });
        within(allowed, "dx", &get(&mut cpu, dx), &dx64);
    }

    let start = random(6, w.len());
    let dw = put(&mut cpu, &start);
    cpu.enqueue(Op::LinearWeightGrad { x: x_buf, dy, dw, rows, outputs, inputs, positions: None });
    let expected = plus(&start, differences(&w, &dout, |w| product(&x64, w, &bias64)));
    same("dw", &get(&mut cpu, dw), &expected);

    let start = random(7, outputs);
    let sum = put(&mut cpu, &start);
    cpu.enqueue(Op::ColumnSum { x: dy, sum, rows, width: outputs });
    let expected = plus(&start, differences(&bias, &dout, |bias| product(&x64, &w64, bias)));
    same("dbias", &get(&mut cpu, sum), &expected);
}

#[rstest]
fn of_the_norm(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)] level: Level,
) {
    let Some(mut cpu) = here(2, level) else { return };
    let (rows, width, eps) = (ROWS, WIDTH, 1e-3f32);
    let (x, w, dout) = (random(1, rows * width), random(2, width), random(3, rows * width));
    let norm = |x: &[f64], w: &[f64]| -> Vec<f64> {
        let row = |x: &[f64]| -> Vec<f64> {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / width as f64;
            x.iter().zip(w).map(|(x, w)| x * w / (mean + f64::from(eps)).sqrt()).collect()
        };
        x.chunks(width).flat_map(row).collect()
    };
    let (dx_start, dw_start) = (random(4, x.len()), random(5, width));
    let [x_buf, weight, d, dx, dweight] = [&x, &w, &dout, &dx_start, &dw_start].map(|v| put(&mut cpu, v));
    let (out, inv) = (put(&mut cpu, &vec![9.0; x.len()]), put(&mut cpu, &[9.0; ROWS]));
    cpu.enqueue(Op::RmsNorm { x: x_buf, weight, out, inv, rows, width, eps });
    cpu.enqueue(Op::RmsNormGrad { x: x_buf, weight, inv, dout: d, dx, dweight: Some(dweight), rows, width });
    let (x64, w64) = (f64s(&x), f64s(&w));
    same("dx", &get(&mut cpu, dx), &plus(&dx_start, differences(&x, &dout, |x| norm(x, &w64))));
    same("dweight", &get(&mut cpu, dweight), &plus(&dw_start, differences(&w, &dout, |w| norm(&x64, w))));
}

#[rstest]
fn of_the_gate(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)] level: Level,
    #[values(Activation::Silu, Activation::GeluTanh)] activation: Activation,
) {
    let Some(mut cpu) = here(2, level) else { return };
    let len = ROWS * WIDTH;
    let gate: Vec<f32> = random(1, len).iter().map(|x| 6.0 * x).collect();
    let (up, dout) = (random(2, len), random(3, len));
    let activated = |g: f64| match activation {
        Activation::Silu => g / (1.0 + (-g).exp()),
        Activation::GeluTanh => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            0.5 * g * (1.0 + z.tanh())
        }
    };
    let glu = |gate: &[f64], up: &[f64]| -> Vec<f64> {
        gate.iter().zip(up).map(|(&g, u)| activated(g) * u).collect()
    };
    let [g, u, d] = [&gate, &up, &dout].map(|v| put(&mut cpu, v));
    let [dgate, dup] = [(); 2].map(|()| put(&mut cpu, &vec![9.0; len]));
    let out = put(&mut cpu, &vec![9.0; len]);
    cpu.enqueue(Op::Glu { activation, gate: g, up: u, out });
    cpu.enqueue(Op::GluGrad { activation, gate: g, up: u, dout: d, dgate, dup });
    let (gate64, up64) = (f64s(&gate), f64s(&up));
    same("out", &get(&mut cpu, out), &glu(&gate64, &up64));
    same("dgate", &get(&mut cpu, dgate), &differences(&gate, &dout, |gate| glu(gate, &up64)));
    same("dup", &get(&mut cpu, dup), &differences(&up, &dout, |up| glu(&gate64, up)));
}

#[rstest]
fn of_the_rotation(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)] level: Level,
) {
    let Some(mut cpu) = here(2, level) else { return };
    let (heads, head_dim, half) = (3, 10, 5);
    let x = random(1, ROWS * heads * head_dim);
    let dout = random(2, x.len());
    let positions = [0u32, 1, 2, 0, 1, 5, 6];
    let angle = |position: u32, j: usize| f64::from(position) * 0.3f64.powi(j as i32);
    let table: Vec<f32> = (0..7u32)
        .flat_map(|p| {
            let angles = (0..half).map(move |j| angle(p, j));
            angles.clone().map(f64::cos).chain(angles.map(f64::sin)).map(|x| x as f32).collect::<Vec<f32>>()
        })
        .collect();
    let turned = |x: &[f64]| -> Vec<f64> {
        let mut y = x.to_vec();
        for (row, y) in y.chunks_mut(heads * head_dim).enumerate() {
            for head in y.chunks_mut(head_dim) {
                for j in 0..half {
                    let (sin, cos) = angle(positions[row], j).sin_cos();
                    let (a, b) = (head[j], head[j + half]);
                    (head[j], head[j + half]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
        y
    };
    let (d, table) = (put(&mut cpu, &dout), put(&mut cpu, &table));
    let positions = numbers(&mut cpu, &positions);
    cpu.enqueue(Op::Rope { x: d, table, positions, rows: ROWS, heads, head_dim, back: true });
    same("dx", &get(&mut cpu, d), &differences(&x, &dout, turned));
}

#[rstest]
fn of_attention(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)] level: Level,
    #[values((None, None), (Some(2.0), None), (None, Some(5)), (Some(2.0), Some(5)))] kind: (
        Option<f32>,
        Option<usize>,
    ),
) {
    let (scale, (soft_cap, window)) = (0.5f32, kind);
    let Some(mut cpu) = here(2, level) else { return };
    let (heads, kv_heads, dim, starts) = (4usize, 2usize, 6usize, [0usize, 19, 26]);
    let rows = 26;
    let (q, k) = (random(1, rows * heads * dim), random(2, rows * kv_heads * dim));
    let q: Vec<f32> = q.iter().map(|x| 3.0 * x).collect();
    let (v, dout) = (random(3, rows * kv_heads * dim), random(4, rows * heads * dim));
    let attend = |q: &[f64], k: &[f64], v: &[f64]| -> Vec<f64> {
        let mut out = Vec::with_capacity(q.len());
        for sequence in starts.windows(2) {
            for row in sequence[0]..sequence[1] {
                for head in 0..heads {
                    let q = &q[(row * heads + head) * dim..][..dim];
                    let kv = |key: usize| (key * kv_heads + head / (heads / kv_heads)) * dim;
                    let score = |key| {
                        let s = f64::from(scale) * (0..dim).map(|i| q[i] * k[kv(key) + i]).sum::<f64>();
                        soft_cap.map(f64::from).map_or(s, |cap| cap * (s / cap).tanh())
                    };
                    let first = window.map_or(0, |window| (row + 1).saturating_sub(window)).max(sequence[0]);
                    let weights: Vec<f64> = (first..=row).map(|key| f64::exp(score(key))).collect();
                    let sum: f64 = weights.iter().sum();
                    out.extend((0..dim).map(|i| {
                        (first..=row).zip(&weights).map(|(key, w)| w * v[kv(key) + i]).sum::<f64>() / sum
                    }));
                }
            }
        }
        out
    };
    let [q_buf, k_buf, v_buf, d] = [&q, &k, &v, &dout].map(|x| put(&mut cpu, x));
    let [out, dq] = [(); 2].map(|()| put(&mut cpu, &vec![9.0; q.len()]));
    let [dk, dv] = [(); 2].map(|()| put(&mut cpu, &vec![9.0; k.len()]));
    let forward = Attention {
        q: q_buf,
        k: k_buf,
        v: v_buf,
        out,
        lse: Some(put(&mut cpu, &vec![9.0; rows * heads])),
        starts: numbers(&mut cpu, &starts.map(|s| s as u32)),
        positions: numbers(&mut cpu, &(0..19).chain(0..7).collect::<Vec<u32>>()),
        tables: numbers(&mut cpu, &[0, 16, 19]),
        table_starts: numbers(&mut cpu, &[0, 2]),
        sequences: 2,
        rows,
        heads,
        kv_heads,
        head_dim: dim,
        scale,
        soft_cap,
        window,
        bf16: false,
    };
    cpu.enqueue(Op::Attention(forward));
    cpu.enqueue(Op::AttentionGrad { forward, dout: d, dq, dk, dv });
    let (q64, k64, v64) = (f64s(&q), f64s(&k), f64s(&v));
    same("dq", &get(&mut cpu, dq), &differences(&q, &dout, |q| attend(q, &k64, &v64)));
    same("dk", &get(&mut cpu, dk), &differences(&k, &dout, |k| attend(&q64, k, &v64)));
    same("dv", &get(&mut cpu, dv), &differences(&v, &dout, |v| attend(&q64, &k64, v)));
}

#[rstest]
fn of_the_loss(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)] level: Level,
) {
    let Some(mut cpu) = here(2, level) else { return };
    let (rows, vocab) = (ROWS, WIDTH);
    let logits: Vec<f32> = random(1, rows * vocab).iter().map(|x| 5.0 * x).collect();
    let chosen = [3u32, 0, 20, 7, 7, 12, 16];
    let coefficients = [0.2f32, 1.0, 0.0, 0.5, 2.0, 0.7, 1.5];
    let log_probs = |logits: &[f64]| -> Vec<f64> {
        let row =
            |(x, &target): (&[f64], &u32)| x[target as usize] - x.iter().map(|x| x.exp()).sum::<f64>().ln();
        logits.chunks(vocab).zip(&chosen).map(row).collect()
    };
    let buf = put(&mut cpu, &logits);
    let targets = numbers(&mut cpu, &chosen);
    let minus: Vec<f32> = coefficients.iter().map(|c| -c).collect();
    let (stats, coefficients) = (put(&mut cpu, &[9.0; 3 * ROWS]), put(&mut cpu, &coefficients));
    cpu.enqueue(Op::LogitStats { logits: buf, targets, stats, rows, vocab, first: 0 });
    cpu.enqueue(Op::LogitGrad { logits: buf, targets, stats, coefficients, rows, vocab, first: 0 });
    same("dlogits", &get(&mut cpu, buf), &differences(&logits, &minus, log_probs));
}

/// What only moves or masks rows: the gradient is the operation the other way.
#[rstest]
fn of_rows_that_are_moved_or_masked(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)] level: Level,
) {
    let Some(mut cpu) = here(2, level) else { return };
    let (rows, width, vocab) = (ROWS, WIDTH, 9);
    let dout = random(2, rows * width);
    let d = put(&mut cpu, &dout);
    let pick = |from: &[f64], which: &[u32]| -> Vec<f64> {
        which.iter().flat_map(|&row| from[row as usize * width..][..width].to_vec()).collect()
    };

    let ids = [4u32, 0, 8, 4, 4, 1, 0];
    let table = random(1, vocab * width);
    let start = random(3, table.len());
    let (tokens, dtable) = (numbers(&mut cpu, &ids), put(&mut cpu, &start));
    cpu.enqueue(Op::EmbedGrad { d, tokens, dtable, rows, vocab, width });
    let expected = plus(&start, differences(&table, &dout, |table| pick(table, &ids)));
    same("dtable", &get(&mut cpu, dtable), &expected);

    let which = [8u32, 2, 5, 0, 7, 1, 4];
    let (chosen, dx) = (numbers(&mut cpu, &which), put(&mut cpu, &vec![0.0; vocab * width]));
    cpu.enqueue(Op::Scatter { from: d, rows: chosen, x: dx, count: rows, width });
    same("dx of gathered rows", &get(&mut cpu, dx), &differences(&table, &dout, |x| pick(x, &which)));

    // The mask is what the operation makes of ones.
    let seeds = cpu.alloc("test", Element::U64, 2).unwrap();
    cpu.write(seeds, Data::U64(&[5, 6]));
    let starts = numbers(&mut cpu, &[0, 3, ROWS as u32]);
    let positions = numbers(&mut cpu, &[0, 1, 2, 0, 1, 2, 3]);
    let dropout = |cpu: &mut Cpu, x: Buf, y: Buf, keep: bool| {
        let (sequences, salt, rate) = (2, 3, 0.4);
        cpu.enqueue(Op::Dropout { x, y, seeds, starts, positions, sequences, width, salt, rate, keep });
    };
    let (ones, y) = (put(&mut cpu, &vec![1.0; dout.len()]), put(&mut cpu, &vec![0.0; dout.len()]));
    dropout(&mut cpu, ones, y, false);
    let mask = f64s(&get(&mut cpu, y));
    let (x, start) = (random(4, dout.len()), random(5, dout.len()));
    let dx = put(&mut cpu, &start);
    dropout(&mut cpu, d, dx, true);
    let forward = |x: &[f64]| x.iter().zip(&mask).map(|(x, m)| x * m).collect();
    same("dx of dropout", &get(&mut cpu, dx), &plus(&start, differences(&x, &dout, forward)));
}
