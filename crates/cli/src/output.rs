//! How a command answers.
use std::io::Write as _;

/// Form of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Prints a line. False: nobody reads any more, as after `| head`; that is no failure.
pub fn say(line: &str) -> bool {
    say_part(&format!("{line}\n"))
}

/// Prints text as it is, at once.
pub fn say_part(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}

/// A line beside the answer, on standard error.
pub fn note(line: &str) {
    // Where nobody reads any more, the work goes on.
    let _ = writeln!(std::io::stderr(), "{line}");
}
