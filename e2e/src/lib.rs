//! What the tests against a real Kubernetes share: a client, a namespace that leaves a trace on
//! failure, waiting for a condition.
#![deny(missing_docs)]

mod cluster;
pub mod events;
mod explain;
pub mod gateway;
mod install;
pub mod load;
pub mod machine;
mod manifests;
pub mod node;
pub mod operator;
pub mod programs;
pub mod serve;
pub mod tune;

pub use cluster::{Session, condition, poll};
pub use install::{RELEASE_NAMESPACE, belongings, helm, install, kubectl, uninstall};
pub use manifests::{documents, quickstart, repository};
