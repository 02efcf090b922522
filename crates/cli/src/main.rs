//! The lathe command: plan, run a manifest without a cluster, logs, chat, status.
fn main() {}
