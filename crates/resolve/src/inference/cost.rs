//! What tokens of a service cost.
use lathe_api::AcceleratorProfile;

use crate::profiles::price;

/// What a million tokens cost at this rate, in three digits, with the currency: the price of all devices of `replicas` for an hour, by
/// the tokens that they read and wrote in it. `None` where the profile has no price or nothing flows: nothing is no rate to divide by.
#[must_use]
pub fn cost_per_million_tokens(
    profile: &AcceleratorProfile,
    devices: i32,
    replicas: i32,
    tokens_per_second: f64,
) -> Option<String> {
    let currency = &profile.spec.price.as_ref()?.currency;
    let hourly = price(profile)? * f64::from(devices) * f64::from(replicas);
    let cost = hourly / (tokens_per_second * 3600.0) * 1e6;
    let flows = tokens_per_second > 0.0 && replicas > 0;
    (flows && cost.is_finite() && cost >= 0.0).then(|| format!("{} {currency}", three_digits(cost)))
}

fn three_digits(value: f64) -> String {
    let places = if value > 0.0 { (2 - value.log10().floor() as i32).clamp(2, 9) as usize } else { 2 };
    format!("{value:.places$}")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn profile(price: Value) -> AcceleratorProfile {
        let spec = json!({"resource": "nvidia.com/gpu", "runtime": "CUDA", "price": price});
        AcceleratorProfile::new("card", serde_json::from_value(spec).expect("a profile"))
    }

    #[rstest]
    // 3.6 an hour is a thousandth a second: for a token where one comes each second.
    #[case::one("3.6", 1, 1, 1.0, "1000.00 EUR")]
    #[case::all_devices_of_all_replicas("3.6", 2, 3, 6000.0, "1.00 EUR")]
    #[case::little("0.04", 1, 1, 12_345.0, "0.000900 EUR")]
    #[case::nothing("0", 1, 1, 5.0, "0.00 EUR")]
    fn a_million_tokens_cost_what_the_devices_cost_in_that_time(
        #[case] price: &str,
        #[case] devices: i32,
        #[case] replicas: i32,
        #[case] rate: f64,
        #[case] expected: &str,
    ) {
        let profile = profile(json!({"perHour": price, "currency": "EUR"}));
        assert_eq!(cost_per_million_tokens(&profile, devices, replicas, rate).as_deref(), Some(expected));
    }

    #[rstest]
    #[case::no_price(Value::Null, 1, 5.0)]
    #[case::no_traffic(json!({"perHour": "1"}), 1, 0.0)]
    #[case::no_rate(json!({"perHour": "1"}), 1, f64::NAN)]
    #[case::nobody(json!({"perHour": "1"}), 0, 5.0)]
    fn what_is_not_known_is_not_told(#[case] price: Value, #[case] replicas: i32, #[case] rate: f64) {
        assert_eq!(cost_per_million_tokens(&profile(price), 1, replicas, rate), None);
    }
}
