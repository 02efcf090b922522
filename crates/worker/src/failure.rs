//! Why work ended before its end: one true cause, whose fault it is, and the next step.
use std::fmt::Display;

use lathe_contract::Failure;
use lathe_engine::files::FileError;
use lathe_source::{Fault, SourceError};

/// What a step of the work returns.
pub type Done<T> = Result<T, Halt>;

/// Longest message that readers keep whole.
const MAX_MESSAGE: usize = 512;

/// Why the work goes no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// Somebody asked the worker to stop (SIGTERM): no failure, the next pod goes on.
    Stopped,
    /// It failed.
    Failed(Trouble),
}

/// One true cause and the next step, still apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// CamelCase.
    pub reason: String,
    /// What happened.
    pub cause: String,
    /// What to do.
    pub next: String,
    /// Another try cannot help.
    pub user_error: bool,
}

impl Halt {
    /// A cause that only the user can take away.
    pub fn user(reason: &str, cause: impl Display, next: &str) -> Self {
        Self::new(reason, cause, next, true)
    }

    /// A cause that another try may take away.
    pub fn transient(reason: &str, cause: impl Display, next: &str) -> Self {
        Self::new(reason, cause, next, false)
    }

    fn new(reason: &str, cause: impl Display, next: &str, user_error: bool) -> Self {
        let cause = cause.to_string();
        Halt::Failed(Trouble { reason: reason.to_owned(), cause, next: next.to_owned(), user_error })
    }

    /// The same failure of `what`, e.g. "base model `x`".
    #[must_use]
    pub fn of(self, what: &str) -> Self {
        match self {
            Halt::Stopped => Halt::Stopped,
            Halt::Failed(trouble) => {
                Halt::Failed(Trouble { cause: format!("{what}: {}", trouble.cause), ..trouble })
            }
        }
    }
}

impl From<Trouble> for Failure {
    /// The cause is cut where it is too long, never the next step.
    fn from(trouble: Trouble) -> Self {
        let Trouble { reason, cause, next, user_error } = trouble;
        let next = format!(". Next: {next}.");
        let mut cause = cause.trim_end_matches(['.', ' ']).to_owned();
        let room = MAX_MESSAGE.saturating_sub(next.len());
        if cause.len() > room {
            let end = (0..=room.saturating_sub('…'.len_utf8()))
                .rev()
                .find(|&at| cause.is_char_boundary(at))
                .unwrap_or_default();
            cause.truncate(end);
            cause.push('…');
        }
        Failure { reason, message: cause + &next, user_error }
    }
}

impl From<SourceError> for Halt {
    fn from(error: SourceError) -> Self {
        let next = match &error {
            SourceError::InvalidLocation { .. }
            | SourceError::UnsupportedScheme { .. }
            | SourceError::ReadOnly { .. }
            | SourceError::UnsafeName { .. } => "correct `uri` and create the object again",
            SourceError::ClaimNotMounted { .. } => "name a PersistentVolumeClaim of this namespace in `uri`",
            // A file of a volume: no Secret helps.
            SourceError::Unauthorized { what, next } if what.starts_with('/') => {
                return Halt::user(error.reason(), format!("access to {what} was refused"), next);
            }
            SourceError::InvalidCredentials { .. } | SourceError::Unauthorized { .. } => {
                "correct the Secret that `secretRef` names"
            }
            SourceError::Gated { .. } => "accept the licence there, and give a token by `secretRef`",
            SourceError::NotFound { .. } | SourceError::NothingToFetch { .. } => {
                "correct `uri` or put the files there"
            }
            SourceError::PickleRefused { .. } => "convert the weights to safetensors",
            SourceError::DigestMismatch { .. } => {
                "restore the files, or make the Model again where the change is meant (or correct its `digest`)"
            }
            SourceError::NoRoom { .. } => {
                "put the files on a PersistentVolumeClaim, and name them as pvc://<claim>/<path> in a new object"
            }
            SourceError::DiskFull { .. } => "enlarge the volume, or free space on it",
            SourceError::AlreadyExists { .. } => {
                "choose another `output.destination`, or remove what is there"
            }
            SourceError::TooLarge { .. } | SourceError::Malformed { .. } => "replace the damaged file",
            SourceError::Refused { .. } => "correct the location or its credentials",
            SourceError::ChecksumMismatch { .. }
            | SourceError::Io { .. }
            | SourceError::Unreachable { .. }
            | SourceError::Changed { .. }
            | SourceError::Incomplete { .. } => {
                "nothing: it is tried again; if it stays, look at that server or volume"
            }
            SourceError::Cancelled => return Halt::Stopped,
        };
        Halt::new(error.reason(), &error, next, error.fault() == Fault::User)
    }
}

impl From<FileError> for Halt {
    fn from(error: FileError) -> Self {
        let (reason, next) = match &error {
            FileError::Io { source, .. } => return io(source, &error),
            FileError::Unsupported { what, .. } if what.starts_with("architecture") => {
                ("UnsupportedArchitecture", "choose a model of a supported architecture")
            }
            FileError::Unsupported { .. } => ("UnsupportedModel", "choose a model without it"),
            FileError::Pickle { .. } => ("PickleRefused", "convert the weights to safetensors"),
            FileError::TooLarge { .. }
            | FileError::Field { .. }
            | FileError::Malformed { .. }
            | FileError::MissingTensor { .. } => ("MalformedModel", "replace the model's files"),
            FileError::Template(_) => {
                ("ChatTemplateFailed", "correct the model's chat template, or shorten the messages")
            }
            FileError::Refused(_) => ("ChatTemplateFailed", "correct the messages"),
            FileError::Tokenizer(_) => ("TokenizerFailed", "replace the model's tokenizer.json"),
            FileError::Engine(_) => {
                let FileError::Engine(engine) = error else { return Halt::Stopped };
                return engine.into();
            }
        };
        Halt::user(reason, &error, next)
    }
}

