//! The real worker on tiny models that the tests make.
mod bad_input;
mod finish;
mod interrupt;
mod model;
mod world;
