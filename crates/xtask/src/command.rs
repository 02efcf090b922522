//! Running other programs, with errors that show what they said.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// How much of a failed program's output an error repeats.
const LINES_SHOWN: usize = 20;

/// cargo, in the root of the repository, as a shell would start it: what cargo told this program of itself would make
/// build scripts that look at it (ring's) run again, and all that depends on them compile anew.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(crate::paths::repository());
    let told =
        |name: &str| name == "CARGO" || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(told) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Runs to the end and returns what was written to stdout.
///
/// # Errors
/// The program cannot be started or its status is not zero; the text has its last lines.
pub fn run(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", shown(command)))?;
    checked(command, output)
}

/// As [`run`], with `input` on stdin.
///
/// # Errors
/// As [`run`].
pub fn run_with(command: &mut Command, input: &[u8]) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early closes the pipe; its status says why.
        let _ = stdin.write_all(input);
    }
    let output = child.wait_with_output()?;
    checked(command, output)
}

fn checked(command: &Command, output: Output) -> Result<String> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let said = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    bail!("{} ended with {}:\n{}", shown(command), output.status, last_lines(&said, LINES_SHOWN))
}

/// The last `count` lines of `text`.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    let mut line = words.join(" ");
    if line.len() > 300 {
        let end = line.floor_char_boundary(300);
        line.replace_range(end.., " ...");
    }
    line
}
