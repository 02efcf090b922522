//! What can be wrong with a dataset.

use std::fmt;

use lathe_engine::files::FileError;

/// Problems that are kept in words; further ones are counted.
pub(super) const MAX_PROBLEMS: usize = 20;

/// What is wrong with one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file's name.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The field, what is allowed, what was found.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}: {}", self.file, self.line, self.what)
    }
}

/// The malformed rows of one file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{first}. {bad} of {rows} rows of {}", first.file)]
pub struct MalformedRows {
    /// The first problem.
    pub first: Problem,
    /// Rows that are wrong.
    pub bad: usize,
    /// All rows of the file, those that are held out of it too.
    pub rows: usize,
}

/// Why a dataset cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The operating system's word.
    #[error("cannot read {file}: {source}")]
    Io {
        /// The file's name.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is of another kind.
    #[error("{file} must be JSON Lines in UTF-8, one object a line (found {found})")]
    NotJsonLines {
        /// The file's name.
        file: String,
        /// What it looks like.
        found: &'static str,
    },
    /// There are no rows.
    #[error("{file} has no rows")]
    Empty {
        /// The file's name.
        file: String,
    },
    /// Rows are wrong; the first is named, and all are counted.
    #[error(transparent)]
    MalformedRows(#[from] MalformedRows),
    /// A row is wrong; what comes behind it was not looked at.
    #[error("{0}")]
    RefusedRow(Problem),
    /// The model's template or tokenizer fails where the row is not to blame.
    #[error("{at}: {cause}")]
    Model {
        /// Where that was seen.
        at: String,
        /// What fails.
        cause: FileError,
    },
    /// Chats cannot be written for this model.
    #[error(
        "the model has no chat template, which a dataset of chats needs; take a model with one, or rows with `prompt` and \
         `completion`, or `text`"
    )]
    NoChatTemplate,
    /// Nothing can be learned.
    #[error(
        "{file}: no row has an answer within the first {limit} tokens; raise `sequenceLength` or shorten the prompts"
    )]
    NothingToLearn {
        /// The file's name.
        file: String,
        /// The sequence length.
        limit: usize,
    },
}

impl DatasetError {
    /// What fails as a row is written out.
    pub(crate) fn model(cause: FileError, file: &str, line: usize) -> Self {
        DatasetError::Model { at: format!("the model's files fail at {file} line {line}"), cause }
    }
}
