//! What is done: the rows of a table.

use std::fmt;

use lathe_plan::Precision;
use serde::Serialize;

use super::super::stats::number;

/// Work that every contestant is asked for, as the peers' driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum Task {
    /// Reads one prompt.
    Prefill {
        /// Of the prompt.
        tokens: usize,
    },
    /// Continues several prompts, the likeliest token each.
    Decode {
        /// Sequences at the same time.
        batch: usize,
        /// Tokens of a prompt.
        context: usize,
        /// Tokens of an answer.
        tokens: usize,
    },
    /// Trains, with no activations computed twice.
    Train {
        /// All weights; otherwise LoRA on all linear layers.
        full: bool,
        /// Of a step.
        rows: usize,
        /// Tokens of a row.
        length: usize,
        /// That are measured, after one that is not.
        steps: usize,
    },
    /// A new process, its files in the page cache, until it has generated one token.
    First,
}

/// What a figure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Unit {
    /// Tokens a second: more is better.
    Rate,
    /// Seconds: less is better.
    Seconds,
    /// Of them what a Python peer's imports take.
    Imports,
    /// Peak memory in bytes: less is better.
    Bytes,
}

/// Tokens of a prompt that is continued.
const CONTEXT: usize = 32;
const LONG: usize = 8192;

/// What is done with the model, at each precision. A look leaves out long prompts.
pub fn groups(model: &str, quick: bool) -> Vec<(Precision, Vec<Task>)> {
    // Enough that most are generated while all sequences are: their prompts are read first.
    let tokens = 64;
    let decode = |batch| Task::Decode { batch, context: CONTEXT, tokens };
    let inference = [Task::Prefill { tokens: 512 }, decode(1), decode(8), decode(32)];
    let train = |full| Task::Train { full, rows: 4, length: 256, steps: if quick { 1 } else { 2 } };
    let mut bf16 = inference.to_vec();
    if model == "Q05" {
        if !quick {
            bf16.extend([Task::Prefill { tokens: 4096 }, Task::Decode { batch: 1, context: LONG, tokens }]);
        }
        bf16.extend([train(false), train(true), Task::First]);
    } else {
        bf16.push(train(false));
    }
    vec![
        (Precision::BF16, bf16),
        (Precision::Int8, inference.to_vec()),
        (Precision::Int4, inference.to_vec()),
    ]
}

impl Task {
    /// Whether it needs a process of its own.
    pub fn alone(&self) -> bool {
        matches!(self, Self::Train { .. } | Self::First)
    }

    /// What is measured of it.
    pub fn units(&self) -> Vec<Unit> {
        match self {
            Self::Train { .. } => vec![Unit::Rate, Unit::Bytes],
            Self::First => vec![Unit::Seconds, Unit::Imports],
            _ => vec![Unit::Rate],
        }
    }

    /// Little of the same, before it is measured.
    pub fn short(&self) -> Self {
        match *self {
            Self::Decode { batch, context, .. } => Self::Decode { batch, context, tokens: 4 },
            same => same,
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill { tokens } => write!(f, "prefill {tokens}"),
            Self::Decode { batch, context: LONG, .. } => write!(f, "decode, batch {batch}, context {LONG}"),
            Self::Decode { batch, .. } => write!(f, "decode, batch {batch}"),
            Self::Train { full, rows, length, .. } => {
                write!(f, "{} {rows} x {length}", if *full { "full training" } else { "LoRA training" })
            }
            Self::First => write!(f, "start to first token"),
        }
    }
}

impl Unit {
    /// Whether more of it is better.
    pub fn more_is_better(self) -> bool {
        self == Self::Rate
    }

    /// In a cell, without its name.
    pub fn shown(self, value: f64) -> String {
        number(if self == Self::Bytes { value / 1e9 } else { value })
    }

    /// Behind the name of a row.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rate => "tokens/s",
            Self::Seconds => "s",
            Self::Imports => "of it imports, s",
            Self::Bytes => "peak memory, GB",
        }
    }
}
