//! What a person wants to know of a dataset before an accelerator is asked for.

use std::collections::{BTreeMap, HashSet};

use sha2::{Digest, Sha256};

use super::encode::Encoder;
use super::problem::{DatasetError, MAX_PROBLEMS, Problem};
use super::read::{Dataset, Row};

/// Counts over a dataset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataReport {
    /// Well-formed training rows.
    pub rows: usize,
    /// Their tokens, after cutting; tokens that two rows of a long text share count twice.
    pub tokens: usize,
    /// Those of them that are learned.
    pub learned_tokens: usize,
    /// Tokens of the longest row, before cutting.
    pub longest_row: usize,
    /// Conversations whose end is cut, since they are longer than a row may be. Texts never are.
    pub over_long_rows: usize,
    /// Rows that teach nothing, since their answer lies behind the cut.
    pub empty_rows: usize,
    /// Answers that the chat template hides from learning.
    pub lost_answers: usize,
    /// Training rows that stand there before.
    pub duplicate_rows: usize,
    /// Well-formed held-out rows.
    pub evaluation_rows: usize,
    /// Held-out rows that stand in the training rows too.
    pub leaked_rows: usize,
    /// Malformed rows of both files.
    pub bad_rows: usize,
    /// The first of those.
    pub problems: Vec<Problem>,
}

/// Encodes every row, which finds what only the model's template or tokenizer can refuse, and counts.
///
/// # Errors
/// [`DatasetError::NoChatTemplate`], or [`DatasetError::NothingToLearn`] if no row is left to learn from. Malformed rows are
/// in the report.
pub fn check(
    train: &Dataset,
    evaluation: Option<&Dataset>,
    encoder: &Encoder,
) -> Result<DataReport, DatasetError> {
    encoder.accepts(train.format)?;
    let mut report =
        DataReport { bad_rows: train.bad_rows, problems: train.problems.clone(), ..DataReport::default() };
    let mut known = HashSet::new();
    for row in &train.rows {
        match encoder.encode(&row.example) {
            Err(what) => report.problem(train, row.line, what),
            Ok(encoded) => {
                report.rows += 1;
                report.tokens += encoded.rows.iter().map(|row| row.tokens.len()).sum::<usize>();
                report.learned_tokens += encoded.learned;
                report.longest_row = report.longest_row.max(encoded.whole);
                report.over_long_rows += usize::from(encoded.cut);
                report.empty_rows += usize::from(encoded.learned == 0);
                report.lost_answers += encoded.lost_answers;
                report.duplicate_rows += usize::from(!known.insert(row.example.hash()));
            }
        }
    }
    if report.learned_tokens == 0 && report.bad_rows == 0 {
        return Err(DatasetError::NothingToLearn { file: train.file.clone(), limit: encoder.max_tokens });
    }
    if let Some(evaluation) = evaluation {
        encoder.accepts(evaluation.format)?;
        report.bad_rows += evaluation.bad_rows;
        report.problems.extend_from_slice(&evaluation.problems);
        for row in &evaluation.rows {
            match encoder.encode(&row.example) {
                Err(what) => report.problem(evaluation, row.line, what),
                Ok(_) => {
                    report.evaluation_rows += 1;
                    report.leaked_rows += usize::from(known.contains(&row.example.hash()));
                }
            }
        }
    }
    Ok(report)
}

impl DataReport {
    fn problem(&mut self, dataset: &Dataset, line: usize, what: String) {
        self.bad_rows += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem { file: dataset.file.clone(), line, what });
        }
    }
}

/// Parts rows into those to train on and a `share` (0 to 1) to measure with. The choice depends on a row's content and the
/// seed, not on its place, and equal rows stay together, so that nothing leaks. Both parts have a row where there are two
/// different ones.
pub fn hold_out(rows: Vec<Row>, share: f64, seed: u64) -> (Vec<Row>, Vec<Row>) {
    // Rank of each distinct row by a hash that the seed changes.
    let rank = |row: &Row| -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(row.example.hash());
        hash.finalize().into()
    };
    let mut distinct: BTreeMap<[u8; 32], bool> = rows.iter().map(|row| (rank(row), false)).collect();
    let most = distinct.len().saturating_sub(1);
    let wanted = ((distinct.len() as f64 * share).round() as usize).clamp(1.min(most), most);
    distinct.values_mut().take(wanted).for_each(|held| *held = true);
    let (held, kept) = rows.into_iter().partition(|row| distinct.get(&rank(row)) == Some(&true));
    (kept, held)
}
