//! A program that is watched while it runs: its memory, its processor time.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::proc::{USER_HZ, kilobytes, ticks};
use crate::command::last_lines;

/// Between two looks at a process.
const LOOK: Duration = Duration::from_millis(20);

/// Runs until it is dropped, ended or done.
pub struct Watched {
    child: Child,
    log: PathBuf,
    peaks: Arc<Peaks>,
    watcher: Option<JoinHandle<()>>,
}

/// The most memory that was seen, in bytes.
#[derive(Default)]
struct Peaks {
    resident: AtomicU64,
    own: AtomicU64,
    stop: AtomicBool,
}

/// The most memory that a process held, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// All pages, also those of mapped files, which the kernel can take back (the kernel's own count, `VmHWM`).
    pub resident: u64,
    /// Pages that are the process's alone (`RssAnon`, looked at 50 times a second).
    pub own: u64,
}

impl Watched {
    /// Starts the program; what it says goes to `log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        Self::start_with(command, log, Stdio::null())
    }

    /// As [`Watched::start`], and listens to [`Watched::tell`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_listening(command: &mut Command, log: &Path) -> Result<Self> {
        Self::start_with(command, log, Stdio::piped())
    }

    fn start_with(command: &mut Command, log: &Path, stdin: Stdio) -> Result<Self> {
        let said = File::create(log)?;
        let child = command
            .stdin(stdin)
            .stdout(said.try_clone()?)
            .stderr(said)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let (pid, peaks) = (child.id(), Arc::new(Peaks::default()));
        let seen = Arc::clone(&peaks);
        let watcher = spawn(move || {
            while !seen.stop.load(Relaxed) {
                if let Some(Memory { resident, own }) = memory(pid) {
                    seen.resident.fetch_max(resident, Relaxed);
                    seen.own.fetch_max(own, Relaxed);
                }
                sleep(LOOK);
            }
        });
        Ok(Self { child, log: log.to_path_buf(), peaks, watcher: Some(watcher) })
    }

    /// Writes a line to its stdin.
    ///
    /// # Errors
    /// It has ended; the text has its last words.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("this program does not listen")?;
        let told = writeln!(stdin, "{line}").and_then(|()| stdin.flush());
        told.with_context(|| format!("the program does not listen any more:\n{}", self.last_words()))
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file of what it says.
    pub fn log(&self) -> PathBuf {
        self.log.clone()
    }

    /// The most that it has held until now.
    pub fn memory(&self) -> Memory {
        Memory { resident: self.peaks.resident.load(Relaxed), own: self.peaks.own.load(Relaxed) }
    }

    /// Seconds of a processor that it has used until now; 0 once it is gone.
    pub fn processor_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        ticks(&stat).map_or(0.0, |ticks| ticks as f64 / USER_HZ)
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The kernel does not know the process.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Asks again and again until there is an answer.
    ///
    /// # Errors
    /// The program ends or the time is over before; the text has its last words.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut ask: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let started = Instant::now();
        loop {
            if let Some(answer) = ask() {
                return Ok(answer);
            }
            if let Some(status) = self.ended()? {
                bail!("{what}: the program ended with {status}:\n{}", self.last_words());
            }
            if started.elapsed() > patience {
                bail!("{what}: nothing after {} s:\n{}", patience.as_secs(), self.last_words());
            }
            sleep(LOOK);
        }
    }

    /// The end of what it said.
    pub fn last_words(&self) -> String {
        last_lines(&fs::read_to_string(&self.log).unwrap_or_default(), 20)
    }

    /// Ends it by SIGTERM and waits.
    ///
    /// # Errors
    /// It does not end.
    pub fn end(mut self) -> Result<()> {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.peaks.stop.store(true, Relaxed);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

fn memory(pid: u32) -> Option<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Memory {
        resident: kilobytes(&status, "VmHWM:")? * 1024,
        own: kilobytes(&status, "RssAnon:")? * 1024,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_watched_until_its_end() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut program = Watched::start(
            Command::new("sh").args(["-c", "echo words; exec sleep 60"]),
            &folder.path().join("log"),
        )?;
        let seconds = Duration::from_secs(20);
        let peaks = Arc::clone(&program.peaks);
        program.wait_for("memory", seconds, || (peaks.resident.load(Relaxed) > 0).then_some(()))?;
        assert!(program.ended()?.is_none());
        program.end()?;

        let mut short = Watched::start(
            Command::new("sh").args(["-c", "echo words; exit 3"]),
            &folder.path().join("log"),
        )?;
        let error = short.wait_for("an answer", seconds, || None::<()>).err().map(|error| error.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains("exit status: 3") && error.contains("words"), "{error}");
        Ok(())
    }
}
