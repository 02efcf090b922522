//! Build tasks of the repository, for its command line and for the end-to-end tests.
#![deny(missing_docs)]

pub mod bench;
pub mod cluster;
pub mod command;
pub mod demo;
pub mod demo_model;
pub mod generate;
pub mod images;
pub mod paths;
mod ports;
pub mod simulate;
pub mod test;
pub mod toolchain;
pub mod ui;
