//! The gateway on real sockets: clients on one side, replicas that misbehave on the other.
mod clients;
mod failures;
mod program;
mod replica;
mod rig;
mod usage_log;
mod worker;
