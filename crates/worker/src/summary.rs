//! A worker's last words: the termination message and the exit code.
use std::path::Path;

use lathe_contract::{Outcome, Summary, exit};

use crate::failure::Halt;

/// What the last words say of how the task ended.
pub fn outcome(result: Result<Outcome, Halt>, stopped_at: Option<lathe_contract::TrainProgress>) -> Outcome {
    match result {
        Ok(outcome) => outcome,
        Err(Halt::Stopped) => Outcome::Stopped { progress: stopped_at },
        Err(Halt::Failed(trouble)) => Outcome::Failed(trouble.into()),
    }
}

/// The code that the Job's podFailurePolicy reads.
pub fn exit_code(outcome: &Outcome) -> i32 {
    match outcome {
        Outcome::Trained { .. } | Outcome::Inspected(_) | Outcome::DataChecked(_) | Outcome::Evaluated(_) => {
            exit::SUCCESS
        }
        Outcome::Stopped { .. } => exit::STOPPED,
        Outcome::Failed(failure) if failure.user_error => exit::USER,
        Outcome::Failed(_) => exit::TRANSIENT,
    }
}

/// Writes the summary to `path`, and a line of it to the log. A summary that cannot be written is told in the log: the
/// exit code says the rest.
pub fn write(path: &Path, outcome: Outcome) {
    match &outcome {
        Outcome::Failed(failure) => {
            tracing::error!(reason = failure.reason, user_error = failure.user_error, "{}", failure.message);
        }
        Outcome::Stopped { .. } => tracing::info!("stopped; the next pod goes on from what was saved"),
        _ => tracing::info!("done"),
    }
    let bytes = Summary { outcome }.to_bytes();
    if let Err(error) = std::fs::write(path, bytes) {
        tracing::warn!(path = %path.display(), %error, "the summary could not be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(Ok(Outcome::Inspected(Default::default())), exit::SUCCESS)]
    #[case(Err(Halt::Stopped), exit::STOPPED)]
    #[case(Err(Halt::user("MalformedRow", "x", "y")), exit::USER)]
    #[case(Err(Halt::transient("Unreachable", "x", "y")), exit::TRANSIENT)]
    fn exit_codes(#[case] result: Result<Outcome, Halt>, #[case] code: i32) {
        assert_eq!(exit_code(&outcome(result, None)), code);
    }
}
