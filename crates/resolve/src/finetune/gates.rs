//! Whether a tuned model is as good as its job asks for.
use lathe_api::{Decimal, Gate, ScoreStatus};

use crate::to_metric;

/// The gates that do not hold, each with its numbers; empty: all hold.
#[must_use]
pub fn failed_gates(gates: &[Gate], scores: &[ScoreStatus]) -> Vec<String> {
    let score = |gate: &Gate| scores.iter().find(|score| score.metric == gate.metric);
    gates.iter().filter_map(|gate| problem(gate, score(gate))).collect()
}

fn problem(gate: &Gate, score: Option<&ScoreStatus>) -> Option<String> {
    let metric = to_metric(gate.metric);
    let name = metric.as_str();
    let number = |value: &Option<Decimal>| value.as_ref().and_then(Decimal::value);
    let Some(after) = score.and_then(|score| number(&score.after)) else {
        return Some(format!("{name} could not be measured on the held-out rows"));
    };
    let before = score.and_then(|score| number(&score.before));
    let found = match before {
        Some(before) => format!("{name} is {after} (before {before})"),
        None => format!("{name} is {after}"),
    };
    if let Some(least) = number(&gate.at_least).filter(|least| after < *least) {
        return Some(format!("{found}, must be at least {least}"));
    }
    if let Some(most) = number(&gate.at_most).filter(|most| after > *most) {
        return Some(format!("{found}, must be at most {most}"));
    }
    let least = number(&gate.min_improvement)?;
    let Some(before) = before else { return Some(format!("{found}, and the base could not be measured")) };
    let gained = if metric.lower_is_better() { before - after } else { after - before };
    // From nothing, any gain is without bound.
    let improvement = if before == 0.0 && gained > 0.0 { f64::INFINITY } else { gained / before.abs() };
    (improvement < least || improvement.is_nan()).then(|| {
        format!("{found}, must improve by {:.1} % (did by {:.1} %)", least * 100.0, improvement * 100.0)
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn gate(fields: Value) -> Gate {
        serde_json::from_value(fields).expect("a gate")
    }

    #[rstest]
    #[case::reached(json!({"metric": "ROUGEL", "atLeast": "0.5"}), "0.1", "0.5", true)]
    #[case::missed(json!({"metric": "ROUGEL", "atLeast": "0.5"}), "0.1", "0.49", false)]
    #[case::below(json!({"metric": "Perplexity", "atMost": "9"}), "20", "8", true)]
    #[case::above(json!({"metric": "Perplexity", "atMost": "9"}), "20", "9.1", false)]
    #[case::better_is_lower(json!({"metric": "Perplexity", "minImprovement": "0.5"}), "20", "10", true)]
    #[case::not_by_enough(json!({"metric": "Perplexity", "minImprovement": "0.5"}), "20", "11", false)]
    #[case::better_is_higher(json!({"metric": "BLEU", "minImprovement": "0.5"}), "20", "30", true)]
    #[case::worse(json!({"metric": "BLEU", "minImprovement": "0"}), "20", "19", false)]
    #[case::from_nothing(json!({"metric": "BLEU", "minImprovement": "2"}), "0", "0.1", true)]
    #[case::nothing_to_nothing(json!({"metric": "BLEU", "minImprovement": "0.1"}), "0", "0", false)]
    fn gates(#[case] fields: Value, #[case] before: &str, #[case] after: &str, #[case] holds: bool) {
        let gate = gate(fields);
        let scores =
            [ScoreStatus { metric: gate.metric, before: Some(before.into()), after: Some(after.into()) }];
        assert_eq!(failed_gates(&[gate], &scores).is_empty(), holds);
    }

    #[test]
    fn the_numbers_are_told() {
        let gates = [
            gate(json!({"metric": "ROUGEL", "atLeast": "0.35"})),
            gate(json!({"metric": "BLEU", "atLeast": "1"})),
        ];
        let score = ScoreStatus {
            metric: lathe_api::Metric::ROUGEL,
            before: Some("0.0500".into()),
            after: Some("0.3100".into()),
        };
        assert_eq!(
            failed_gates(&gates, &[score]),
            [
                "ROUGEL is 0.31 (before 0.05), must be at least 0.35",
                "BLEU could not be measured on the held-out rows",
            ]
        );
    }
}
