//! Corpus BLEU as sacreBLEU computes it by default: 13a tokenisation, n-grams to 4, exponential smoothing
//! (signature `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`). Papineni et al., <https://aclanthology.org/P02-1040>;
//! smoothing is method 3 of Chen and Cherry, <https://aclanthology.org/W14-3346>.

use std::collections::HashMap;

use super::is_space;

const MAX_ORDER: usize = 4;

/// A corpus' BLEU and what it was made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bleu {
    /// 0 to 100.
    pub score: f64,
    /// Precision of n-grams of length 1 to 4, in percent.
    pub precisions: [f64; MAX_ORDER],
    /// What the score is multiplied by because the answers are shorter than the references, 0 to 1.
    pub brevity_penalty: f64,
}

/// BLEU of pairs of answer and reference.
pub fn corpus_bleu<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Bleu {
    let mut statistics = Statistics::default();
    for (answer, reference) in pairs {
        statistics.add(&tokenize(answer), &tokenize(reference));
    }
    statistics.bleu()
}

#[derive(Default)]
struct Statistics {
    answer_len: usize,
    reference_len: usize,
    correct: [usize; MAX_ORDER],
    total: [usize; MAX_ORDER],
}

impl Statistics {
    fn add(&mut self, answer: &str, reference: &str) {
        let answer: Vec<&str> = answer.split(' ').filter(|word| !word.is_empty()).collect();
        let reference: Vec<&str> = reference.split(' ').filter(|word| !word.is_empty()).collect();
        self.answer_len += answer.len();
        self.reference_len += reference.len();
        for order in 1..=MAX_ORDER {
            let known = counts(&reference, order);
            for (ngram, count) in counts(&answer, order) {
                self.total[order - 1] += count;
                self.correct[order - 1] += count.min(known.get(ngram).copied().unwrap_or(0));
            }
        }
    }

    fn bleu(&self) -> Bleu {
        let brevity_penalty = match (self.answer_len, self.reference_len) {
            (answer, reference) if answer >= reference => 1.0,
            (0, _) => 0.0,
            (answer, reference) => (1.0 - reference as f64 / answer as f64).exp(),
        };
        let mut precisions = [0.0; MAX_ORDER];
        if self.correct.iter().all(|&count| count == 0) {
            return Bleu { score: 0.0, precisions, brevity_penalty };
        }
        let mut smoothing = 1.0;
        for (order, precision) in precisions.iter_mut().enumerate() {
            let total = self.total[order] as f64;
            if self.total[order] == 0 {
                break;
            }
            if self.correct[order] == 0 {
                smoothing *= 2.0;
                *precision = 100.0 / (smoothing * total);
            } else {
                *precision = 100.0 * self.correct[order] as f64 / total;
            }
        }
        // An order that has no n-gram at all leaves precision 0, and so the score.
        let logs: f64 = precisions.iter().map(|precision| precision.ln()).sum();
        Bleu { score: brevity_penalty * (logs / MAX_ORDER as f64).exp(), precisions, brevity_penalty }
    }
}

fn counts<'a, 'b>(words: &'a [&'b str], order: usize) -> HashMap<&'a [&'b str], usize> {
    let mut counts = HashMap::new();
    for ngram in words.windows(order) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

/// The tokenizer of mteval-v13a: words separated by one space.
fn tokenize(line: &str) -> String {
    let line = line.trim_end_matches(is_space);
    let line = line.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let line = line.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    let spaced = format!(" {line} ");
    let mut parted = String::with_capacity(spaced.len() * 2);
    for c in spaced.chars() {
        match c {
            '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/' => parted.extend([' ', c, ' ']),
            _ => parted.push(c),
        }
    }
    let point = |c: char| c == '.' || c == ',';
    // Each pass is a regular expression's replacement of two characters: found from the left, not overlapping.
    let parted = replace_pairs(&parted, |a, b| !a.is_ascii_digit() && point(b), |a, b| [a, ' ', b, ' ']);
    let parted = replace_pairs(&parted, |a, b| point(a) && !b.is_ascii_digit(), |a, b| [' ', a, ' ', b]);
    let parted = replace_pairs(&parted, |a, b| a.is_ascii_digit() && b == '-', |a, b| [a, ' ', b, ' ']);
    let words: Vec<&str> = parted.split(is_space).filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

fn replace_pairs(
    text: &str,
    found: impl Fn(char, char) -> bool,
    by: impl Fn(char, char) -> [char; 4],
) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let mut chars = text.chars().peekable();
    while let Some(a) = chars.next() {
        match chars.peek() {
            Some(&b) if found(a, b) => {
                chars.next();
                out.extend(by(a, b));
            }
            _ => out.push(a),
        }
    }
    out
}
