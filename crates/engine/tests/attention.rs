//! Attention against its formula in f64, over more keys than one chunk of its softmax has, and its bits however the rows
//! are cut.
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{get, here, numbers, put, random};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Attention, Buf, Device, Op};
use rstest::rstest;

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const GROUP: usize = HEADS / KV_HEADS;
const PAGE: usize = 16;

fn on_tiles(level: Level) -> bool {
    matches!(level, Level::Amx | Level::AmxEmulated)
}

/// Rounded to bf16, towards zero.
fn short(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0xffff_0000)
}

/// How scores become weights: scale, soft cap and window.
type Kind = (f32, Option<f32>, Option<usize>);

/// Softmax of one query over the keys `0..=position`, in f64: 0 for what is outside of the window. Also each score's
/// derivative by the product of query and key.
fn weights(
    q: &[f32],
    keys: &dyn Fn(usize) -> Vec<f32>,
    position: usize,
    (scale, soft_cap, window): Kind,
) -> (Vec<f64>, Vec<f64>) {
    let score = |p: usize| -> (f64, f64) {
        let sum: f64 = q.iter().zip(keys(p)).map(|(a, b)| f64::from(*a) * f64::from(b)).sum();
        let (s, slope) = (f64::from(scale) * sum, f64::from(scale));
        match soft_cap.map(f64::from) {
            _ if window.is_some_and(|window| p + window <= position) => (f64::NEG_INFINITY, 0.0),
            None => (s, slope),
            Some(cap) => (cap * (s / cap).tanh(), slope / (s / cap).cosh().powi(2)),
        }
    };
    let (scores, slopes): (Vec<f64>, Vec<f64>) = (0..=position).map(score).unzip();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    (scores.iter().map(|s| (s - max).exp() / sum).collect(), slopes)
}

