//! What every plan asks of profiles, and how sizes are written for people.
use lathe_api::{AcceleratorProfile, Runtime};

use crate::inference::Images;

/// The cheapest first; one without a price last.
pub(crate) fn by_price(profiles: &[AcceleratorProfile]) -> Vec<&AcceleratorProfile> {
    let key = |p: &AcceleratorProfile| price(p).unwrap_or(f64::INFINITY);
    let mut sorted: Vec<_> = profiles.iter().collect();
    sorted.sort_by(|a, b| key(a).total_cmp(&key(b)).then_with(|| a.metadata.name.cmp(&b.metadata.name)));
    sorted
}

/// Price of one device (or core) and hour.
pub(crate) fn price(profile: &AcceleratorProfile) -> Option<f64> {
    profile.spec.price.as_ref().and_then(|price| price.per_hour.value())
}

/// The worker for a profile; `None` until there is one for its runtime.
pub(crate) fn image(profile: &AcceleratorProfile, images: &Images) -> Option<String> {
    profile.spec.image.clone().or_else(|| match profile.spec.runtime {
        Runtime::CPU => Some(images.cpu.clone()),
        Runtime::CUDA => images.cuda.clone(),
    })
}

/// A quantity for people: whole mebibytes, from ten gibibytes on tenths of a gibibyte.
#[must_use]
pub fn quantity(bytes: u64) -> String {
    if bytes < 10 << 30 {
        format!("{}Mi", bytes.div_ceil(1 << 20))
    } else {
        format!("{:.1}Gi", bytes as f64 / (1_u64 << 30) as f64)
    }
}

/// A count for people: `1.24B`, `334M`, `12.5k`.
#[must_use]
pub fn count(number: u64) -> String {
    for (unit, name) in [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")] {
        if number as f64 >= unit {
            let text = format!("{:.2}", number as f64 / unit);
            return format!("{}{name}", text.trim_end_matches('0').trim_end_matches('.'));
        }
    }
    number.to_string()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(999, "999")]
    #[case(1_000, "1k")]
    #[case(1_235_814_400, "1.24B")]
    #[case(334_000_000, "334M")]
    fn counts_are_short(#[case] number: u64, #[case] expected: &str) {
        assert_eq!(count(number), expected);
    }
}
