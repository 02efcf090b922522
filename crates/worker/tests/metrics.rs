//! Scores against those of sacreBLEU, rouge-score and PyTorch.
#![allow(clippy::unwrap_used)]

use lathe_worker::metrics::{Perplexity, corpus_bleu, mean_rouge};
use serde_json::Value;

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/metrics.json")).unwrap()
}

fn corpora() -> Vec<(Vec<(String, String)>, Value)> {
    let fixture = fixture();
    let corpora = fixture["corpora"].as_array().unwrap();
    corpora
        .iter()
        .map(|corpus| (serde_json::from_value(corpus["pairs"].clone()).unwrap(), corpus.clone()))
        .collect()
}

fn close(ours: f64, expected: &Value, about: &str) {
    let expected = expected.as_f64().unwrap();
    assert!(
        (ours - expected).abs() <= 1e-9 * expected.abs().max(1.0),
        "{about}: {ours} instead of {expected}"
    );
}

#[test]
fn bleu_is_that_of_sacrebleu() {
    for (pairs, expected) in corpora() {
        let bleu = corpus_bleu(pairs.iter().map(|(answer, reference)| (answer.as_str(), reference.as_str())));
        if pairs.is_empty() {
            assert_eq!(bleu.score, 0.0);
            continue;
        }
        let expected = &expected["bleu"];
        close(bleu.score, &expected["score"], &format!("score of {pairs:?}"));
        close(bleu.brevity_penalty, &expected["brevity_penalty"], &format!("brevity penalty of {pairs:?}"));
        for (order, precision) in bleu.precisions.into_iter().enumerate() {
            close(precision, &expected["precisions"][order], &format!("precision {order} of {pairs:?}"));
        }
    }
}

#[test]
fn rouge_is_that_of_rouge_score() {
    for (pairs, expected) in corpora() {
        let rouge = mean_rouge(pairs.iter().map(|(answer, reference)| (answer.as_str(), reference.as_str())));
        let Some(rouge) = rouge else {
            assert!(pairs.is_empty() && expected["rouge"].is_null());
            continue;
        };
        close(rouge.rouge1, &expected["rouge"]["rouge1"], &format!("ROUGE-1 of {pairs:?}"));
        close(rouge.rouge2, &expected["rouge"]["rouge2"], &format!("ROUGE-2 of {pairs:?}"));
        close(rouge.rouge_l, &expected["rouge"]["rougeL"], &format!("ROUGE-L of {pairs:?}"));
    }
}

#[test]
fn perplexity_is_exp_of_the_weighted_cross_entropy() {
    let expected = &fixture()["perplexity"];
    let numbers = |name: &str| -> Vec<f32> { serde_json::from_value(expected[name].clone()).unwrap() };
    let mut perplexity = Perplexity::default();
    for (log_probability, weight) in numbers("log_probs").into_iter().zip(numbers("weights")) {
        perplexity.add(log_probability, weight);
    }
    let (ours, value) = (perplexity.value().unwrap(), expected["value"].as_f64().unwrap());
    assert!((ours - value).abs() < 1e-6 * value, "{ours} instead of {value}");
    perplexity.add(f32::NEG_INFINITY, 0.0);
    assert_eq!(perplexity.value(), Some(ours));
    assert_eq!(Perplexity::default().value(), None);
}
