//! The seam to a device.
pub mod cpu;
