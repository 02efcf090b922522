//! A dataset, brought here and made into tokens for one model.
use std::path::PathBuf;

use lathe_contract::{DatasetInput, SourceRef};
use lathe_engine::Row;
use lathe_source::{Digest, Fetched, FileEntry, digest_of};

use crate::context::Context;
use crate::dataset::{self, Dataset, DatasetError, Encoder, Problem, Question, Unencodable};
use crate::failure::{Done, Halt, io};

/// The held-out rows are the same for every seed of training, so that runs can be compared, and the same where a dataset
/// is only checked.
const HOLD_OUT_SEED: u64 = 0;

/// The files of a dataset.
#[derive(Clone, Debug)]
pub struct Files {
    train: PathBuf,
    evaluation: Option<PathBuf>,
    /// The identity of all of it.
    pub digest: Digest,
    /// Keeps the files in the cache.
    _fetched: Vec<Fetched>,
}

/// The rows of a dataset, well-formed every one.
#[derive(Clone, Debug)]
pub struct Rows {
    /// To learn from.
    pub train: Dataset,
    /// To measure with; without rows where nothing is held out.
    pub held: Option<Dataset>,
}

/// Rows in tokens.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// To learn from, each with something to learn.
    pub train: Vec<Row>,
    /// To measure with.
    pub held: Vec<Held>,
    /// Conversations whose end was cut at the sequence length.
    pub cut: usize,
}

/// A row to measure with.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its tokens, answers marked.
    pub row: Row,
    /// What to ask and what to hope for; a text asks nothing.
    pub question: Option<Question>,
}

impl Files {
    /// Brings the files here.
    ///
    /// # Errors
    /// They cannot be fetched, or are not one file each.
    pub fn fetch(context: &Context, input: &DatasetInput) -> Done<Self> {
        let (train, fetched) = fetch_one(context, "training data", &input.train)?;
        let (mut entries, mut kept) = (fetched.files.clone(), vec![fetched]);
        entries.iter_mut().for_each(|entry| entry.path = format!("train/{}", entry.path));
        let mut evaluation = None;
        if let Some(source) = &input.evaluation {
            let (file, fetched) = fetch_one(context, "evaluation data", source)?;
            evaluation = Some(file);
            let below = |e: &FileEntry| FileEntry { path: format!("evaluation/{}", e.path), ..e.clone() };
            entries.extend(fetched.files.iter().map(below));
            kept.push(fetched);
        }
        Ok(Files { train, evaluation, digest: digest_of(&entries), _fetched: kept })
    }

    /// Parses the files and parts the rows.
    ///
    /// # Errors
    /// A file or row that is malformed; nothing to learn from or to measure with.
    pub fn read(&self, input: &DatasetInput) -> Done<Rows> {
        self.parted(input).map_err(Halt::from)
    }

    /// What a check reads: the same rows, held out in the same way.
    pub fn source(&self, input: &DatasetInput) -> dataset::Source<'_> {
        let share = input.holdout.filter(|share| *share > 0.0);
        dataset::Source {
            train: &self.train,
            evaluation: self.evaluation.as_deref(),
            hold_out: share.map(|share| dataset::HoldOut { share, seed: HOLD_OUT_SEED }),
            format: input.format,
        }
    }

    fn parted(&self, input: &DatasetInput) -> Result<Rows, DatasetError> {
        let read = |path: &PathBuf| dataset::read(path, input.format).and_then(Dataset::refuse_bad_rows);
        let mut train = read(&self.train)?;
        if let Some(file) = &self.evaluation {
            return Ok(Rows { train, held: Some(read(file)?) });
        }
        let Some(share) = input.holdout.filter(|share| *share > 0.0) else {
            return Ok(Rows { train, held: None });
        };
        let (kept, held) = dataset::hold_out(std::mem::take(&mut train.rows), share, HOLD_OUT_SEED);
        let held = Dataset { rows: held, bad_rows: 0, problems: Vec::new(), ..train.clone() };
        train.rows = kept;
        Ok(Rows { train, held: Some(held) })
    }
}

