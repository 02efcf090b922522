//! Why a reconcile failed. What a user can mend is a condition, not an error.
use kube::core::Status;

use crate::pods::Trouble;

/// Why a reconcile failed; it is tried again with growing pauses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server did not answer a read.
    #[error("failed to read {what}: {source}")]
    Read {
        /// What was read.
        what: &'static str,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// The API server did not take a write.
    #[error("failed to {verb} {kind} {name}: {source}")]
    Write {
        /// `apply`, `create`, `delete` ...
        verb: &'static str,
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// An object of ours could not be written as JSON.
    #[error("failed to build {what}: {source}")]
    Build {
        /// What was built.
        what: &'static str,
        /// Why not.
        source: serde_json::Error,
    },
    /// An object under a name that we would use belongs to somebody else.
    #[error("{kind} {name} exists and is not of this object")]
    NameTaken {
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// It is on its way out: it belonged to an earlier object of the owner's name.
        leaving: bool,
    },
    /// What is of no use any more could not be deleted: no word on the object itself.
    #[error("what is of no use any more stays: {0}. Next: let the operator delete it; it is tried again")]
    CleanUp(#[source] Box<Error>),
}

/// What the status says of a round's writes, and how the round ends once it is written: a refusal is tried again with pauses
/// that grow.
///
/// # Errors
/// The round ends here: nobody knows yet what to say.
pub fn told(written: Result<(), Error>) -> Result<(Option<Trouble>, Result<(), Error>), Error> {
    match written {
        Ok(()) => Ok((None, Ok(()))),
        Err(error) if error.is_told() => Ok((error.refusal(), Err(error))),
        Err(error) => Err(error),
    }
}

impl Error {
    /// The label of the metric and the reason of the event.
    pub fn category(&self) -> &'static str {
        match self {
            Error::Read { .. } => "ReadFailed",
            Error::Write { .. } if self.refusal().is_some() => "WriteRefused",
            Error::Write { .. } => "WriteFailed",
            Error::Build { .. } => "BuildFailed",
            Error::NameTaken { .. } => "NameTaken",
            Error::CleanUp(source) => source.category(),
        }
    }

    /// True where the status says already what it can: a refusal, or how the object stands whatever is left beside it.
    pub fn is_told(&self) -> bool {
        matches!(self, Error::CleanUp(_)) || self.refusal().is_some()
    }

    /// What people are told where a write is refused for good (a quota, an admission rule, a missing right), or an object of
    /// somebody else is in the way: it is for the status, and tried again.
    pub fn refusal(&self) -> Option<Trouble> {
        let trouble =
            |reason: &str, message: String, stalled| Trouble { reason: reason.to_owned(), message, stalled };
        match self {
            Error::Write { verb, kind, name, .. } => {
                let status = self.status().filter(|s| matches!(s.code, 400 | 403 | 422))?;
                if self.is_gone() || is_another_object(status) {
                    return None;
                }
                let said = format!("the API server refuses to {verb} {kind} {name}: {}", status.message);
                let next = "Next: have that allowed; it is tried again.";
                Some(trouble("WriteRefused", format!("{}. {next}", said.trim_end_matches('.')), true))
            }
            Error::NameTaken { kind, name, leaving: true } => {
                let said = format!("{kind} {name} is of an earlier object of this name, and on its way out.");
                Some(trouble("NameTaken", said, false))
            }
            Error::NameTaken { kind, name, leaving: false } => {
                let next = if kind == "PersistentVolumeClaim" {
                    "Next: name other destinations, or label it `lathe.dev/kind=artifacts` to have results there."
                        .to_owned()
                } else {
                    format!("Next: delete {kind} {name}, or give this object another name.")
                };
                Some(trouble("NameTaken", format!("{self}, so it is left alone. {next}"), true))
            }
            _ => None,
        }
    }

    /// True where the object is gone or its namespace is going: nothing is left to do.
    pub fn is_gone(&self) -> bool {
        let terminating = |status: &Status| {
            let causes = status.details.iter().flat_map(|d| &d.causes);
            causes.into_iter().any(|c| c.reason == "NamespaceTerminating")
        };
        self.status().is_some_and(|status| status.is_not_found() || terminating(status))
    }

    /// The API server's answer to a write.
    fn status(&self) -> Option<&Status> {
        match self {
            Error::Write { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            Error::CleanUp(source) => source.status(),
            _ => None,
        }
    }
}

/// The object that was to be changed is gone, and another one has its name: the next round sees it.
fn is_another_object(status: &Status) -> bool {
    let mut causes = status.details.iter().flat_map(|details| &details.causes);
    causes.any(|cause| cause.field == "metadata.uid")
}
