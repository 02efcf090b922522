//! Conditions that a tuned model must meet.
use lathe_contract::{Gate, Score};

use crate::failure::{Done, Halt};

/// Checks every gate.
///
/// # Errors
/// `GateFailed` with the numbers of all gates that failed.
pub fn check(gates: &[Gate], scores: &[Score]) -> Done<()> {
    let failed: Vec<String> = gates.iter().filter_map(|gate| problem(gate, scores)).collect();
    if failed.is_empty() {
        return Ok(());
    }
    let next = "train longer or on better rows, or lower `evaluation.gates`; the checkpoint is kept";
    Err(Halt::user("GateFailed", failed.join("; "), next))
}

fn problem(gate: &Gate, scores: &[Score]) -> Option<String> {
    let metric = gate.metric.as_str();
    let score = scores.iter().find(|score| score.metric == gate.metric);
    let Some(after) = score.and_then(|score| score.after) else {
        return Some(format!("{metric} could not be measured on the held-out rows"));
    };
    let before = score.and_then(|score| score.before);
    let found = match before {
        Some(before) => format!("{metric} is {after:.4} (before {before:.4})"),
        None => format!("{metric} is {after:.4}"),
    };
    if let Some(least) = gate.at_least.filter(|least| after < *least) {
        return Some(format!("{found}, must be at least {least}"));
    }
    if let Some(most) = gate.at_most.filter(|most| after > *most) {
        return Some(format!("{found}, must be at most {most}"));
    }
    let least = gate.min_improvement?;
    let Some(before) = before else { return Some(format!("{found}, and the base could not be measured")) };
    let gained = if gate.metric.lower_is_better() { before - after } else { after - before };
    // From nothing, any gain is without bound.
    let improvement = if before == 0.0 && gained > 0.0 { f64::INFINITY } else { gained / before.abs() };
    (improvement < least || improvement.is_nan()).then(|| {
        format!("{found}, must improve by {:.1} % (did by {:.1} %)", least * 100.0, improvement * 100.0)
    })
}

#[cfg(test)]
mod tests {
    use lathe_contract::Metric;
    use rstest::rstest;

    use super::*;

    fn gate(metric: Metric) -> Gate {
        Gate { metric, at_least: None, at_most: None, min_improvement: None }
    }

    #[rstest]
    #[case::reached(Gate { at_least: Some(0.5), ..gate(Metric::ROUGEL) }, 0.1, 0.5, true)]
    #[case::missed(Gate { at_least: Some(0.5), ..gate(Metric::ROUGEL) }, 0.1, 0.49, false)]
    #[case::below(Gate { at_most: Some(9.0), ..gate(Metric::Perplexity) }, 20.0, 8.0, true)]
    #[case::above(Gate { at_most: Some(9.0), ..gate(Metric::Perplexity) }, 20.0, 9.1, false)]
    #[case::better_is_lower(Gate { min_improvement: Some(0.5), ..gate(Metric::Perplexity) }, 20.0, 10.0, true)]
    #[case::not_by_enough(Gate { min_improvement: Some(0.5), ..gate(Metric::Perplexity) }, 20.0, 11.0, false)]
    #[case::better_is_higher(Gate { min_improvement: Some(0.5), ..gate(Metric::BLEU) }, 20.0, 30.0, true)]
    #[case::worse(Gate { min_improvement: Some(0.0), ..gate(Metric::BLEU) }, 20.0, 19.0, false)]
    #[case::from_nothing(Gate { min_improvement: Some(2.0), ..gate(Metric::BLEU) }, 0.0, 0.1, true)]
    #[case::nothing_to_nothing(Gate { min_improvement: Some(0.1), ..gate(Metric::BLEU) }, 0.0, 0.0, false)]
    fn gates(#[case] gate: Gate, #[case] before: f64, #[case] after: f64, #[case] passes: bool) {
        let scores = [Score { metric: gate.metric, before: Some(before), after: Some(after) }];
        assert_eq!(check(&[gate], &scores).is_ok(), passes);
    }

    #[test]
    fn the_numbers_are_told() {
        let gates = [Gate { at_least: Some(0.35), ..gate(Metric::ROUGEL) }, gate(Metric::BLEU)];
        let scores = [Score { metric: Metric::ROUGEL, before: Some(0.05), after: Some(0.31) }];
        let Err(Halt::Failed(trouble)) = check(&gates, &scores) else { panic!("passed") };
        assert_eq!(trouble.reason, "GateFailed");
        let expected = "ROUGEL is 0.3100 (before 0.0500), must be at least 0.35; BLEU could not be measured on the held-out rows";
        assert_eq!(trouble.cause, expected);
    }
}
