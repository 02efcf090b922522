//! What a job has used, and whether that is all it may.
use lathe_api::{AcceleratorProfile, Budget};

/// Cost of so many seconds times devices, and its currency; `None` where the profile has no price.
#[must_use]
pub fn cost(device_seconds: i64, profile: &AcceleratorProfile) -> Option<(f64, String)> {
    let price = profile.spec.price.as_ref()?;
    Some((device_seconds as f64 / 3600.0 * price.per_hour.value()?, price.currency.clone()))
}

/// Why a job must stop, where its budget is spent.
#[must_use]
pub fn over(
    budget: Option<&Budget>,
    device_seconds: i64,
    cost: Option<&(f64, String)>,
    devices: i64,
) -> Option<String> {
    let budget = budget?;
    let most = budget.max_cost.as_ref().and_then(|c| c.value());
    if let Some((cost, currency)) = cost.filter(|(cost, _)| most.is_some_and(|most| *cost >= most)) {
        return Some(format!(
            "after {cost:.2} {currency}; checkpoint kept. Next: raise `spec.budget.maxCost`"
        ));
    }
    let limit = budget.max_duration.as_ref()?;
    let ran = device_seconds / devices.max(1);
    let words = if ran < 120 { format!("{ran} seconds") } else { format!("{} minutes", ran / 60) };
    (ran >= limit.seconds()?)
        .then(|| format!("after {words} of {limit}; checkpoint kept. Next: raise `spec.budget.maxDuration`"))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case::in_money(json!({"maxCost": "2"}), 3600, Some("after 2.00 USD; checkpoint kept"))]
    #[case::below(json!({"maxCost": "2.1"}), 3600, None)]
    #[case::in_time(json!({"maxDuration": "30m"}), 3600, Some("after 30 minutes of 30m"))]
    #[case::in_little_time(json!({"maxDuration": "90s"}), 180, Some("after 90 seconds of 90s"))]
    #[case::time_left(json!({"maxDuration": "31m"}), 3600, None)]
    fn a_spent_budget_stops(
        #[case] budget: serde_json::Value,
        #[case] seconds: i64,
        #[case] expected: Option<&str>,
    ) {
        let budget: Budget = serde_json::from_value(budget).expect("a budget");
        let found = over(Some(&budget), seconds, Some(&(2.0, "USD".to_owned())), 2);
        assert_eq!(found.is_some(), expected.is_some(), "{found:?}");
        assert!(found.unwrap_or_default().contains(expected.unwrap_or_default()));
    }

    #[test]
    fn a_cost_is_that_of_all_devices() {
        let spec =
            json!({"resource": "cpu", "runtime": "CPU", "price": {"perHour": "0.50", "currency": "EUR"}});
        let mut profile = AcceleratorProfile::new("p", serde_json::from_value(spec).expect("a profile"));
        assert_eq!(cost(4 * 3600, &profile), Some((2.0, "EUR".to_owned())));
        profile.spec.price = None;
        assert_eq!(cost(4 * 3600, &profile), None);
    }
}