#[rstest]
fn a_paged_cache_is_read_as_the_formula_says(
    #[values(
        (Level::Portable, false),
        (Level::Avx2, false),
        (Level::Avx512, false),
        (Level::Avx512Bf16, true),
        (Level::Amx, false),
        (Level::Amx, true),
        (Level::AmxEmulated, true)
    )]
    at: (Level, bool),
    #[values(8, 20, 64)] dim: usize,
    #[values((None, None), (Some(5.0), None), (None, Some(1)), (None, Some(70)), (Some(5.0), Some(300)))]
    kind: (Option<f32>, Option<usize>),
) {
    let ((level, bf16), (soft_cap, window)) = (at, kind);
    let rounds = bf16 && on_tiles(level);
    // What tiles round is bf16 already, so that only weights are rounded.
    let scale = if rounds { 0.25 } else { 1.0 / (dim as f32).sqrt() };
    let random =
        |key, len| if rounds { random(key, len).into_iter().map(short).collect() } else { random(key, len) };
    let Some(mut cpu) = here(3, level) else { return };
    // Sequences of 530 and 40 positions; the batch has the last 60 of the first and all of the second.
    let (counts, news) = ([530usize, 40], [60usize, 40]);
    let pages: Vec<Vec<u32>> = vec![
        // Some pages follow each other, most do not.
        (0..34u32).map(|p| if p < 4 { 40 + p } else { (p * 7) % 34 } * PAGE as u32).collect(),
        (0..3u32).map(|p| (34 + 2 * p) * PAGE as u32).collect(),
    ];
    let slots = 44 * PAGE;
    let (k, v) = (random(1, slots * KV_HEADS * dim), random(2, slots * KV_HEADS * dim));
    let k: Vec<f32> = k.into_iter().map(|x| 4.0 * x).collect();
    let rows: usize = news.iter().sum();
    let q = random(3, rows * HEADS * dim);
    let positions: Vec<u32> =
        (0..2).flat_map(|s| (counts[s] - news[s]..counts[s]).map(|p| p as u32)).collect();
    let (k_buf, v_buf, q_buf) = (put(&mut cpu, &k), put(&mut cpu, &v), put(&mut cpu, &q));
    let out = put(&mut cpu, &vec![9.0; q.len()]);
    let lse = put(&mut cpu, &vec![9.0; rows * HEADS]);
    let tables: Vec<u32> = pages.concat();
    let whole = Attention {
        q: q_buf,
        k: k_buf,
        v: v_buf,
        out,
        lse: Some(lse),
        starts: numbers(&mut cpu, &[0, 60, 100]),
        positions: numbers(&mut cpu, &positions),
        tables: numbers(&mut cpu, &tables),
        table_starts: numbers(&mut cpu, &[0, 34]),
        sequences: 2,
        rows,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: dim,
        scale,
        soft_cap,
        window,
        bf16,
    };
    cpu.enqueue(Op::Attention(whole));
    let found = get(&mut cpu, out);
    for row in (0..rows).step_by(7).chain([rows - 1]) {
        let sequence = usize::from(row >= 60);
        for head in 0..HEADS {
            let at = |x: &[f32], p: usize| {
                let slot = pages[sequence][p / PAGE] as usize + p % PAGE;
                let start = (slot * KV_HEADS + head / GROUP) * dim;
                x[start..start + dim].to_vec()
            };
            let query = &q[(row * HEADS + head) * dim..][..dim];
            let position = positions[row] as usize;
            let (weights, _) = weights(query, &|p| at(&k, p), position, (scale, soft_cap, window));
            for i in 0..dim {
                let expected: f64 =
                    weights.iter().enumerate().map(|(p, w)| w * f64::from(at(&v, p)[i])).sum();
                let found = f64::from(found[(row * HEADS + head) * dim + i]);
                let rounded = |(p, w): (usize, &f64)| w * f64::from(at(&v, p)[i].abs()) / 256.0;
                let rounding: f64 = if rounds { weights.iter().enumerate().map(rounded).sum() } else { 0.0 };
                assert!(
                    (found - expected).abs() < 2e-5 + rounding,
                    "row {row} head {head} {i}: {found}, {expected}"
                );
            }
        }
    }
    // Rows one by one, and in pieces that fall across blocks and sequences, have the same bits.
    let same = |cpu: &mut Cpu, a: Attention, range: std::ops::Range<usize>| {
        cpu.enqueue(Op::Attention(a));
        let part = a.out.part(0, range.len() * HEADS * dim);
        assert!(get(cpu, part) == found[range.start * HEADS * dim..range.end * HEADS * dim], "{range:?}");
    };
    for row in [0, 17, 59, 60, 99] {
        let sequence = usize::from(row >= 60);
        let one = Attention {
            q: q_buf.part(row * HEADS * dim, HEADS * dim),
            starts: numbers(&mut cpu, &[0, 1]),
            positions: numbers(&mut cpu, &positions[row..=row]),
            tables: numbers(&mut cpu, &pages[sequence]),
            table_starts: numbers(&mut cpu, &[0]),
            sequences: 1,
            rows: 1,
            lse: None,
            ..whole
        };
        same(&mut cpu, one, row..row + 1);
    }
    let pieces = Attention {
        q: q_buf.part(45 * HEADS * dim, 30 * HEADS * dim),
        starts: numbers(&mut cpu, &[0, 15, 30]),
        positions: numbers(&mut cpu, &positions[45..75]),
        rows: 30,
        lse: None,
        ..whole
    };
    same(&mut cpu, pieces, 45..75);
}

#[rstest]
fn the_gradient_is_its_formula(
    #[values(
        (Level::Portable, false),
        (Level::Avx2, false),
        (Level::Avx512, false),
        (Level::Avx512Bf16, true),
        (Level::Amx, false),
        (Level::Amx, true),
        (Level::AmxEmulated, true)
    )]
    at: (Level, bool),
    #[values((None, None), (Some(1.5), None), (None, Some(3)), (Some(1.5), Some(270)))] kind: (
        Option<f32>,
        Option<usize>,
    ),
) {
    // What the forward pass rounded is in `lse` and `out`.
    let allowed = if at.1 && on_tiles(at.0) { 4e-3 } else { 1e-5 };
    for (name, off) in gradient_errors(at, kind, 0.0) {
        assert!(off < allowed, "{name}: off by {off}");
    }
}

/// As a bias of keys makes it. In exact numbers it changes no weight and no gradient of a query: gradients of scores add up to 0.
/// With rounded ones that holds as far as the backward pass has the scores that `lse` was made of.
#[rstest]
#[case(Level::Amx)]
#[case(Level::AmxEmulated)]
fn what_all_keys_have_in_common_cancels_out_in_gradients(#[case] level: Level) {
    for (name, off) in gradient_errors((level, true), (None, None), 20.0) {
        assert!(off < 0.1, "{name}: off by {off}");
    }
}

