//! What the worker says of itself while it works; read by the control port, written by the work.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lathe_contract::{Phase, Report};

/// The one report of this process.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Report>>);

impl Status {
    /// The report as it stands.
    pub fn read(&self) -> Report {
        self.lock().clone()
    }

    /// Changes the report.
    pub fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.lock());
    }

    /// A new phase, with words for a person.
    pub fn phase(&self, phase: Phase, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(?phase, "{message}");
        self.update(|report| (report.phase, report.message) = (phase, message));
    }

    /// New words in the same phase.
    pub fn say(&self, message: impl Into<String>) {
        let message = message.into();
        self.update(|report| report.message = message);
    }

    /// A report is whole after every change, so one that panicked half-way spoils nothing.
    fn lock(&self) -> MutexGuard<'_, Report> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
