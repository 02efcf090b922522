//! From logits to a token: a pure function of logits, settings and the token's place in its sequence.

use super::Sampling;
use crate::random;

/// Chooses a token; returns it with its log-probability under the unchanged distribution, which is no number where
/// logits are none. `max` is the largest logit, `sum` that of `e^(logit - max)`.
pub(super) fn sample(logits: &[f32], [max, sum]: [f32; 2], sampling: &Sampling, place: u64) -> (u32, f32) {
    // The first of the largest.
    let best = logits.iter().position(|&x| x == max).unwrap_or(0) as u32;
    let log_sum = f64::from(max) + f64::from(sum).ln();
    let log_prob = |token: u32| (f64::from(logits[token as usize]) - log_sum) as f32;
    if sampling.temperature == 0.0 || sampling.top_k == 1 {
        return (best, log_prob(best));
    }
    let weight = |x: f32| (f64::from(x - max) / f64::from(sampling.temperature)).exp();
    let mut candidates: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&x| weight(x))).collect();
    // By weight, then by token, so that ties are cut the same way always.
    let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if sampling.top_k > 0 && sampling.top_k < candidates.len() {
        candidates.select_nth_unstable_by(sampling.top_k - 1, order);
        candidates.truncate(sampling.top_k);
    }
    if sampling.top_p < 1.0 {
        candidates.sort_unstable_by(order);
        let enough = f64::from(sampling.top_p) * candidates.iter().map(|c| c.1).sum::<f64>();
        let mut sum = 0.0;
        let cut = candidates.iter().position(|c| {
            sum += c.1;
            sum >= enough
        });
        candidates.truncate(cut.map_or(candidates.len(), |i| i + 1));
    } else {
        candidates.sort_unstable_by_key(|c| c.0);
    }
    let total: f64 = candidates.iter().map(|c| c.1).sum();
    let mut rest = random::uniform(random::mix(sampling.seed), place) * total;
    for &(token, weight) in &candidates {
        rest -= weight;
        if rest < 0.0 {
            return (token, log_prob(token));
        }
    }
    (best, log_prob(best))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 3 };

    fn sample(logits: &[f32], sampling: &Sampling, place: u64) -> (u32, f32) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = logits.iter().map(|x| (x - max).exp()).sum();
        super::sample(logits, [max, sum], sampling, place)
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
}
