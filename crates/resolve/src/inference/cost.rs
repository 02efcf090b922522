//! What a service and its tokens cost.
use lathe_api::{AcceleratorProfile, PodOverrides};

use crate::profiles::price;

/// What `replicas` of `count` devices each cost in an hour, and in which currency; `None`: the profile has no price. What a user
/// says of the pod's cores is what it gets, where cores are the devices.
#[must_use]
pub fn cost_per_hour<'a>(
    profile: &'a AcceleratorProfile,
    count: i32,
    pod: Option<&PodOverrides>,
    replicas: i32,
) -> Option<(f64, &'a str)> {
    let own = pod.and_then(|pod| pod.cpu.as_ref()).filter(|_| profile.spec.resource == "cpu");
    let devices = own.and_then(|cores| cores.amount()).unwrap_or(f64::from(count));
    devices_per_hour(profile, devices * f64::from(replicas))
}

/// What so many devices of a profile cost in an hour, and in which currency; `None`: it has no price.
#[must_use]
pub fn devices_per_hour(profile: &AcceleratorProfile, devices: f64) -> Option<(f64, &str)> {
    let currency = &profile.spec.price.as_ref()?.currency;
    Some((price(profile)? * devices, currency))
}

/// What a million tokens cost at this rate, in three digits, with the currency: `cost_per_hour` by the tokens that are read and written
/// in an hour. `None` where nothing flows: nothing is no rate to divide by.
#[must_use]
pub fn cost_per_million_tokens((hourly, currency): (f64, &str), tokens_per_second: f64) -> Option<String> {
    let cost = hourly / (tokens_per_second * 3600.0) * 1e6;
    let flows = tokens_per_second > 0.0 && hourly >= 0.0;
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
        of("nvidia.com/gpu", price)
    }

    fn of(resource: &str, price: Value) -> AcceleratorProfile {
        let spec = json!({"resource": resource, "runtime": "CUDA", "price": price});
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
        let hourly = cost_per_hour(&profile, devices, None, replicas).expect("a price");
        assert_eq!(cost_per_million_tokens(hourly, rate).as_deref(), Some(expected));
    }

    #[rstest]
    #[case::no_traffic(0.0)]
    #[case::no_rate(f64::NAN)]
    fn where_nothing_flows_tokens_have_no_cost(#[case] rate: f64) {
        assert_eq!(cost_per_million_tokens((1.0, "EUR"), rate), None);
    }

    #[rstest]
    #[case::no_price("cpu", Value::Null, "1", 1, None)]
    #[case::nobody("cpu", json!("0.5"), "1", 0, Some(0.0))]
    #[case::the_pods_own_cores("cpu", json!("0.5"), "8", 2, Some(8.0))]
    #[case::a_part_of_a_core("cpu", json!("0.5"), "500m", 1, Some(0.25))]
    #[case::cores_beside_a_device("nvidia.com/gpu", json!("0.5"), "8", 1, Some(1.0))]
    fn an_hour_costs_what_the_devices_of_all_replicas_do(
        #[case] resource: &str,
        #[case] price: Value,
        #[case] cpu: &str,
        #[case] replicas: i32,
        #[case] expected: Option<f64>,
    ) {
        let price = if price.is_null() { price } else { json!({"perHour": price, "currency": "EUR"}) };
        let profile = of(resource, price);
        let pod: PodOverrides = serde_json::from_value(json!({"cpu": cpu})).expect("a pod");
        let cost = cost_per_hour(&profile, 2, Some(&pod), replicas);
        assert_eq!(cost, expected.map(|amount| (amount, "EUR")));
    }
}
