//! The real worker on tiny models that the tests make.
mod bad_input;
mod bucket;
mod finish;
mod interrupt;
mod model;
mod world;
