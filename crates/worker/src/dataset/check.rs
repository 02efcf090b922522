//! What a person wants to know of a dataset before an accelerator is asked for.

use std::collections::BTreeMap;
use std::path::Path;

use lathe_contract::DatasetFormat;
use sha2::{Digest, Sha256};

use super::encode::{EncodedRow, Encoder, Unencodable};
use super::problem::{DatasetError, MalformedRows, Problem};
use super::read::{Reader, Row};
use super::row::{Example, Format};

/// Counts over a dataset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataReport {
    /// How the training rows are written.
    pub format: Option<Format>,
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
    /// Those of them that have something to measure.
    pub measurable_rows: usize,
    /// Those of them that ask something whose answer can be compared.
    pub questions: usize,
    /// Held-out rows that stand in the training rows too.
    pub leaked_rows: usize,
    /// Malformed rows, of each file that has any.
    pub malformed: Vec<MalformedRows>,
}

impl DataReport {
    fn held_out(
        &mut self,
        example: &Example,
        encoded: &EncodedRow,
        encoder: &Encoder,
    ) -> Result<(), Unencodable> {
        if encoded.learned > 0 {
            self.questions += usize::from(encoder.question(example)?.is_some());
            self.measurable_rows += 1;
        }
        self.evaluation_rows += 1;
        Ok(())
    }
}

/// What is checked.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// File of the rows to learn from.
    pub train: &'a Path,
    /// File of the rows to measure with.
    pub evaluation: Option<&'a Path>,
    /// Rows of the first file to measure with, where there is no second.
    pub hold_out: Option<HoldOut>,
    /// How the rows are written.
    pub format: DatasetFormat,
}

/// Which rows are held out.
#[derive(Debug, Clone, Copy)]
pub struct HoldOut {
    /// Share of the different rows, 0 to 1.
    pub share: f64,
    /// Of the choice.
    pub seed: u64,
}

/// Encodes every row, which finds what only the model's template or tokenizer can refuse, and counts. One row is held at a
/// time, and eight bytes of every one that was seen.
///
/// # Errors
/// A file that is malformed as a whole; [`DatasetError::NoChatTemplate`], or [`DatasetError::NothingToLearn`] if no row is
/// left to learn from; [`DatasetError::Model`] where no row is to blame. Malformed rows are in the report.
pub fn check(source: &Source<'_>, encoder: &Encoder) -> Result<DataReport, DatasetError> {
    let mut report = DataReport::default();
    let hold_out = source.hold_out.filter(|_| source.evaluation.is_none());
    let held = hold_out.map(|part| Held::choose(source, part)).transpose()?;
    let mut known = Vec::new();
    let train = rows(source.train, source.format, encoder, &mut report, |example, encoded, report| {
        if held.as_ref().is_some_and(|held| held.has(example)) {
            return report.held_out(example, encoded, encoder);
        }
        report.rows += 1;
        report.tokens += encoded.rows.iter().map(|row| row.tokens.len()).sum::<usize>();
        report.learned_tokens += encoded.learned;
        report.longest_row = report.longest_row.max(encoded.whole);
        report.over_long_rows += usize::from(encoded.cut);
        report.empty_rows += usize::from(encoded.learned == 0);
        report.lost_answers += encoded.lost_answers;
        known.push(short(&example.hash()));
        Ok(())
    })?;
    report.format = Some(train.1);
    known.sort_unstable();
    known.dedup();
    report.duplicate_rows = report.rows - known.len();
    if report.learned_tokens == 0 && report.malformed.is_empty() {
        return Err(DatasetError::NothingToLearn { file: train.0, limit: encoder.max_tokens });
    }
    if let Some(evaluation) = source.evaluation {
        rows(evaluation, source.format, encoder, &mut report, |example, encoded, report| {
            report.leaked_rows += usize::from(known.binary_search(&short(&example.hash())).is_ok());
            report.held_out(example, encoded, encoder)
        })?;
    }
    Ok(report)
}

/// Tells `good` every row of a file that can be encoded, and counts the others. Returns the file's name and format.
fn rows(
    path: &Path,
    format: DatasetFormat,
    encoder: &Encoder,
    report: &mut DataReport,
    mut good: impl FnMut(&Example, &EncodedRow, &mut DataReport) -> Result<(), Unencodable>,
) -> Result<(String, Format), DatasetError> {
    let mut reader = Reader::open(path, format)?;
    let file = reader.file().to_owned();
    let (mut all, mut malformed) = (0, None::<MalformedRows>);
    while let Some((line, row)) = reader.next_row()? {
        if let Some(format) = reader.format() {
            encoder.accepts(format)?;
        }
        all += 1;
        let told = |example: Example| good(&example, &encoder.encode(&example)?, report);
        let what = match row.map(told) {
            Ok(Ok(())) => continue,
            Ok(Err(Unencodable::Row(what))) | Err(what) => what,
            Ok(Err(Unencodable::Model(cause))) => return Err(DatasetError::model(cause, &file, line)),
        };
        let first = || MalformedRows { first: Problem { file: file.clone(), line, what }, bad: 0, rows: 0 };
        malformed.get_or_insert_with(first).bad += 1;
    }
    match (reader.format(), malformed.map(|malformed| MalformedRows { rows: all, ..malformed })) {
        (Some(format), malformed) if all > 0 => {
            report.malformed.extend(malformed);
            Ok((file, format))
        }
        (None, Some(malformed)) => Err(malformed.into()),
        _ => Err(DatasetError::Empty { file }),
    }
}

/// The held-out rows of a file, by the largest of their ranks; none where there are no two different rows.
struct Held {
    seed: u64,
    last: Option<u64>,
}

impl Held {
    fn choose(source: &Source<'_>, HoldOut { share, seed }: HoldOut) -> Result<Self, DatasetError> {
        let mut reader = Reader::open(source.train, source.format)?;
        let mut ranks = Vec::new();
        while let Some((_, row)) = reader.next_row()? {
            ranks.extend(row.ok().map(|example| short(&rank(&example, seed))));
        }
        ranks.sort_unstable();
        ranks.dedup();
        let last = wanted(ranks.len(), share).checked_sub(1).and_then(|last| ranks.get(last)).copied();
        Ok(Held { seed, last })
    }

    fn has(&self, example: &Example) -> bool {
        self.last.is_some_and(|last| short(&rank(example, self.seed)) <= last)
    }
}

/// The beginning of a hash: enough to tell rows apart, and ordered as the whole is.
fn short(hash: &[u8; 32]) -> u64 {
    hash.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// A hash of a row that the seed changes.
fn rank(example: &Example, seed: u64) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(example.hash());
    hash.finalize().into()
}

/// How many of so many different rows are held out.
fn wanted(distinct: usize, share: f64) -> usize {
    let most = distinct.saturating_sub(1);
    ((distinct as f64 * share).round() as usize).clamp(1.min(most), most)
}

/// Parts rows into those to train on and a `share` (0 to 1) to measure with. The choice depends on a row's content and the
/// seed, not on its place, and equal rows stay together, so that nothing leaks. Both parts have a row where there are two
/// different ones.
pub fn hold_out(rows: Vec<Row>, share: f64, seed: u64) -> (Vec<Row>, Vec<Row>) {
    let mut distinct: BTreeMap<[u8; 32], bool> =
        rows.iter().map(|row| (rank(&row.example, seed), false)).collect();
    let wanted = wanted(distinct.len(), share);
    distinct.values_mut().take(wanted).for_each(|held| *held = true);
    let (held, kept) =
        rows.into_iter().partition(|row| distinct.get(&rank(&row.example, seed)) == Some(&true));
    (kept, held)
}