fn fetch_one(context: &Context, what: &str, source: &SourceRef) -> Done<(PathBuf, Fetched)> {
    let fetched = context.fetch(what, source)?;
    let Some(file) = fetched.file().filter(|_| fetched.files.iter().all(|f| f.path.ends_with(".jsonl")))
    else {
        let cause = format!("{what}: {} holds {} files", source.uri, fetched.files.len());
        return Err(Halt::user("NotOneFile", cause, "name the one .jsonl file in `uri`"));
    };
    Ok((file, fetched))
}

impl Rows {
    /// Makes tokens of all rows. Rows without anything to learn before the cut are left out.
    ///
    /// # Errors
    /// A row that the model's template or tokenizer refuses; no row left to learn from; the worker was told to stop.
    pub fn encode(&self, context: &Context, encoder: &Encoder<'_>) -> Done<Encoded> {
        encoder.accepts(self.train.format)?;
        let mut encoded = Encoded::default();
        for row in &self.train.rows {
            context.go_on()?;
            let done = encoder.encode(&row.example).map_err(|what| refused(&self.train, row.line, what))?;
            encoded.cut += usize::from(done.cut);
            encoded.train.extend(done.rows.into_iter().filter(teaches));
        }
        if encoded.train.is_empty() {
            let file = self.train.file.clone();
            return Err(DatasetError::NothingToLearn { file, limit: encoder.max_tokens }.into());
        }
        if let Some(held) = &self.held {
            encoded.held = encode_held(context, held, encoder)?;
        }
        Ok(encoded)
    }
}

/// Rows to measure with, in the order of the file.
///
/// # Errors
/// As [`Rows::encode`].
pub fn encode_held(context: &Context, held: &Dataset, encoder: &Encoder<'_>) -> Done<Vec<Held>> {
    encoder.accepts(held.format)?;
    let mut rows = Vec::with_capacity(held.rows.len());
    for row in &held.rows {
        context.go_on()?;
        let refuse = |what| refused(held, row.line, what);
        let done = encoder.encode(&row.example).map_err(refuse)?;
        if done.learned == 0 {
            continue;
        }
        let mut question = encoder.question(&row.example).map_err(refuse)?;
        rows.extend(done.rows.into_iter().filter(teaches).map(|row| Held { row, question: question.take() }));
    }
    Ok(rows)
}

/// Nothing predicts the first token.
fn teaches(row: &Row) -> bool {
    row.weights.iter().skip(1).any(|&weight| weight > 0.0)
}

fn refused(dataset: &Dataset, line: usize, why: Unencodable) -> Halt {
    match why {
        Unencodable::Row(what) => {
            DatasetError::RefusedRow(Problem { file: dataset.file.clone(), line, what }).into()
        }
        Unencodable::Model(cause) => DatasetError::model(cause, &dataset.file, line).into(),
    }
}

impl From<DatasetError> for Halt {
    fn from(error: DatasetError) -> Self {
        let (reason, next) = match &error {
            DatasetError::Model { .. } => {
                let DatasetError::Model { at, cause } = error else { return Halt::Stopped };
                return Halt::from(cause).of(&at);
            }
            DatasetError::Io { source, .. } => return io(source, &error),
            DatasetError::NotJsonLines { found: "UTF-16", .. } => ("NotUtf8", "convert the file to UTF-8"),
            DatasetError::NotJsonLines { .. } => ("MalformedDataset", "convert the file to JSON Lines"),
            DatasetError::Empty { .. } => ("EmptyDataset", "put rows into the file"),
            DatasetError::MalformedRows(rows) if rows.first.what.starts_with("a row must be UTF-8") => {
                ("NotUtf8", "convert the file to UTF-8")
            }
            DatasetError::MalformedRows(_) | DatasetError::RefusedRow(_) => {
                ("MalformedRow", "correct the row, and those like it")
            }
            DatasetError::NoChatTemplate => ("NoChatTemplate", "choose another model, or another `format`"),
            DatasetError::NothingToLearn { .. } => {
                ("NothingToLearn", "raise `training.sequenceLength`, or shorten the prompts")
            }
        };
        Halt::user(reason, &error, next)
    }
}
