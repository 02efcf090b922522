//! A Location to checked bytes on disk, or headers alone.
#![deny(missing_docs)]
