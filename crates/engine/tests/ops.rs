//! Operations against their formulas in f64, at sizes that fall across tiles, blocks and pages.
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{cpu, get, here, numbers, put, random};
use lathe_engine::device::cpu::Level;
use lathe_engine::device::{Data, Device, Element, Op, Start};
use rstest::rstest;

/// What bf16 keeps of a number (cut, not rounded: the test's weights are made so).
fn bf16(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0xffff_0000)
}

/// What bf16 products from [`Level::Avx512Bf16`] on take of a number.
fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect()
}

fn near(found: &[f32], expected: &[f64], terms: usize) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let allowed = 1e-6 * (terms as f64).sqrt() + 1e-6;
        assert!((f64::from(*found) - expected).abs() < allowed, "{i}: {found} instead of {expected}");
    }
}

#[rstest]
fn products_are_their_formulas(
    #[values((1, 40, 7), (1, 130, 300), (3, 33, 40), (5, 16, 1), (6, 31, 17), (13, 48, 600), (131, 70, 50), (13, 37, 2500), (260, 90, 45), (100, 35, 1500), (390, 270, 34), (530, 33, 70), (3, 530, 8))]
    extent: (usize, usize, usize),
    #[values(Level::AmxEmulated, Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)]
    level: Level,
    #[values(1, 3)] threads: usize,
) {
    let Some(mut cpu) = here(threads, level) else { return };
    let (rows, outputs, inputs) = extent;
    let (x, dy) = (random(1, rows * inputs), random(2, rows * outputs));
    let weights: Vec<f32> = random(3, outputs * inputs).into_iter().map(bf16).collect();
    let bias = random(4, outputs);
    let at = |m: &[f32], i: usize, j: usize, width: usize| f64::from(m[i * width + j]);
    let sum = |n: usize, f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>();

    let (x_buf, dy_buf, bias_buf) = (put(&mut cpu, &x), put(&mut cpu, &dy), put(&mut cpu, &bias));
    let wide = put(&mut cpu, &weights);
    let narrow = cpu.alloc("test", Element::BF16, weights.len()).unwrap();
    let bits: Vec<u16> = weights.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    cpu.write(narrow, Data::BF16(&bits));
    let y = put(&mut cpu, &vec![9.0; rows * outputs]);
    let dx = put(&mut cpu, &vec![9.0; rows * inputs]);

    let mut results = Vec::new();
    for w in [wide, narrow] {
        let pairs = level.rounds_to_bf16() && w == narrow && inputs % 2 == 0;
        let (x, dy) = if pairs { (rounded(&x), rounded(&dy)) } else { (x.clone(), dy.clone()) };
        let expected: Vec<f64> = (0..rows * outputs)
            .map(|i| {
                let (r, o) = (i / outputs, i % outputs);
                f64::from(bias[o]) + sum(inputs, &|k| at(&x, r, k, inputs) * at(&weights, o, k, inputs))
            })
            .collect();
        let start = Start::Bias(bias_buf);
        cpu.enqueue(Op::Linear { x: x_buf, w, y, rows, outputs, inputs, start });
        let found = get(&mut cpu, y);
        near(&found, &expected, inputs);
        // One row alone has the bits that it has among others.
        let last = rows - 1;
        let (x, y) = (x_buf.part(last * inputs, inputs), y.part(last * outputs, outputs));
        cpu.enqueue(Op::Linear { x, w, y, rows: 1, outputs, inputs, start });
        assert_eq!(get(&mut cpu, y), found[last * outputs..]);
        results.push(found);

        cpu.enqueue(Op::LinearInputGrad { dy: dy_buf, w, dx, rows, outputs, inputs, keep: false });
        cpu.enqueue(Op::LinearInputGrad { dy: dy_buf, w, dx, rows, outputs, inputs, keep: true });
        let expected: Vec<f64> = (0..rows * inputs)
            .map(|i| {
                let (r, k) = (i / inputs, i % inputs);
                2.0 * sum(outputs, &|o| at(&dy, r, o, outputs) * at(&weights, o, k, inputs))
            })
            .collect();
        near(&get(&mut cpu, dx), &expected, 4 * outputs);
    }
    assert!(results[0] == results[1] || (level.rounds_to_bf16() && inputs % 2 == 0));

    let dw = put(&mut cpu, &vec![0.0; weights.len()]);
    cpu.enqueue(Op::LinearWeightGrad { x: x_buf, dy: dy_buf, dw, rows, outputs, inputs, positions: None });
    let gradient: Vec<f64> = (0..outputs * inputs)
        .map(|i| sum(rows, &|r| at(&dy, r, i / inputs, outputs) * at(&x, r, i % inputs, inputs)))
        .collect();
    let whole = get(&mut cpu, dw);
    near(&whole, &gradient, rows);
    // Rows in two parts add up to the same bits.
    cpu.enqueue(Op::Zero { x: dw });
    for (first, rows) in [(0, rows / 2), (rows / 2, rows - rows / 2)] {
        let (x, dy) =
            (x_buf.part(first * inputs, rows * inputs), dy_buf.part(first * outputs, rows * outputs));
        cpu.enqueue(Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions: None });
    }
    assert_eq!(get(&mut cpu, dw), whole);
}

