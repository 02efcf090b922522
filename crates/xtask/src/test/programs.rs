//! The workspace's test programs: built once, all together, so that every dependency is compiled once.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{command, ui};

/// Of an environment that tests get as it is.
pub const NOTHING: &[(&str, &str)] = &[];

/// A program that cargo built from tests.
pub struct TestProgram {
    /// Package that it tests.
    pub package: String,
    /// Name of the library, binary or test file.
    pub name: String,
    path: PathBuf,
    folder: PathBuf,
}

/// Builds every test of the workspace, and the programs that tests start.
///
/// # Errors
/// Something does not compile; cargo has said what.
pub fn build() -> Result<Vec<TestProgram>> {
    let step = ui::step("build all tests");
    step.expect("about 10 minutes from scratch on 2 cores");
    let mut cargo = command::cargo();
    // `cargo test` leaves out a program whose own package has no test that starts it.
    cargo.args(["build", "--workspace", "--bins", "--tests"]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    let output =
        cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(output.status.success(), "the tests do not build: see above");
    let messages = String::from_utf8_lossy(&output.stdout);
    let programs: Vec<_> = messages.lines().filter_map(program).collect();
    ensure!(!programs.is_empty(), "cargo built no test");
    step.done(&format!("{} programs", programs.len()));
    Ok(programs)
}

/// A line of cargo's JSON, where it speaks of a test program.
fn program(line: &str) -> Option<TestProgram> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["profile"]["test"] != true {
        return None;
    }
    let folder = PathBuf::from(message["manifest_path"].as_str()?).parent()?.to_path_buf();
    // `path+file:///checkout/crates/api#lathe-api@0.1.0`, and without a name where the folder has it.
    let id = message["package_id"].as_str()?.rsplit(['#', '/']).next()?;
    let package = match id.split_once('@') {
        Some((name, _)) => name.to_owned(),
        None => folder.file_name()?.to_str()?.to_owned(),
    };
    Some(TestProgram {
        package,
        name: message["target"]["name"].as_str()?.to_owned(),
        path: PathBuf::from(message["executable"].as_str()?),
        folder,
    })
}

/// Runs programs one after the other; all of them, even when one fails.
///
/// # Errors
/// Tests failed, or there were none to run.
pub fn run_all<'a, V: AsRef<OsStr>>(
    programs: impl Iterator<Item = &'a TestProgram>,
    environment: &[(&str, V)],
    args: &[&str],
) -> Result<()> {
    let (mut ran, mut failed) = (0, Vec::new());
    for program in programs {
        ran += 1;
        println!("     Running {}", program.label());
        let mut test = program.command(environment, args);
        let status = test.status().with_context(|| format!("cannot start {}", program.path.display()))?;
        if !status.success() {
            failed.push(program.label());
        }
    }
    ensure!(ran > 0, "there was no test to run");
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

impl TestProgram {
    /// Runs it while others run; each line that it prints begins with the number of its lane.
    ///
    /// # Errors
    /// A test failed.
    pub fn run_beside<V: AsRef<OsStr>>(
        &self,
        lane: u32,
        environment: &[(&str, V)],
        args: &[&str],
    ) -> Result<()> {
        println!("{lane}|      Running {}", self.label());
        let mut test = self.command(environment, args);
        let mut child = test
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.path.display()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            scope.spawn(|| stdout.map(|pipe| pass_on(lane, pipe)));
            scope.spawn(|| stderr.map(|pipe| pass_on(lane, pipe)));
        });
        ensure!(child.wait()?.success(), "{}", self.label());
        Ok(())
    }

    fn label(&self) -> String {
        format!("{}/{}", self.package, self.name)
    }

    /// In its package's folder, as cargo does.
    fn command<V: AsRef<OsStr>>(&self, environment: &[(&str, V)], args: &[&str]) -> Command {
        let mut test = Command::new(&self.path);
        test.args(args).current_dir(&self.folder).env("CARGO_MANIFEST_DIR", &self.folder);
        test.envs(environment.iter().map(|(name, value)| (name, value)));
        test
    }
}

/// Prints lines as they come, whole, until the pipe ends.
fn pass_on(lane: u32, pipe: impl Read) {
    let mut lines = BufReader::new(pipe);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(read) if read > 0) {
        println!("{lane}| {}", String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::program;

    #[test]
    fn a_program_is_known_by_its_package_and_target() {
        let line = |id: &str, test: bool| {
            format!(
                r#"{{"package_id":"{id}","manifest_path":"/c/crates/xtask/Cargo.toml","profile":{{"test":{test}}},"target":{{"name":"t"}},"executable":"/c/t"}}"#
            )
        };
        let of = |id: &str| program(&line(id, true)).map(|p| (p.package, p.name));
        assert_eq!(of("path+file:///c/crates/xtask#0.1.0"), Some(("xtask".into(), "t".into())));
        assert_eq!(of("path+file:///c/crates/api#lathe-api@0.1.0"), Some(("lathe-api".into(), "t".into())));
        assert!(program(&line("path+file:///c/crates/xtask#0.1.0", false)).is_none());
        assert!(program("text").is_none());
    }
}
