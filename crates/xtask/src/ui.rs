//! What the user sees while a step runs: one line a step, with the time it took.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way. Dropped without [`Step::done`], it is shown as failed.
pub struct Step {
    what: String,
    started: Instant,
    bar: ProgressBar,
    finished: bool,
}

/// Starts a step: a spinner on a terminal, a plain line elsewhere.
pub fn step(what: impl Into<String>) -> Step {
    let what = what.into();
    let bar = if std::io::stderr().is_terminal() {
        let bar = ProgressBar::new_spinner();
        bar.set_style(style("  {spinner} {msg} ({elapsed})"));
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    } else {
        ProgressBar::hidden()
    };
    bar.set_message(what.clone());
    Step { what, started: Instant::now(), bar, finished: false }
}

/// A heading above the steps of one command.
pub fn heading(text: &str) {
    eprintln!("{text}");
}

/// A line between steps.
pub fn note(text: &str) {
    eprintln!("    {text}");
}

impl Step {
    /// Says before a long step how long it usually takes, for those who see no progress bar.
    pub fn expect(&self, duration: &str) {
        if self.bar.is_hidden() {
            eprintln!("  .. {}: {duration}", self.what);
        } else {
            self.bar.set_message(format!("{}: {duration}", self.what));
        }
    }

    /// Turns the spinner into a bar of `total` units.
    pub fn measured(&self, total: u64, unit: &str) {
        self.bar.set_length(total);
        self.bar.set_style(style(&format!(
            "  {{spinner}} {{msg}} [{{bar:30}}] {{pos}}/{{len}} {unit} ({{elapsed}}, {{eta}} left)"
        )));
    }

    /// Moves the bar to `position`.
    pub fn at(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// Ends the step well; `detail` says what came of it and may be empty.
    pub fn done(mut self, detail: &str) {
        self.close("ok", detail);
    }

    fn close(&mut self, sign: &str, detail: &str) {
        self.finished = true;
        self.bar.finish_and_clear();
        let seconds = self.started.elapsed().as_secs_f64();
        let separator = if detail.is_empty() { "" } else { ": " };
        eprintln!("  {sign} {}{separator}{detail} ({seconds:.1} s)", self.what);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.close("FAILED", "");
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