/// With positions, on tiles: of rounded numbers, and with the same bits however whole steps of sequences fall into batches.
#[rstest]
fn a_weights_gradient_adds_up_by_sequences(
    #[values((5, 7), (40, 50), (48, 32), (530, 17), (17, 300))] extent: (usize, usize),
    #[values(Level::AmxEmulated, Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)]
    level: Level,
    #[values(1, 3)] threads: usize,
) {
    let Some(mut cpu) = here(threads, level) else { return };
    // More steps than are packed together.
    let lengths: Vec<u32> = [100, 1, 33, 64].into_iter().chain((0..30).map(|i| i * 11 % 40 + 1)).collect();
    let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length).collect();
    let (rows, (outputs, inputs)) = (positions.len(), extent);
    let (x, dy, start) = (random(1, rows * inputs), random(2, rows * outputs), random(3, outputs * inputs));
    let (x_buf, dy_buf) = (put(&mut cpu, &x), put(&mut cpu, &dy));
    let mut add_up = |parts: &[std::ops::Range<usize>]| {
        let dw = put(&mut cpu, &start);
        for part in parts {
            let (rows, first) = (part.len(), part.start);
            let (x, dy) =
                (x_buf.part(first * inputs, rows * inputs), dy_buf.part(first * outputs, rows * outputs));
            let positions = Some(numbers(&mut cpu, &positions[part.clone()]));
            cpu.enqueue(Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions });
        }
        get(&mut cpu, dw)
    };
    let whole = add_up(std::slice::from_ref(&(0..rows)));
    let on_tiles = matches!(level, Level::Amx | Level::AmxEmulated);
    let (x, dy) = if on_tiles { (rounded(&x), rounded(&dy)) } else { (x, dy) };
    let expected: Vec<f64> = (0..outputs * inputs)
        .map(|i| {
            let of = |row: usize| {
                f64::from(dy[row * outputs + i / inputs]) * f64::from(x[row * inputs + i % inputs])
            };
            f64::from(start[i]) + (0..rows).map(of).sum::<f64>()
        })
        .collect();
    near(&whole, &expected, 4 * rows);
    // Between sequences, and within one after 32 rows and after 96.
    assert!(add_up(&[0..101, 101..134, 134..rows]) == whole);
    assert!(add_up(&[0..32, 32..96, 96..198, 198..rows]) == whole);
}

