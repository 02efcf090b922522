//! Attention against its formula in f64, over more keys than one chunk of its softmax has, and its bits however the rows
//! are cut.
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{get, here, here_with, numbers, put, random};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Attention, Buf, Device, Op};
use lathe_engine::plan::thread_scratch;
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
/// derivative by the product of query and key, and the logarithm of the sum of exponentials.
fn weights(
    q: &[f32],
    keys: &dyn Fn(usize) -> Vec<f32>,
    position: usize,
    (scale, soft_cap, window): Kind,
) -> (Vec<f64>, Vec<f64>, f64) {
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
    (scores.iter().map(|s| (s - max).exp() / sum).collect(), slopes, max + sum.ln())
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
    #[values(8, 20, 48, 64, 128)] dim: usize,
    #[values((None, None), (Some(5.0), None), (None, Some(1)), (None, Some(70)), (Some(5.0), Some(300)))]
    kind: (Option<f32>, Option<usize>),
) {
    // The last 60 of a sequence of 530 positions, and all of another one.
    a_paged_cache_is_read(at, kind, 3, [HEADS, KV_HEADS, dim], [530, 60]);
}

/// Tasks of as many queries as there may be: wide groups, long heads, and many rows for one thread.
#[rstest]
fn many_queries_of_a_task_read_it_so(
    #[values((Level::Portable, false), (Level::Amx, true), (Level::AmxEmulated, true))] at: (Level, bool),
    #[values([40, 1, 48], [6, 2, 128], [7, 1, 256])] heads: [usize; 3],
    #[values(None, Some(300))] window: Option<usize>,
) {
    a_paged_cache_is_read(at, (None, window), 1, heads, [620, 610]);
}

