//! The CPU.

/// Which instructions the kernels use. A level is part of a result's identity: bits are equal within a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust, any machine.
    Portable,
    /// 8-wide AVX2 with fused multiply-add.
    Avx2,
}