impl From<lathe_engine::Error> for Halt {
    fn from(error: lathe_engine::Error) -> Self {
        use lathe_engine::Error;
        use lathe_plan::PlanError;
        let (reason, next) = match &error {
            Error::Interrupted => return Halt::Stopped,
            Error::Io(source) => return io(source, &error),
            Error::MissingTensor { .. } | Error::TensorShape { .. } | Error::TensorBytes { .. } => {
                ("MalformedModel", "replace the model's files")
            }
            Error::Source { source, .. } => {
                return Halt::user(
                    "MalformedModel",
                    format!("{error}: {source}"),
                    "replace the model's files",
                );
            }
            Error::Plan(PlanError::DoesNotFit { .. }) => {
                ("DoesNotFit", "give the pod more memory, or choose a smaller `sequenceLength` or LoRA")
            }
            Error::Plan(_) => ("InvalidSettings", "correct that field"),
            Error::CpuLevel { .. } => ("InvalidSettings", "correct or remove that environment variable"),
            Error::NotFinite { .. } => (
                "NonFiniteLoss",
                "lower `training.learningRate` or raise `training.warmup`, and look at the rows of that step",
            ),
            Error::Row { .. } | Error::Sequence { .. } => ("InvalidRow", "correct the row"),
            Error::Adapter { .. } => {
                ("AdapterBaseMismatch", "use the adapter with the base that it was made for")
            }
            Error::State { .. } => ("CheckpointUnusable", "remove the checkpoint"),
            Error::OutOfMemory { .. } => {
                return Halt::transient("OutOfMemory", &error, "give the pod more memory");
            }
            Error::OtherPlan { .. } | Error::Quantized { .. } => {
                return Halt::transient("InternalError", &error, "report this to Lathe's maintainers");
            }
        };
        Halt::user(reason, &error, next)
    }
}

/// A failed read or write, told apart by what can cure it.
pub fn io(source: &std::io::Error, text: &dyn Display) -> Halt {
    use std::io::ErrorKind;
    let text = match text.to_string() {
        whole if whole.contains(&source.to_string()) => whole,
        part => format!("{part}: {source}"),
    };
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Halt::user("DiskFull", text, "enlarge the volume, or free space on it")
        }
        ErrorKind::NotFound => Halt::user("NotFound", text, "put the file there"),
        ErrorKind::PermissionDenied => {
            Halt::user("Unauthorized", text, "let the pod's user or fsGroup read and write it")
        }
        _ => Halt::transient(
            "InputOutput",
            text,
            "nothing: it is tried again; if it stays, look at the volume",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn failure(halt: Halt) -> Failure {
        match halt {
            Halt::Failed(trouble) => trouble.into(),
            Halt::Stopped => panic!("stopped"),
        }
    }

    #[rstest]
    #[case(std::io::ErrorKind::StorageFull, "DiskFull", true)]
    #[case(std::io::ErrorKind::PermissionDenied, "Unauthorized", true)]
    #[case(std::io::ErrorKind::ConnectionReset, "InputOutput", false)]
    fn a_failed_write_is_told_apart_by_its_cure(
        #[case] kind: std::io::ErrorKind,
        #[case] reason: &str,
        #[case] user: bool,
    ) {
        let failure = failure(lathe_engine::Error::Io(kind.into()).into());
        assert_eq!((failure.reason.as_str(), failure.user_error), (reason, user));
        assert!(failure.message.contains(&std::io::Error::from(kind).to_string()), "{}", failure.message);
        assert!(failure.message.contains(". Next: "), "{}", failure.message);
    }

    #[test]
    fn a_long_cause_never_hides_the_next_step() {
        let failure = failure(Halt::user("X", "é".repeat(600), "do this").of("data"));
        assert!(failure.message.len() <= MAX_MESSAGE);
        assert!(failure.message.starts_with("data: é") && failure.message.ends_with("…. Next: do this."));
    }

    #[rstest]
    #[case::volume(
        "/lathe/volumes/data/x",
        "let the pod's user read it",
        "refused. Next: let the pod's user read it."
    )]
    #[case::server(
        "s3://b/x",
        "check the key",
        "check the key. Next: correct the Secret that `secretRef` names."
    )]
    fn who_may_not_read_is_told_what_helps_there(#[case] what: &str, #[case] next: &str, #[case] ends: &str) {
        let error = SourceError::Unauthorized { what: what.into(), next: next.into() };
        let message = failure(error.into()).message;
        assert!(message.ends_with(ends), "{message}");
    }

    #[test]
    fn a_cancelled_source_is_a_stop_and_no_failure() {
        assert_eq!(Halt::from(SourceError::Cancelled), Halt::Stopped);
        assert_eq!(Halt::Stopped.of("x"), Halt::Stopped);
    }
}
