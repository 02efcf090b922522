//! What can go wrong with a source, and whose fault it is.
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::digest::Digest;

/// Who can cure an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The user: another address, credential, licence, volume size. Trying again changes nothing.
    User,
    /// Nobody: the network or the server. Trying again later may succeed.
    Transient,
    /// The caller stopped the work.
    Cancelled,
}

/// Why a source could not be read or written. The text names what failed and the next step, and holds no credential.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The address cannot be understood.
    #[error("`{uri}` is not a valid location: {problem}")]
    InvalidLocation {
        /// The address as written.
        uri: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// A scheme that is not built.
    #[error(
        "scheme `{scheme}://` is not supported: use hf://owner/name, s3://bucket/prefix, pvc://claim/path or https://host/path"
    )]
    UnsupportedScheme {
        /// The scheme as written.
        scheme: String,
    },
    /// The operation is not possible at this kind of location.
    #[error("cannot write to `{uri}`: results go to s3://bucket/prefix or pvc://claim/path")]
    ReadOnly {
        /// The address as written.
        uri: String,
    },
    /// The claim of a `pvc://` address is not mounted here.
    #[error("claim `{claim}` is not mounted here; mounted: {mounted}")]
    ClaimNotMounted {
        /// Name of the PersistentVolumeClaim.
        claim: String,
        /// Names that are mounted.
        mounted: String,
    },
    /// Credentials that cannot be read.
    #[error("credentials in {path}: {problem}")]
    InvalidCredentials {
        /// The mounted folder or file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Repository, revision, bucket, object or file does not exist.
    #[error("{what} does not exist; {next}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// What to do.
        next: String,
    },
    /// The server wants other credentials, or forbids.
    #[error("access to {what} was refused; {next}")]
    Unauthorized {
        /// What was asked for.
        what: String,
        /// What to do.
        next: String,
    },
    /// The repository's licence must be accepted on the hub first.
    #[error("{repo} is gated: {next}")]
    Gated {
        /// The repository.
        repo: String,
        /// What to do.
        next: String,
    },
    /// Weights exist only as pickle, which can run code when read.
    #[error(
        "{what} holds weights only as pickle ({files}), which can run code when read and is never opened; use safetensors (convert with `safetensors.torch.save_file`)"
    )]
    PickleRefused {
        /// The location.
        what: String,
        /// The refused files.
        files: String,
    },
    /// Nothing that Lathe reads is there.
    #[error("{what} holds no file that Lathe reads; it reads {reads}")]
    NothingToFetch {
        /// The location.
        what: String,
        /// The allow-list.
        reads: &'static str,
    },
    /// A name from outside that must not become a path.
    #[error("file name {name:?} is unsafe: {problem}")]
    UnsafeName {
        /// The name.
        name: String,
        /// Why.
        problem: &'static str,
    },
    /// More than the caller allows.
    #[error("{what} is {bytes} bytes; at most {limit} are allowed")]
    TooLarge {
        /// The file or the whole.
        what: String,
        /// Its size as far as it is known.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// More than the folder for downloads can hold.
    #[error("{what} needs {needed} bytes, and the folder for downloads has room for {room}")]
    NoRoom {
        /// The location.
        what: String,
        /// Its size.
        needed: u64,
        /// Bytes that can still come.
        room: u64,
    },
    /// The content is not what `digest` pins.
    #[error(
        "digest mismatch: `digest` pins {expected}, the content has {found}; the source has changed, or the pin is of another one"
    )]
    DigestMismatch {
        /// What was pinned or recorded.
        expected: Digest,
        /// What was read.
        found: Digest,
    },
    /// One file's bytes are not what its source announced.
    #[error("{file}: checksum mismatch: the source announces sha256 {expected}, the bytes have {found}")]
    ChecksumMismatch {
        /// The file.
        file: String,
        /// Announced, hex.
        expected: String,
        /// Read, hex.
        found: String,
    },
    /// Bytes that are not what their name says.
    #[error("{file} is malformed: {problem}")]
    Malformed {
        /// The file or answer.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// No room on the volume.
    #[error("no space left at {path}: {detail}; use a larger volume")]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Numbers, where known.
        detail: String,
    },
    /// Any other file error.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The server cannot be reached, or fails.
    #[error("{what}: {cause}")]
    Unreachable {
        /// The server or file.
        what: String,
        /// The last failure.
        cause: String,
        /// How long the server asks to wait.
        retry_after: Option<Duration>,
    },
    /// The server says no for another reason.
    #[error("{what} was refused: {cause}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The server's answer.
        cause: String,
    },
    /// The file changed while it was read.
    #[error("{what} changed while it was read; pin a revision or a digest, or try again when it is settled")]
    Changed {
        /// The file.
        what: String,
    },
    /// An upload to this place began and has not finished.
    #[error("{what} holds an unfinished upload; wait for its end, or write it again")]
    Incomplete {
        /// The location.
        what: String,
    },
    /// The destination holds something else already.
    #[error("{what} is in use already: {problem}; choose another destination or remove it")]
    AlreadyExists {
        /// The location.
        what: String,
        /// What is there.
        problem: String,
    },
    /// The caller stopped the work.
    #[error("stopped by request")]
    Cancelled,
}