/// Two shards of the vocabulary, merged as an all-reduce would, give the loss and gradient of the whole.
#[test]
fn the_loss_can_split_the_vocabulary() {
    let (rows, vocab, cut) = (5, 45, 19);
    let mut cpu = cpu(1, Level::detect().expect("a level"));
    let logits = random(7, rows * vocab).iter().map(|x| 5.0 * x).collect::<Vec<f32>>();
    let targets = cpu.alloc("test", Element::U32, rows).unwrap();
    cpu.write(targets, Data::U32(&[0, 18, 19, 44, 30]));
    let coefficients = put(&mut cpu, &[1.0, 0.5, 2.0, 1.0, 0.25]);
    let stats = put(&mut cpu, &[0.0; 15]);
    let log_probs = put(&mut cpu, &[0.0; 5]);
    let shard = |columns: std::ops::Range<usize>| -> Vec<f32> {
        logits.chunks(vocab).flat_map(|row| row[columns.clone()].to_vec()).collect()
    };

    let whole = put(&mut cpu, &logits);
    cpu.enqueue(Op::LogitStats { logits: whole, targets, stats, rows, vocab, first: 0 });
    cpu.enqueue(Op::LogProbs { stats, log_probs, rows });
    let expected = get(&mut cpu, log_probs);
    cpu.enqueue(Op::LogitGrad { logits: whole, targets, stats, coefficients, rows, vocab, first: 0 });
    let gradient = get(&mut cpu, whole);

    let shards = [0..cut, cut..vocab];
    let mut parts = Vec::new();
    for range in shards.clone() {
        let part = put(&mut cpu, &shard(range.clone()));
        cpu.enqueue(Op::LogitStats {
            logits: part,
            targets,
            stats,
            rows,
            vocab: range.len(),
            first: range.start,
        });
        parts.push((part, get(&mut cpu, stats)));
    }
    let merged: Vec<f32> = (0..rows)
        .flat_map(|r| {
            let [a, b] = [0, 1].map(|p: usize| &parts[p].1[3 * r..3 * r + 3]);
            let max = a[0].max(b[0]);
            [max, a[1] * (a[0] - max).exp() + b[1] * (b[0] - max).exp(), a[2] + b[2]]
        })
        .collect();
    cpu.write(stats, Data::F32(&merged));
    cpu.enqueue(Op::LogProbs { stats, log_probs, rows });
    for (a, b) in get(&mut cpu, log_probs).iter().zip(&expected) {
        assert!((a - b).abs() < 1e-5);
    }
    for ((part, _), range) in parts.into_iter().zip(shards) {
        let (vocab_here, first) = (range.len(), range.start);
        cpu.enqueue(Op::LogitGrad {
            logits: part,
            targets,
            stats,
            coefficients,
            rows,
            vocab: vocab_here,
            first,
        });
        for (row, found) in get(&mut cpu, part).chunks(vocab_here).enumerate() {
            for (a, b) in found.iter().zip(&gradient[row * vocab..][range.clone()]) {
                assert!((a - b).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn dropout_keeps_the_mean_and_drops_its_share() {
    let (rows, width, rate) = (50, 203, 0.3);
    let mut cpu = cpu(2, Level::detect().expect("a level"));
    let x = put(&mut cpu, &vec![1.0; rows * width]);
    let y = put(&mut cpu, &vec![0.0; rows * width]);
    let seeds = cpu.alloc("test", Element::U64, 2).unwrap();
    cpu.write(seeds, Data::U64(&[5, 6]));
    let [starts, positions] = [vec![0, 20, 50], (0..20).chain(0..30).collect::<Vec<u32>>()].map(|values| {
        let buf = cpu.alloc("test", Element::U32, values.len()).unwrap();
        cpu.write(buf, Data::U32(&values));
        buf
    });
    let sequences = 2;
    let dropped =
        |salt| Op::Dropout { x, y, seeds, starts, positions, sequences, width, salt, rate, keep: false };
    cpu.enqueue(dropped(1));
    let first = get(&mut cpu, y);
    let share = first.iter().filter(|&&v| v == 0.0).count() as f32 / first.len() as f32;
    assert!((share - rate).abs() < 0.02, "{share}");
    assert!(first.iter().all(|&v| v == 0.0 || (v - 1.0 / 0.7).abs() < 1e-6));
    cpu.enqueue(dropped(2));
    let same =
        get(&mut cpu, y).iter().zip(&first).filter(|(a, b)| a == b).count() as f32 / first.len() as f32;
    assert!((same - (0.7 * 0.7 + 0.3 * 0.3)).abs() < 0.02, "two layers drop the same: {same}");
}

/// The mask is a function of the row's seed, its position and the column: how rows are batched and by how many threads
/// they are computed changes none of it.
#[rstest]
fn dropout_is_keyed_by_row_and_position(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx)] level: Level,
    #[values(1, 3)] threads: usize,
) {
    let Some(mut cpu) = here(threads, level) else { return };
    let (width, lengths, row_seeds) = (45, [20usize, 3, 31], [5u64, 6, 7]);
    let mut mask = |of: &[(usize, usize, u64)]| -> Vec<f32> {
        // First position, positions and seed of each sequence.
        let rows: usize = of.iter().map(|s| s.1).sum();
        let (x, y) = (put(&mut cpu, &vec![1.0; rows * width]), put(&mut cpu, &vec![0.0; rows * width]));
        let seeds = cpu.alloc("test", Element::U64, of.len()).unwrap();
        cpu.write(seeds, Data::U64(&of.iter().map(|s| s.2).collect::<Vec<u64>>()));
        let mut ends = vec![0u32];
        ends.extend(of.iter().scan(0, |sum, s| {
            *sum += s.1 as u32;
            Some(*sum)
        }));
        let starts = numbers(&mut cpu, &ends);
        let positions = of.iter().flat_map(|s| s.0 as u32..(s.0 + s.1) as u32).collect::<Vec<u32>>();
        let positions = numbers(&mut cpu, &positions);
        let (sequences, salt, rate) = (of.len(), 4, 0.3);
        cpu.enqueue(Op::Dropout {
            x,
            y,
            seeds,
            starts,
            positions,
            sequences,
            width,
            salt,
            rate,
            keep: false,
        });
        get(&mut cpu, y)
    };
    let together: Vec<_> = (0..3).map(|i| (0, lengths[i], row_seeds[i])).collect();
    let all = mask(&together);
    let alone: Vec<f32> = together.iter().flat_map(|&sequence| mask(&[sequence])).collect();
    assert!(alone == all, "alone a row has another mask");
    let (first, last) = (mask(&[(0, 11, 7), (0, 20, 5)]), mask(&[(11, 20, 7)]));
    assert!(first[11 * width..] == all[..20 * width], "another order of rows gives another mask");
    assert!([&first[..11 * width], &last].concat() == all[23 * width..], "a cut row has another mask");
    assert!(mask(&[(0, 20, 6)]) != all[..20 * width], "two rows have one mask");
}
