//! Why a file of a model was not read or written.

use std::path::{Path, PathBuf};

/// One cause, with the file and the field, and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system's word.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than any such file is.
    #[error("{path} must be at most {limit} bytes (found {found})")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Most bytes.
        limit: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// A field has a value that is not allowed.
    #[error("{file}: `{field}` must be {allowed} (found {found})")]
    Field {
        /// The file's name.
        file: String,
        /// The field, dotted.
        field: String,
        /// What is allowed.
        allowed: String,
        /// What was found, shortened.
        found: String,
    },
    /// The file is not of its format.
    #[error("{file}: {problem}")]
    Malformed {
        /// The file's name.
        file: String,
        /// What is wrong and where.
        problem: String,
    },
    /// A model that this engine does not know.
    #[error("{file}: {what} is not supported; {supported}")]
    Unsupported {
        /// The file's name.
        file: String,
        /// What was asked for, with its name.
        what: String,
        /// What is supported or what to do.
        supported: String,
    },
    /// Python's pickle can run code as it is read.
    #[error(
        "{file} is a pickle, which can run code as it is read, and is never opened; convert the weights to safetensors"
    )]
    Pickle {
        /// The file's name.
        file: String,
    },
    /// A tensor that must be there is not.
    #[error("{file}: tensor `{name}` is missing")]
    MissingTensor {
        /// The file or folder.
        file: String,
        /// The tensor.
        name: String,
    },
    /// The engine would not take or give a tensor.
    #[error(transparent)]
    Engine(#[from] crate::Error),
    /// A chat template failed or ran too long.
    #[error("chat template: {0}")]
    Template(String),
    /// A chat template refused the messages, in its own words.
    #[error("chat template: {0}")]
    Refused(String),
    /// The tokenizer failed.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
}

impl FileError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FileError {
        let path = path.to_owned();
        move |source| FileError::Io { action, path, source }
    }

    pub(crate) fn malformed(file: &str, problem: impl Into<String>) -> FileError {
        FileError::Malformed { file: file.to_owned(), problem: problem.into() }
    }
}

/// The last part of a path, for messages.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// Refuses a file's content that is longer than `limit` bytes.
pub(crate) fn bounded(file: &str, bytes: &[u8], limit: u64) -> Result<(), FileError> {
    let found = bytes.len() as u64;
    if found > limit {
        return Err(FileError::TooLarge { path: file.into(), limit, found });
    }
    Ok(())
}

/// Reads a whole file that must be at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    use std::io::Read;
    let file = std::fs::File::open(path).map_err(FileError::io("open", path))?;
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a file that grows or lies about its size is still seen to be too large.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(FileError::io("read", path))?;
    if bytes.len() as u64 > limit {
        let found = std::fs::metadata(path).map_or(bytes.len() as u64, |m| m.len());
        return Err(FileError::TooLarge { path: path.to_owned(), limit, found });
    }
    Ok(bytes)
}
