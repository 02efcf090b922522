//! The Lathe operator.
fn main() {}
