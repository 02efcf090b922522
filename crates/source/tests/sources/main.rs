//! Real servers on loopback, with the faults that networks have.
#![allow(clippy::unwrap_used)]

mod hub;
mod model;
mod pvc;
mod s3;
mod server;
mod tls;
mod web;
