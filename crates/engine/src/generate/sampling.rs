//! From logits to a token: a pure function of logits, settings and the token's place in its sequence.
//!
//! A vocabulary is large and a step short, so as little of it is looked at as will do: one chunk where all tokens may be
//! drawn, and where only some may, exponentials and an order of those alone.

use std::ops::Range;

use lathe_plan::SAMPLE_CHUNK;

use super::Sampling;
use crate::random;

/// What the device has found of a row of logits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    /// The largest logit.
    pub max: f32,
    /// The sum of `e^(logit - max)`.
    pub sum: f32,
    /// The sums of `e^((logit - max) / temperature)` of each [`SAMPLE_CHUNK`] tokens.
    pub sums: &'a [f32],
}

/// Chooses a token; returns it with its log-probability under the unchanged distribution, which is no number where
/// logits are none. `read` gives a range of the row's logits, `row` is room for all of them.
pub(super) fn sample(
    read: &mut dyn FnMut(Range<usize>, &mut [f32]),
    row: &mut [f32],
    known: Known<'_>,
    sampling: &Sampling,
    place: u64,
) -> (u32, f32) {
    let log_sum = f64::from(known.max) + f64::from(known.sum).ln();
    let chosen = |token: usize, logit: f32| (token as u32, (f64::from(logit) - log_sum) as f32);
    let total: f64 = known.sums.iter().map(|&sum| f64::from(sum)).sum();
    let share = random::uniform(random::mix(sampling.seed), place);
    // Below the normal range 1 / temperature is infinite, and what is no number has no distribution.
    let greedy = sampling.temperature < f32::MIN_POSITIVE
        || sampling.top_k == 1
        || !(known.max.is_finite() && total.is_finite());
    if !greedy && sampling.top_p >= 1.0 && sampling.top_k == 0 {
        let (chunk, rest) = drawn(known.sums.iter().map(|&sum| f64::from(sum)), share * total);
        let range = chunk * SAMPLE_CHUNK..((chunk + 1) * SAMPLE_CHUNK).min(row.len());
        let part = &mut row[range.clone()];
        read(range.clone(), part);
        let weights = part.iter().map(|&x| weight(x, known.max, sampling));
        let within = weights.clone().sum::<f64>() * (rest / f64::from(known.sums[chunk])).min(1.0);
        let at = drawn(weights, within).0;
        return chosen(range.start + at, part[at]);
    }
    read(0..row.len(), row);
    if greedy {
        // The first of the largest.
        let best = row.iter().position(|&x| x == known.max).unwrap_or(0);
        return chosen(best, row[best]);
    }
    let candidates = likeliest(row, known.max, total, sampling);
    let total: f64 = candidates.iter().map(|c| c.1).sum();
    let token = candidates[drawn(candidates.iter().map(|c| c.1), share * total).0].0 as usize;
    chosen(token, row[token])
}

fn weight(x: f32, max: f32, sampling: &Sampling) -> f64 {
    (f64::from(x - max) / f64::from(sampling.temperature)).exp()
}

/// The first place up to which `weights` sum to more than `rest`, and what of `rest` is left there; where rounding leaves
/// none, the last that weighs anything.
fn drawn(weights: impl Iterator<Item = f64>, mut rest: f64) -> (usize, f64) {
    let mut last = (0, 0.0);
    for (at, weight) in weights.enumerate() {
        if weight > 0.0 {
            last = (at, rest);
            if rest < weight {
                break;
            }
            rest -= weight;
        }
    }
    last
}

/// Steps of a token's distance from the likeliest one, in units of the temperature: 64 in all.
const STEPS: usize = 512;
const STEP: f32 = 0.125;

