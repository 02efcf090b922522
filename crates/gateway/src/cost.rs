//! What requests cost, by what the operator says that a service's tokens do.
use lathe_contract::Usage;

/// Nothing that is served costs more for a million tokens.
const MOST: f64 = 1e9;

/// What the tokens of a service cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    per_million: f64,
    /// ISO 4217 code.
    pub currency: String,
}

impl Cost {
    /// Of `status.costPerMillionTokens`: a number and three capitals. A status is written by others: what is no price is none.
    pub fn parse(text: &str) -> Option<Self> {
        let (amount, currency) = text.split_once(' ')?;
        let per_million = amount.parse().ok().filter(|amount| (0.0..=MOST).contains(amount))?;
        let is_code = currency.len() == 3 && currency.bytes().all(|byte| byte.is_ascii_uppercase());
        is_code.then(|| Self { per_million, currency: currency.to_owned() })
    }

    /// Of one answer. Tokens from the cache cost nothing: the operator does not count them in what flows either.
    pub fn of(&self, usage: Usage) -> f64 {
        usage.total().saturating_sub(usage.cached) as f64 * self.per_million / 1e6
    }
}

/// An amount as a decimal, to a billionth.
pub fn decimal(amount: f64) -> String {
    let text = format!("{amount:.9}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("2.50 EUR", Some("0.0000125"))]
    #[case("0.00 USD", Some("0"))]
    #[case("0.00200 USD", Some("0.00000001"))]
    #[case("1e6 USD", Some("5"))]
    #[case("-1 USD", None)]
    #[case("NaN USD", None)]
    #[case("inf USD", None)]
    #[case("1e300 USD", None)]
    #[case("2.50", None)]
    #[case("2.50 eur", None)]
    #[case("2.50 EURO", None)]
    #[case("2.50 EUR x", None)]
    fn ten_tokens_of_which_five_were_cached_cost_so_much(#[case] text: &str, #[case] expected: Option<&str>) {
        let usage = Usage { prompt: 7, completion: 3, cached: 5 };
        let cost = Cost::parse(text).map(|cost| decimal(cost.of(usage)));
        assert_eq!(cost.as_deref(), expected);
    }
}
