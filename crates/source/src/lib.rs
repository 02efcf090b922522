//! A Location to checked bytes on disk, or headers alone; and an artefact to a Location.
//!
//! - [`fetch`] brings a model, an adapter or a dataset onto this machine and checks it.
//! - [`headers`] reads what a model is without its weights.
//! - [`Draft`] is where an artefact is made, and [`publish`] writes one to a volume or a bucket, never half of one under
//!   its final name.
//!
//! Built for `pvc://`, `https://`, `hf://` and `s3://`. What comes from a server is not believed: names are checked before
//! they become paths, sizes before they are read, pickles are never fetched, and credentials go to the location's own
//! host alone. Architecture invariant: this crate knows no Kubernetes and no model; it moves files.
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod attempt;
mod cache;
mod card;
mod credentials;
mod digest;
mod disk;
mod download;
mod draft;
mod error;
mod evict;
mod fetch;
mod fingerprint;
mod headers;
mod http;
mod hub;
mod local;
mod location;
mod manifest;
mod names;
mod options;
mod publish;
mod publish_pvc;
mod publish_s3;
mod remote;
mod retry;
mod s3;
mod safetensors;
mod sniff;
mod web;

pub use card::{CardLicense, card_license};
pub use credentials::Credentials;
pub use digest::{Digest, FileEntry, FileHash, digest_of};
pub use draft::Draft;
pub use error::{Fault, SourceError};
pub use fetch::{Fetched, fetch};
pub use fingerprint::{fingerprint, unchanged};
pub use headers::{Headers, headers};
pub use location::{Address, HubAddress, Location};
pub use manifest::MANIFEST;
pub use options::{LocalCheck, Options, Progress, Update};
pub use publish::publish;
pub use retry::Retry;
pub use safetensors::Tensor;
/// Stops a fetch or a publish from another task.
pub use tokio_util::sync::CancellationToken;
