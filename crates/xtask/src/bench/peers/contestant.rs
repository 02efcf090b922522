//! Who takes part, and what each of them can do.

use anyhow::{Result, ensure};
use lathe_plan::Precision;

use super::super::models::Model;
use super::Ground;
use super::driver::Driver;
use super::ours::Ours;
use super::task::{Task, Unit};

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// Ours.
    Lathe,
    /// torch with transformers and peft.
    Torch,
    /// The same with torch.compile.
    Compiled,
    /// Through llama-cpp-python.
    LlamaCpp,
    /// OpenVINO GenAI.
    OpenVino,
}

/// In the order of the table's columns.
pub const CONTESTANTS: [Contestant; 5] =
    [Contestant::Lathe, Contestant::Torch, Contestant::Compiled, Contestant::LlamaCpp, Contestant::OpenVino];

/// A process that holds the model.
pub enum Session {
    /// Ours.
    Ours(Ours),
    /// A peer's.
    Peer(Driver),
}

impl Contestant {
    /// As the table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lathe => "Lathe",
            Self::Torch => "torch",
            Self::Compiled => "torch.compile",
            Self::LlamaCpp => "llama.cpp",
            Self::OpenVino => "OpenVINO GenAI",
        }
    }

    /// As `driver/main.py` calls it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Lathe => "lathe",
            Self::Torch => "torch",
            Self::Compiled => "compiled",
            Self::LlamaCpp => "llama",
            Self::OpenVino => "openvino",
        }
    }

    /// Whether it does this kind of work at all.
    ///
    /// # Errors
    /// It does not; the text says why.
    pub fn can(self, ground: &Ground, precision: Precision, task: &Task) -> Result<()> {
        ground.python.has(self)?;
        let torch = matches!(self, Self::Torch | Self::Compiled);
        let quantized = matches!(precision, Precision::Int8 | Precision::Int4);
        ensure!(
            !(torch && quantized),
            "transformers has no weights of 8 or 4 bits for a CPU without further packages"
        );
        let training = matches!(task, Task::Train { .. });
        ensure!(!(training && matches!(self, Self::LlamaCpp | Self::OpenVino)), "it does not train");
        Ok(())
    }

    /// Starts a process; with the model in it, once it has done some work.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(self, ground: &Ground, model: &Model, precision: Precision, task: &Task) -> Result<Session> {
        Ok(match self {
            Self::Lathe => Session::Ours(Ours::start(ground, model, precision, task)?),
            _ => Session::Peer(Driver::start(ground, self, model, precision)?),
        })
    }
}

impl Session {
    /// Does the work once.
    ///
    /// # Errors
    /// It fails, or takes longer than anybody waits.
    pub fn measure(&mut self, task: &Task) -> Result<Vec<(Unit, f64)>> {
        match self {
            Self::Ours(ours) => ours.measure(task),
            Self::Peer(driver) => driver.measure(task),
        }
    }

    /// Whether it still answers, after what it could not do.
    pub fn answers(&self) -> bool {
        match self {
            Self::Ours(_) => true,
            Self::Peer(driver) => driver.answers(),
        }
    }
}
