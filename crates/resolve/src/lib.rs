//! The one meaning of a manifest: a spec and observed facts to a resolved plan and the pods' contract.
//!
//! Pure: no client, no clock, no files. The operator, `lathe run` and `lathe plan` ask the same functions, so a
//! manifest means the same in a cluster and on a laptop.
#![deny(missing_docs)]

mod catalogue;
mod convert;
pub mod finetune;
pub mod inference;
pub mod model;
pub mod pod;
mod profiles;

pub use catalogue::{Entry, catalogue};
pub use convert::{digest_of, inspected, shape_of, to_metric, to_schedule, to_score};
pub use profiles::{count, quantity};

/// Why a manifest cannot be carried out as it stands: a condition's reason, and a message with the next step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Rejection {
    /// CamelCase, for programs.
    pub reason: &'static str,
    /// For people: the cause and the next step.
    pub message: String,
}

impl Rejection {
    /// A rejection for `reason`.
    #[must_use]
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}
