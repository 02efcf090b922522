//! How a command fails: one cause with the next step for people, a reason and an exit code for programs.
use lathe_contract::{Failure, exit};
use lathe_resolve::Rejection;

/// Something that ends a command.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// Exit code, see [`HELP`].
    pub code: i32,
    /// CamelCase, the same words as the conditions of a cluster.
    pub reason: String,
    /// The cause and the next step.
    pub message: String,
}

/// For the help texts.
pub const HELP: &str = "Exit codes:
  0   done
  1   failed; the same command may succeed later (network, cluster, a worker that was killed)
  2   the command line is wrong
  64  the manifest, the data or a model is wrong, or a gate failed: the same command fails again
  75  stopped by Ctrl-C or SIGTERM; tuning goes on where it was when the command runs again";

/// A command's result.
pub type Done<T> = Result<T, Problem>;

impl Problem {
    /// What the user gave cannot be used; trying again cannot help.
    pub fn user(reason: &str, message: impl Into<String>) -> Self {
        Self { code: exit::USER, reason: reason.to_owned(), message: message.into() }
    }

    /// What may pass.
    pub fn transient(reason: &str, message: impl Into<String>) -> Self {
        Self { code: exit::TRANSIENT, reason: reason.to_owned(), message: message.into() }
    }

    /// Asked to stop.
    pub fn stopped(message: impl Into<String>) -> Self {
        Self { code: exit::STOPPED, reason: "Stopped".to_owned(), message: message.into() }
    }

    /// The same, said of `what`.
    pub fn of(self, what: impl std::fmt::Display) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }

    /// A file or folder that cannot be used.
    pub fn io(verb: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::transient("InputOutput", format!("cannot {verb} {}: {error}", path.display()))
    }
}

impl From<Rejection> for Problem {
    fn from(rejection: Rejection) -> Self {
        Self::user(rejection.reason, rejection.message)
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let code = if failure.user_error { exit::USER } else { exit::TRANSIENT };
        Self { code, reason: failure.reason, message: failure.message }
    }
}
