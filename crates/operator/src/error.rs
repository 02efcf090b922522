//! Why a reconcile failed. What a user can mend is a condition, not an error.
use kube::core::Status;

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
    #[error("{kind} {name} exists and is not ours; rename or delete it")]
    NameTaken {
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
    },
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
        }
    }

    /// What the API server said where it refused for good (a quota, an admission rule, a missing right): people must act.
    pub fn refusal(&self) -> Option<String> {
        match self {
            Error::Write { verb, kind, name, .. } => {
                let status =
                    self.status().filter(|s| matches!(s.code, 400 | 403 | 422) && !self.is_gone())?;
                Some(format!("the API server refuses to {verb} {kind} {name}: {}", status.message))
            }
            Error::NameTaken { .. } => Some(self.to_string()),
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
            _ => None,
        }
    }
}