impl SourceError {
    /// A stable CamelCase word, for conditions and metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidLocation { .. } => "InvalidLocation",
            Self::UnsupportedScheme { .. } => "UnsupportedScheme",
            Self::ReadOnly { .. } => "ReadOnlyLocation",
            Self::ClaimNotMounted { .. } => "ClaimNotMounted",
            Self::InvalidCredentials { .. } => "InvalidCredentials",
            Self::NotFound { .. } => "NotFound",
            Self::Unauthorized { .. } => "Unauthorized",
            Self::Gated { .. } => "GatedRepository",
            Self::PickleRefused { .. } => "PickleRefused",
            Self::NothingToFetch { .. } => "NothingToFetch",
            Self::UnsafeName { .. } => "UnsafeName",
            Self::TooLarge { .. } => "TooLarge",
            Self::NoRoom { .. } => "DownloadTooLarge",
            Self::DigestMismatch { .. } => "DigestMismatch",
            Self::ChecksumMismatch { .. } => "ChecksumMismatch",
            Self::Malformed { .. } => "Malformed",
            Self::DiskFull { .. } => "DiskFull",
            Self::Io { .. } => "InputOutput",
            Self::Unreachable { .. } => "Unreachable",
            Self::Refused { .. } => "Refused",
            Self::Changed { .. } => "SourceChanged",
            Self::Incomplete { .. } => "IncompleteUpload",
            Self::AlreadyExists { .. } => "AlreadyExists",
            Self::Cancelled => "Cancelled",
        }
    }

    /// Whose fault it is. A checksum mismatch counts as transient: the bytes were damaged on the way.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Cancelled => Fault::Cancelled,
            Self::Unreachable { .. }
            | Self::Changed { .. }
            | Self::ChecksumMismatch { .. }
            | Self::Incomplete { .. }
            | Self::Io { .. } => Fault::Transient,
            _ => Fault::User,
        }
    }

    /// Whether trying again later may succeed with nothing changed by the user.
    pub fn is_transient(&self) -> bool {
        self.fault() == Fault::Transient
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind;
        let path = path.to_path_buf();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                Self::DiskFull { path, detail: source.to_string() }
            }
            ErrorKind::NotFound => Self::NotFound {
                what: path.display().to_string(),
                next: "check the path and that its writer has finished".into(),
            },
            ErrorKind::PermissionDenied => Self::Unauthorized {
                what: path.display().to_string(),
                next: "let the pod's user or fsGroup read and write it".into(),
            },
            _ => Self::Io { path, source },
        }
    }

    pub(crate) fn unreachable(what: impl Into<String>, cause: impl Into<String>) -> Self {
        Self::Unreachable { what: what.into(), cause: printable(&cause.into()), retry_after: None }
    }

    pub(crate) fn malformed(file: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Malformed { file: printable(&file.into()), problem: printable(&problem.into()) }
    }
}

/// Text from outside, made fit for a status: one line, at most 300 characters.
pub(crate) fn printable(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    clean.trim().to_string()
}