/// How far each gradient is from its formula in f64, relative, by norm; nothing where the machine lacks the level. To all keys
/// the same vector of length `common` in each place is added, with signs that differ.
fn gradient_errors(
    (level, bf16): (Level, bool),
    kind: (Option<f32>, Option<usize>),
    common: f32,
) -> Vec<(&'static str, f64)> {
    let Some(mut cpu) = here(2, level) else { return Vec::new() };
    let (dim, starts) = (12usize, [0usize, 300, 309]);
    let (scale, (soft_cap, window)) = (0.25, kind);
    let rows = 309;
    let of = |key, heads: usize, by: f32| -> Vec<f32> {
        random(key, rows * heads * dim).into_iter().map(|x| by * x).collect()
    };
    let (q, mut k, v, dout) =
        (of(1, HEADS, 2.0), of(2, KV_HEADS, 2.0), of(3, KV_HEADS, 1.0), of(4, HEADS, 1.0));
    for (at, x) in k.iter_mut().enumerate() {
        *x += if at % dim % 3 == 0 { common } else { -common };
    }
    let [q_buf, k_buf, v_buf, dout_buf] = [&q, &k, &v, &dout].map(|x| put(&mut cpu, x));
    let [out, dq] = [(); 2].map(|()| put(&mut cpu, &vec![9.0; rows * HEADS * dim]));
    let [dk, dv] = [(); 2].map(|()| put(&mut cpu, &vec![9.0; rows * KV_HEADS * dim]));
    let lse = put(&mut cpu, &vec![9.0; rows * HEADS]);
    let positions: Vec<u32> = (0..300).chain(0..9).collect();
    // Keys and values are the batch's own rows, in order.
    let tables: Vec<u32> = (0..19u32).map(|p| p * PAGE as u32).chain([300]).collect();
    let forward = Attention {
        q: q_buf,
        k: k_buf,
        v: v_buf,
        out,
        lse: Some(lse),
        starts: numbers(&mut cpu, &starts.map(|s| s as u32)),
        positions: numbers(&mut cpu, &positions),
        tables: numbers(&mut cpu, &tables),
        table_starts: numbers(&mut cpu, &[0, 19]),
        sequences: 2,
        rows,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: dim,
        scale,
        soft_cap,
        window,
        bf16,
    };
    cpu.enqueue(Op::Attention(forward));
    cpu.enqueue(Op::AttentionGrad { forward, dout: dout_buf, dq, dk, dv });

    let (mut dq64, mut dk64, mut dv64) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for sequence in 0..2 {
        let first = starts[sequence];
        for row in first..starts[sequence + 1] {
            for head in 0..HEADS {
                let kv = |p: usize| ((first + p) * KV_HEADS + head / GROUP) * dim;
                let at = (row * HEADS + head) * dim;
                let count = row - first;
                let key = |p| k[kv(p)..kv(p) + dim].to_vec();
                let (p, slopes) = weights(&q[at..at + dim], &key, count, (scale, soft_cap, window));
                let dp = |j: usize| -> f64 {
                    (0..dim).map(|i| f64::from(dout[at + i]) * f64::from(v[kv(j) + i])).sum()
                };
                let dp: Vec<f64> = (0..=count).map(dp).collect();
                let delta: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
                for j in 0..=count {
                    let ds = p[j] * (dp[j] - delta) * slopes[j];
                    for i in 0..dim {
                        dv64[kv(j) + i] += p[j] * f64::from(dout[at + i]);
                        dq64[at + i] += ds * f64::from(k[kv(j) + i]);
                        dk64[kv(j) + i] += ds * f64::from(q[at + i]);
                    }
                }
            }
        }
    }
    let off = |(name, buf, expected): (&'static str, Buf, Vec<f64>)| {
        let found = get(&mut cpu, buf);
        let square = |x: f64| x * x;
        let norm: f64 = expected.iter().map(|x| square(*x)).sum();
        let off: f64 = found.iter().zip(&expected).map(|(a, b)| square(f64::from(*a) - b)).sum();
        (name, (off / norm).sqrt())
    };
    [("dq", dq, dq64), ("dk", dk, dk64), ("dv", dv, dv64)].map(off).into()
}
