//! A worker's last words: the termination message and the exit code.
use std::path::Path;

use lathe_contract::{Outcome, Summary, TrainProgress, exit};

use crate::failure::Halt;

/// What the last words say of how the task ended.
pub fn outcome(result: Result<Outcome, Halt>, stopped_at: Option<TrainProgress>) -> Outcome {
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
        Outcome::Stopped { progress } => tracing::info!("{}", stopped(progress.as_ref())),
        _ => tracing::info!("done"),
    }
    let bytes = Summary { outcome }.to_bytes();
    if let Err(error) = std::fs::write(path, bytes) {
        tracing::warn!(path = %path.display(), %error, "the summary could not be written");
    }
}

/// What the next pod finds of a task that was told to stop.
fn stopped(at: Option<&TrainProgress>) -> String {
    match at {
        None => "stopped; there was nothing to save".to_owned(),
        Some(at) if at.checkpoint_step >= at.step => {
            format!("stopped at step {}, which is saved: the next pod goes on from there", at.step)
        }
        Some(at) => format!(
            "stopped at step {}, which is not saved: the next pod goes on from step {}",
            at.step, at.checkpoint_step
        ),
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

    #[rstest]
    #[case::saved(Some((7, 7)), "stopped at step 7, which is saved")]
    #[case::no_time_was_left(Some((7, 5)), "stopped at step 7, which is not saved: the next pod goes on from step 5")]
    #[case::before_training(None, "there was nothing to save")]
    fn only_what_is_saved_is_called_so(#[case] at: Option<(i64, i64)>, #[case] says: &str) {
        let at = at.map(|(step, checkpoint_step)| TrainProgress {
            step,
            checkpoint_step,
            ..TrainProgress::default()
        });
        let said = stopped(at.as_ref());
        assert!(said.contains(says), "{said}");
    }
}
