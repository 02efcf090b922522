//! Pure planning: model shape, method and accelerator to memory, time and cost.
#![deny(missing_docs)]
