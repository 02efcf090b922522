//! Build tasks of the repository: generate, images, cluster, demo, test, bench.
fn main() {}
