//! ROUGE-1, ROUGE-2 and ROUGE-L as the `rouge-score` package computes them without stemming: F1 of each pair, then the
//! mean. Lin, <https://aclanthology.org/W04-1013>.

use std::collections::HashMap;

/// F1 scores, each 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rouge {
    /// By single words.
    pub rouge1: f64,
    /// By pairs of words.
    pub rouge2: f64,
    /// By the longest common subsequence.
    pub rouge_l: f64,
}

/// The scores of one answer.
pub fn rouge(answer: &str, reference: &str) -> Rouge {
    let (answer, reference) = (tokenize(answer), tokenize(reference));
    let (answer, reference) = (words(&answer), words(&reference));
    Rouge {
        rouge1: f1(common_ngrams(&answer, &reference, 1), answer.len(), reference.len()),
        rouge2: f1(
            common_ngrams(&answer, &reference, 2),
            answer.len().saturating_sub(1),
            reference.len().saturating_sub(1),
        ),
        rouge_l: f1(common_subsequence(&answer, &reference), answer.len(), reference.len()),
    }
}

/// The mean over pairs of answer and reference; nothing of no pairs.
pub fn mean_rouge<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Option<Rouge> {
    let mut sum = Rouge::default();
    let mut count = 0;
    for (answer, reference) in pairs {
        let scores = rouge(answer, reference);
        sum.rouge1 += scores.rouge1;
        sum.rouge2 += scores.rouge2;
        sum.rouge_l += scores.rouge_l;
        count += 1;
    }
    let mean = |sum: f64| sum / f64::from(count);
    (count > 0).then(|| Rouge {
        rouge1: mean(sum.rouge1),
        rouge2: mean(sum.rouge2),
        rouge_l: mean(sum.rouge_l),
    })
}

/// Lower case, everything but a-z and 0-9 a space.
fn tokenize(text: &str) -> String {
    let clean = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { ' ' };
    text.to_lowercase().chars().map(clean).collect()
}

fn words(clean: &str) -> Vec<&str> {
    clean.split(' ').filter(|word| !word.is_empty()).collect()
}

fn f1(common: usize, answer: usize, reference: usize) -> f64 {
    let precision = common as f64 / answer.max(1) as f64;
    let recall = common as f64 / reference.max(1) as f64;
    if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 }
}

fn common_ngrams(answer: &[&str], reference: &[&str], order: usize) -> usize {
    let mut known: HashMap<&[&str], usize> = HashMap::new();
    for ngram in reference.windows(order) {
        *known.entry(ngram).or_default() += 1;
    }
    let mut common = 0;
    for ngram in answer.windows(order) {
        if let Some(left @ 1..) = known.get_mut(ngram) {
            *left -= 1;
            common += 1;
        }
    }
    common
}

/// Length of the longest common subsequence, one row of the table in memory.
fn common_subsequence(answer: &[&str], reference: &[&str]) -> usize {
    let mut row = vec![0; answer.len() + 1];
    for expected in reference {
        let mut diagonal = 0;
        for (at, word) in answer.iter().enumerate() {
            let above = row[at + 1];
            row[at + 1] = if word == expected { diagonal + 1 } else { above.max(row[at]) };
            diagonal = above;
        }
    }
    row[answer.len()]
}
