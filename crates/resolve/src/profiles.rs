//! What every plan asks of profiles, and how sizes are written for people.
use lathe_api::{AcceleratorProfile, AcceleratorProfileSpec, Runtime};

use crate::inference::Images;

/// The cheapest first; one without a price last.
pub(crate) fn by_price(profiles: &[AcceleratorProfile]) -> Vec<&AcceleratorProfile> {
    let key = |p: &AcceleratorProfile| price(p).unwrap_or(f64::INFINITY);
    let mut sorted: Vec<_> = profiles.iter().collect();
    sorted.sort_by(|a, b| key(a).total_cmp(&key(b)).then_with(|| a.metadata.name.cmp(&b.metadata.name)));
    sorted
}

/// The profiles that may be used, by name, in the order in which they are tried: as they are named, or else the cheapest first.
pub(crate) fn candidates<'a>(
    named: &[String],
    all: &'a [AcceleratorProfile],
) -> Vec<(String, Option<&'a AcceleratorProfile>)> {
    let name = |profile: &AcceleratorProfile| profile.metadata.name.clone().unwrap_or_default();
    if named.is_empty() {
        return by_price(all).into_iter().map(|profile| (name(profile), Some(profile))).collect();
    }
    named.iter().map(|wanted| (wanted.clone(), all.iter().find(|p| name(p) == *wanted))).collect()
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

/// Processor time that a node must have free, in thousandths of a core: a core, where nobody said how many there are to be. What
/// was computed is what the work can use, and a small or busy node that has less does it more slowly.
pub(crate) fn least_cpu(profile: &AcceleratorProfileSpec, asked: Option<i32>, most: i64) -> i64 {
    if profile.resource == "cpu" && asked.is_none() { most.min(1000) } else { most }
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
    #[case::computed("cpu", None, 8000, 1000)]
    #[case::asked_for("cpu", Some(8), 8000, 8000)]
    #[case::small("cpu", None, 500, 500)]
    #[case::beside_a_device("nvidia.com/gpu", None, 4000, 4000)]
    fn a_core_is_enough_where_nobody_said_how_many(
        #[case] resource: &str,
        #[case] asked: Option<i32>,
        #[case] most: i64,
        #[case] least: i64,
    ) {
        let profile: AcceleratorProfileSpec =
            serde_json::from_value(serde_json::json!({"resource": resource, "runtime": "CPU"}))
                .expect("a profile");
        assert_eq!(least_cpu(&profile, asked, most), least);
    }

    #[rstest]
    #[case(999, "999")]
    #[case(1_000, "1k")]
    #[case(1_235_814_400, "1.24B")]
    #[case(334_000_000, "334M")]
    fn counts_are_short(#[case] number: u64, #[case] expected: &str) {
        assert_eq!(count(number), expected);
    }
}
