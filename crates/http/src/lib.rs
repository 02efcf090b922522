//! What every HTTP port of Lathe is, whoever serves it.
//!
//! [`serve`] takes connections, bounded in number and in patience; [`last_answers`] lets clients go before it stops; [`read_body`] reads a
//! body in no more memory than it is long;
//! [`ErrorBody`] is an error as OpenAI's API writes it; [`openmetrics`] is what `/metrics` says; [`allow_open_files`] makes room for
//! connections.
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]
mod body;
mod error;
mod files;
mod listen;
mod metrics;

pub use body::{BodyError, MAX_BODY, read_body};
pub use error::ErrorBody;
pub use files::allow_open_files;
pub use listen::{Bounds, bind, last_answer, last_answers, serve, serve_by};
pub use metrics::openmetrics;