/// The tokens that `top_k` and `top_p` leave, with their weights, the likeliest first; at least one.
fn likeliest(row: &[f32], max: f32, total: f64, sampling: &Sampling) -> Vec<(u32, f64)> {
    let by = 1.0 / (sampling.temperature * STEP);
    let step = |x: f32| (((max - x) * by) as usize).min(STEPS - 1);
    let mut counts = [0_u32; STEPS];
    row.iter().for_each(|&x| counts[step(x)] += 1);
    // As many steps as surely hold enough tokens, and enough of the weight: each weighs at least what one at the step's end
    // would. Weights of a device's sums are rounded, so a little more.
    let (mut tokens, mut mass) = (0, 0.0);
    let enough = f64::from(sampling.top_p) * total * 1.000_1;
    let last = counts.iter().enumerate().position(|(step, &count)| {
        tokens += count as usize;
        mass += f64::from(count) * (-f64::from(STEP) * (step + 1) as f64).exp();
        if sampling.top_k > 0 { tokens >= sampling.top_k } else { mass >= enough }
    });
    let last = last.unwrap_or(STEPS - 1);
    let near = (0..).zip(row).filter(|&(_, &x)| step(x) <= last);
    let mut candidates: Vec<(u32, f64)> = near.map(|(token, &x)| (token, weight(x, max, sampling))).collect();
    // By weight, then by token, so that ties are cut the same way always.
    candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if sampling.top_k > 0 {
        candidates.truncate(sampling.top_k);
    }
    if sampling.top_p < 1.0 {
        // Of what `top_k` left.
        let all = if sampling.top_k > 0 { candidates.iter().map(|c| c.1).sum() } else { total };
        let enough = f64::from(sampling.top_p) * all;
        let mut sum = 0.0;
        let cut = candidates.iter().position(|c| {
            sum += c.1;
            sum >= enough
        });
        candidates.truncate(cut.map_or(candidates.len(), |i| i + 1));
    }
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 3 };

    fn sample(logits: &[f32], sampling: &Sampling, place: u64) -> (u32, f32) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = logits.iter().map(|x| (x - max).exp()).sum();
        let tempered = |chunk: &[f32]| chunk.iter().map(|x| ((x - max) / sampling.temperature).exp()).sum();
        let sums: Vec<f32> = logits.chunks(SAMPLE_CHUNK).map(tempered).collect();
        let mut read = |range: Range<usize>, into: &mut [f32]| into.copy_from_slice(&logits[range]);
        let known = Known { max, sum, sums: &sums };
        super::sample(&mut read, &mut vec![0.0; logits.len()], known, sampling, place)
    }

    fn shares(logits: &[f32], sampling: Sampling) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for place in 0..20_000 {
            counts[sample(logits, &sampling, place).0 as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn tokens_come_as_often_as_their_probability_says() {
        let logits: [f32; 4] = [1.0, 2.0, 0.0, -1.0];
        let sum: f32 = logits.iter().map(|x| (x / 0.5).exp()).sum();
        let found = shares(&logits, Sampling { temperature: 0.5, ..ALL });
        for (share, x) in found.iter().zip(logits) {
            assert!((share - f64::from((x / 0.5).exp() / sum)).abs() < 0.01, "{found:?}");
        }
    }

    #[test]
    fn cuts_leave_the_likeliest() {
        let logits = [0.0, 3.0, 2.9, 0.1];
        assert_eq!(shares(&logits, Sampling { top_k: 2, ..ALL })[0], 0.0);
        let found = shares(&logits, Sampling { top_p: 0.4, ..ALL });
        assert_eq!((found[1] > 0.99, found[2]), (true, 0.0));
        assert_eq!(sample(&logits, &Sampling { temperature: 0.0, ..ALL }, 0).0, 1);
    }

    #[test]
    fn the_log_probability_is_the_models() {
        let (token, log_prob) = sample(&[0.0, 1.0], &Sampling { temperature: 0.0, ..ALL }, 0);
        assert_eq!(token, 1);
        assert!((log_prob - (1.0f32.exp() / (1.0 + 1.0f32.exp())).ln()).abs() < 1e-6);
    }

    /// As the definition has it: all weights, sorted.
    fn plain(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut all: Vec<(u32, f64)> =
            (0..).zip(logits).map(|(token, &x)| (token, weight(x, max, sampling))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if sampling.top_k > 0 {
            all.truncate(sampling.top_k);
        }
        let total: f64 = all.iter().map(|c| c.1).sum();
        let mut sum = 0.0;
        let cut = all.iter().position(|c| {
            sum += c.1;
            sum >= f64::from(sampling.top_p) * total
        });
        all.into_iter().take(cut.map_or(usize::MAX, |i| i + 1)).map(|c| c.0).collect()
    }

    #[rstest::rstest]
    fn what_is_left_of_a_large_vocabulary_is_what_the_definition_leaves(
        #[values(0.3, 1.0, 2.0)] temperature: f32,
        #[values(0.1, 0.9, 0.999)] top_p: f32,
        #[values(0, 50)] top_k: usize,
        #[values(0.5, 3.0, 40.0)] spread: f64,
    ) {
        let logits: Vec<f32> = (0..20_000).map(|i| (spread * random::normal(7, i)) as f32).collect();
        let sampling = Sampling { temperature, top_p, top_k, seed: 1 };
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total = logits.iter().map(|&x| weight(x, max, &sampling)).sum();
        let found: Vec<u32> = likeliest(&logits, max, total, &sampling).into_iter().map(|c| c.0).collect();
        assert_eq!(found, plain(&logits, &sampling));
    }

    #[test]
    fn tokens_of_every_chunk_are_drawn_as_often_as_they_should_be() {
        let logits: Vec<f32> =
            (0..2500).map(|i| if i % 500 == 7 { 4.0 + (i / 500) as f32 } else { -3.0 }).collect();
        let found = shares(&logits, ALL);
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for (at, x) in logits.iter().enumerate().filter(|(at, _)| at % 500 == 7) {
            let expected = f64::from(*x).exp() / total;
            assert!((found[at] - expected).abs() < 0.02, "{at}: {} instead of {expected}", found[at]);
        }
    }

    #[test]
    fn a_temperature_below_the_normal_range_takes_the_likeliest() {
        let logits: Vec<f32> = (0..3000).map(|i| if i == 2100 { 9.0 } else { (i % 7) as f32 }).collect();
        let sums = [1e-35; 3];
        let known = Known { max: 9.0, sum: 1.5, sums: &sums };
        let mut read = |range: Range<usize>, into: &mut [f32]| into.copy_from_slice(&logits[range]);
        let sampling = Sampling { temperature: 1e-40, ..ALL };
        for place in 0..50 {
            let found = super::sample(&mut read, &mut vec![0.0; 3000], known, &sampling, place);
            assert_eq!(found.0, 2100);
        }
    }

    #[test]
    fn what_is_no_number_is_told_by_the_log_probability() {
        let logits = [f32::NAN; 3];
        // As the device tells of a row of them.
        let known = Known { max: f32::NEG_INFINITY, sum: 1e-38, sums: &[1e-38] };
        let mut read = |range: Range<usize>, into: &mut [f32]| into.copy_from_slice(&logits[range]);
        let (token, log_prob) = super::sample(&mut read, &mut [0.0; 3], known, &ALL, 0);
        assert_eq!((token, log_prob.is_nan()), (0, true));
    }
}
