//! What the tests against a real Kubernetes share: a client, a namespace that leaves a trace on
//! failure, waiting for a condition.
#![deny(missing_docs)]

mod cluster;
mod manifests;

pub use cluster::{Session, condition, poll};
pub use manifests::{documents, quickstart, repository};