/// Two sequences, one of `count` positions, of which the batch has the last `new`, and a whole one of 40, against the formula and
/// in bits against the same in pieces. A thread has the scratch that a plan gives it.
fn a_paged_cache_is_read(
    (level, bf16): (Level, bool),
    (soft_cap, window): (Option<f32>, Option<usize>),
    threads: usize,
    [heads, kv_heads, dim]: [usize; 3],
    [count, new]: [usize; 2],
) {
    let group = heads / kv_heads;
    let rounds = bf16 && on_tiles(level);
    // What tiles round is bf16 already, so that only weights are rounded.
    let scale = if rounds { 0.25 } else { 1.0 / (dim as f32).sqrt() };
    let random =
        |key, len| if rounds { random(key, len).into_iter().map(short).collect() } else { random(key, len) };
    let Some(mut cpu) = here_with(threads, level, thread_scratch(group, dim)) else { return };
    let (counts, news) = ([count, 40], [new, 40]);
    let many = count.div_ceil(PAGE) as u32;
    let pages: Vec<Vec<u32>> = vec![
        // Some pages follow each other, most do not.
        (0..many).map(|p| if p < 4 { many + 6 + p } else { (p * 7) % many } * PAGE as u32).collect(),
        (0..3u32).map(|p| (many + 2 * p) * PAGE as u32).collect(),
    ];
    let slots = (many as usize + 10) * PAGE;
    let (k, v) = (random(1, slots * kv_heads * dim), random(2, slots * kv_heads * dim));
    let k: Vec<f32> = k.into_iter().map(|x| 4.0 * x).collect();
    let rows: usize = news.iter().sum();
    let q = random(3, rows * heads * dim);
    let positions: Vec<u32> =
        (0..2).flat_map(|s| (counts[s] - news[s]..counts[s]).map(|p| p as u32)).collect();
    let (k_buf, v_buf, q_buf) = (put(&mut cpu, &k), put(&mut cpu, &v), put(&mut cpu, &q));
    let out = put(&mut cpu, &vec![9.0; q.len()]);
    let lse = put(&mut cpu, &vec![9.0; rows * heads]);
    let tables: Vec<u32> = pages.concat();
    let whole = Attention {
        q: q_buf,
        k: k_buf,
        v: v_buf,
        out,
        lse: Some(lse),
        starts: numbers(&mut cpu, &[0, new as u32, rows as u32]),
        positions: numbers(&mut cpu, &positions),
        tables: numbers(&mut cpu, &tables),
        table_starts: numbers(&mut cpu, &[0, many]),
        sequences: 2,
        rows,
        heads,
        kv_heads,
        head_dim: dim,
        scale,
        soft_cap,
        window,
        bf16,
    };
    cpu.enqueue(Op::Attention(whole));
    let (found, found_lse) = (get(&mut cpu, out), get(&mut cpu, lse));
    for row in (0..rows).step_by(if rows > 100 { 67 } else { 7 }).chain([rows - 1]) {
        let sequence = usize::from(row >= new);
        for head in 0..heads {
            let at = |x: &[f32], p: usize| {
                let slot = pages[sequence][p / PAGE] as usize + p % PAGE;
                let start = (slot * kv_heads + head / group) * dim;
                x[start..start + dim].to_vec()
            };
            let query = &q[(row * heads + head) * dim..][..dim];
            let position = positions[row] as usize;
            let kind = (scale, soft_cap, window);
            let (weights, _, lse) = weights(query, &|p| at(&k, p), position, kind);
            let off = f64::from(found_lse[row * heads + head]) - lse;
            assert!(off.abs() < 1e-5, "row {row} head {head}: lse {lse} is off by {off}");
            let values: Vec<Vec<f32>> = (0..weights.len()).map(|p| at(&v, p)).collect();
            for i in 0..dim {
                let sum = |of: &dyn Fn(f64) -> f64| -> f64 {
                    weights.iter().zip(&values).map(|(w, v)| w * of(f64::from(v[i]))).sum()
                };
                let expected = sum(&|v| v);
                let found = f64::from(found[(row * heads + head) * dim + i]);
                let rounding = if rounds { sum(&|v| v.abs() / 256.0) } else { 0.0 };
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
        let part = a.out.part(0, range.len() * heads * dim);
        assert!(get(cpu, part) == found[range.start * heads * dim..range.end * heads * dim], "{range:?}");
    };
    for row in [0, 17, new - 1, new, rows - 1] {
        let sequence = usize::from(row >= new);
        let one = Attention {
            q: q_buf.part(row * heads * dim, heads * dim),
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
    let from = new - 15;
    let pieces = Attention {
        q: q_buf.part(from * heads * dim, 30 * heads * dim),
        starts: numbers(&mut cpu, &[0, 15, 30]),
        positions: numbers(&mut cpu, &positions[from..from + 30]),
        rows: 30,
        lse: None,
        ..whole
    };
    same(&mut cpu, pieces, from..from + 30);
}

/// A score that is no number counts as none at all, whichever other queries meet its key: diverged or not, a row keeps its bits.
#[rstest]
fn a_score_that_is_no_number_is_the_same_beside_any_row(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx, Level::AmxEmulated)]
    level: Level,
) {
    let Some(mut cpu) = here(1, level) else { return };
    let (rows, dim) = (64, 16);
    let [q, mut k, v] = [1, 2, 3].map(|key| random(key, rows * dim));
    k[20 * dim] = f32::NAN;
    let [q, k, v] = [q, k, v].map(|x| put(&mut cpu, &x));
    let mut attend = |range: std::ops::Range<usize>| -> [Vec<u32>; 2] {
        let positions: Vec<u32> = range.clone().map(|p| p as u32).collect();
        let (out, lse) =
            (put(&mut cpu, &vec![9.0; range.len() * dim]), put(&mut cpu, &vec![9.0; range.len()]));
        let a = Attention {
            q: q.part(range.start * dim, range.len() * dim),
            k,
            v,
            out,
            lse: Some(lse),
            starts: numbers(&mut cpu, &[0, range.len() as u32]),
            positions: numbers(&mut cpu, &positions),
            tables: numbers(&mut cpu, &[0, 16, 32, 48]),
            table_starts: numbers(&mut cpu, &[0]),
            sequences: 1,
            rows: range.len(),
            heads: 1,
            kv_heads: 1,
            head_dim: dim,
            scale: 0.25,
            soft_cap: None,
            window: None,
            bf16: true,
        };
        cpu.enqueue(Op::Attention(a));
        [out, lse].map(|buf| get(&mut cpu, buf).iter().map(|x| x.to_bits()).collect())
    };
    let [out, lse] = attend(0..rows);
    // All that some queries of a tile do not see is looked at in another way than what all see.
    for row in [19, 20, 21, 25, 31, 40, 63] {
        let alone = attend(row..row + 1);
        assert_eq!(alone, [out[row * dim..(row + 1) * dim].to_vec(), vec![lse[row]]], "row {row}");
    }
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
                let (p, slopes, _) = weights(&q[at..at + dim], &key, count, (scale, soft_cap, window));
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
