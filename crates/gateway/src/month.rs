//! A calendar month in UTC, which is what a budget lasts.
use std::fmt;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};
use serde::{Deserialize, Serialize};

/// A month; written `2026-11`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Month(Date);

impl Month {
    /// The month of this moment.
    pub fn of(time: Timestamp) -> Self {
        Self(TimeZone::UTC.to_datetime(time).date().first_of_month())
    }

    /// The one before.
    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1.month()))
    }

    /// The first day of the next one, on which budgets begin anew; written `2026-12-01`.
    pub fn end(self) -> Date {
        self.0.saturating_add(1.month())
    }

    /// Seconds until it is over.
    pub fn seconds_left(self, now: Timestamp) -> u64 {
        let end = TimeZone::UTC.to_timestamp(self.end().at(0, 0, 0, 0)).unwrap_or(now);
        end.as_second().saturating_sub(now.as_second()).try_into().unwrap_or(0)
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.0.year(), self.0.month())
    }
}

impl From<Month> for String {
    fn from(month: Month) -> Self {
        month.to_string()
    }
}

impl TryFrom<String> for Month {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let date = (text.len() == 7).then(|| format!("{text}-01").parse().ok()).flatten();
        let month = date.map(Self).filter(|month| month.to_string() == text);
        month.ok_or("a month is written as 2026-11")
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("2026-11-01T00:00:00Z", "2026-11", "2026-12-01", 30 * 86_400)]
    #[case("2026-11-30T23:59:59.9Z", "2026-11", "2026-12-01", 1)]
    #[case("2026-12-01T00:30:00+02:00", "2026-11", "2026-12-01", 5400)]
    #[case("2028-02-29T12:00:00Z", "2028-02", "2028-03-01", 43_200)]
    #[case("2026-12-31T23:00:00Z", "2026-12", "2027-01-01", 3600)]
    fn a_moment_has_its_month_in_utc(
        #[case] time: Timestamp,
        #[case] written: &str,
        #[case] end: &str,
        #[case] left: u64,
    ) {
        let month = Month::of(time);
        assert_eq!((month.to_string().as_str(), month.end().to_string().as_str()), (written, end));
        assert_eq!((Month::try_from(written.to_owned()), month.seconds_left(time)), (Ok(month), left));
        assert_eq!(month.before().end().to_string(), format!("{written}-01"));
    }

    #[rstest]
    #[case("2026-13")]
    #[case("2026-1")]
    #[case("26-0011")]
    #[case("+026-11")]
    #[case("2026-11-01")]
    #[case("")]
    fn what_is_no_month_is_none(#[case] text: &str) {
        assert!(Month::try_from(text.to_owned()).is_err());
    }

    #[test]
    fn the_ends_of_time_do_no_harm() {
        assert_eq!(Month::of(Timestamp::MAX).seconds_left(Timestamp::MAX), 0);
        Month::of(Timestamp::MIN).before();
    }
}
