//! The Lathe worker: one task on one pod. It holds no Kubernetes credentials and knows no Kubernetes.
//!
//! A contract says what to do; the control port tells how far it is; the termination message and the exit code are the
//! last words. [`train`], [`evaluate`], [`inspect`] and [`check_data`] run to their end.
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod base;
pub mod batch;
pub mod check_data;
pub mod context;
pub mod control;
pub mod data;
pub mod dataset;
pub mod evaluate;
pub mod failure;
pub mod inspect;
pub mod metrics;
#[cfg(test)]
#[path = "../../../tests/monitoring/recorded.rs"]
mod recorded;
pub mod serve;
pub mod status;
pub mod summary;
pub mod train;
