//! The gateway on real sockets: clients on one side, replicas that misbehave on the other.
mod browser;
mod canary;
mod clients;
mod collector;
mod embeddings;
mod failures;
mod holds;
mod page;
mod program;
pub mod replica;
mod rig;
mod traces;
mod traffic;
mod usage_log;
mod worker;
