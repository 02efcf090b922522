//! Build tasks of the repository, for its command line and for the end-to-end tests.

pub mod cluster;
mod command;
pub mod images;
pub mod paths;
pub mod toolchain;
pub mod ui;
