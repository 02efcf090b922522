//! What the tests against a real Kubernetes share: a client, a namespace that leaves a trace on
//! failure, waiting for a condition.
#![deny(missing_docs)]

mod cluster;
mod install;
mod manifests;

pub use cluster::{Session, condition, poll};
pub use install::{RELEASE_NAMESPACE, helm, install};
pub use manifests::{documents, quickstart, repository};
