//! Counter-based random numbers: the `i`th number of a key, computed from both alone.

/// The finalizer of splitmix64: every input bit reaches every output bit.
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// 64 random bits.
pub(crate) fn bits(key: u64, i: u64) -> u64 {
    mix(mix(key.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// Uniform in `0..1`.
pub(crate) fn uniform(key: u64, i: u64) -> f64 {
    (bits(key, i) >> 11) as f64 / (1u64 << 53) as f64
}

/// Standard normal, by Box and Muller.
pub(crate) fn normal(key: u64, i: u64) -> f64 {
    let (u, v) = (1.0 - uniform(key, 2 * i), uniform(key, 2 * i + 1));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// A key for a name (FNV-1a, then mixed).
pub(crate) fn key(seed: u64, name: &str) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    mix(mix(seed) ^ hash)
}
