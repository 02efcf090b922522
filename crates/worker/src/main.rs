//! The Lathe worker: train, serve, evaluate, convert, inspect, check-data.
fn main() {}
