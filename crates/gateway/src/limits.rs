//! What a key may use in a minute: token buckets. Tokens are taken as an estimate and settled when the answer is known.
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderName, HeaderValue};

use crate::error::{ApiError, Headers};

const MINUTE: f64 = 60.0;

/// A key's limits; absent: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a minute.
    pub requests: Option<u32>,
    /// Tokens a minute.
    pub tokens: Option<u32>,
}

/// The buckets of all keys, by the keys' names.
#[derive(Debug, Default)]
pub struct Quotas(Mutex<HashMap<String, Buckets>>);

#[derive(Debug, Default)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

impl Quotas {
    /// Takes one request and `tokens` of what the key may use, and says in OpenAI's headers what is left.
    ///
    /// # Errors
    /// 429 where there is not enough, with the time after which there is; nothing is taken then.
    pub fn take(&self, key: &str, limits: Limits, tokens: u64, now: Instant) -> Result<Headers, ApiError> {
        let mut all = self.lock();
        let buckets = all.entry(key.to_owned()).or_default();
        let requests = Bucket::of(&mut buckets.requests, limits.requests, now);
        let spent = Bucket::of(&mut buckets.tokens, limits.tokens, now);
        let refusal = [("requests", &requests, 1), ("tokens", &spent, tokens)].into_iter().find_map(
            |(what, bucket, amount)| {
                let bucket = bucket.as_ref()?;
                let wait = bucket.wait(amount)?;
                let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
                Some(ApiError::rate_limited(what, bucket.limit, seconds))
            },
        );
        let mut headers = Headers::new();
        for (what, bucket, amount) in [("requests", requests, 1), ("tokens", spent, tokens)] {
            let Some(bucket) = bucket else { continue };
            if refusal.is_none() {
                bucket.level -= amount as f64;
            }
            bucket.tell(what, &mut headers);
        }
        match refusal {
            None => Ok(headers),
            Some(refusal) => Err(refusal.with_headers(headers)),
        }
    }

    /// Corrects what a request took as an estimate: `used` is what it cost.
    pub fn settle(&self, key: &str, estimate: u64, used: u64) {
        let mut all = self.lock();
        let Some(bucket) = all.get_mut(key).and_then(|buckets| buckets.tokens.as_mut()) else { return };
        let limit = f64::from(bucket.limit);
        // One long answer costs at most a minute's pause.
        bucket.level = (bucket.level + estimate as f64 - used as f64).clamp(-limit, limit);
    }

    /// Forgets keys that are no more.
    pub fn keep(&self, known: impl Fn(&str) -> bool) {
        self.lock().retain(|key, _| known(key));
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Buckets>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills evenly up to a minute's worth; below zero after an answer that was longer than estimated.
#[derive(Clone, Debug)]
struct Bucket {
    limit: u32,
    level: f64,
    at: Instant,
}

impl Bucket {
    /// The bucket as it stands now; a new limit keeps the share that was left.
    fn of(place: &mut Option<Bucket>, limit: Option<u32>, now: Instant) -> Option<&mut Bucket> {
        let Some(limit) = limit else {
            *place = None;
            return None;
        };
        let full = f64::from(limit);
        let bucket = place.get_or_insert(Bucket { limit, level: full, at: now });
        if bucket.limit != limit {
            bucket.level *= full / f64::from(bucket.limit);
            bucket.limit = limit;
        }
        let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.level = (bucket.level + passed * full / MINUTE).min(full);
        bucket.at = bucket.at.max(now);
        Some(bucket)
    }

    /// How long until `amount` is there. More than a minute's worth never is: it may go once the bucket is full.
    fn wait(&self, amount: u64) -> Option<Duration> {
        let full = f64::from(self.limit);
        let missing = (amount as f64).min(full) - self.level;
        // Filling in many small steps rounds.
        (missing > 1e-6).then(|| Duration::from_secs_f64(missing * MINUTE / full))
    }

    fn tell(&self, what: &str, headers: &mut Headers) {
        let full = f64::from(self.limit);
        let reset = Duration::from_secs_f64((full - self.level).max(0.0) * MINUTE / full);
        let told = [
            ("limit", self.limit.to_string()),
            ("remaining", (self.level.max(0.0).floor() as u64).to_string()),
            ("reset", written(reset)),
        ];
        for (which, value) in told {
            let name = HeaderName::try_from(format!("x-ratelimit-{which}-{what}"));
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                headers.push((name, value));
            }
        }
    }
}

/// As OpenAI writes it: `120ms`, `7.66s`, `1m30s`.
fn written(time: Duration) -> String {
    match time.as_millis() {
        millis @ 0..1000 => format!("{millis}ms"),
        millis @ 1000..60_000 => format!("{}s", millis as f64 / 1000.0),
        millis => format!("{}m{}s", millis / 60_000, millis / 1000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn value<'a>(headers: &'a Headers, name: &str) -> &'a str {
        let found = headers.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no {name}"));
        found.1.to_str().unwrap()
    }

    fn limits(requests: u32, tokens: u32) -> Limits {
        Limits { requests: Some(requests), tokens: Some(tokens) }
    }

    #[test]
    fn requests_are_refused_until_one_has_come_back() {
        let (quotas, start, two) = (Quotas::default(), Instant::now(), limits(2, 1000));
        let take = |seconds| quotas.take("k", two, 10, start + Duration::from_secs(seconds));
        let headers = take(0).unwrap();
        assert_eq!(value(&headers, "x-ratelimit-limit-requests"), "2");
        assert_eq!(value(&headers, "x-ratelimit-remaining-requests"), "1");
        assert_eq!(value(&headers, "x-ratelimit-reset-requests"), "30s");
        assert_eq!(value(&headers, "x-ratelimit-remaining-tokens"), "990");
        assert_eq!(value(&headers, "x-ratelimit-reset-tokens"), "600ms");
        take(0).unwrap();
        let refused = take(1).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code), (429, "rate_limit_exceeded"));
        assert!(refused.message.contains("2 requests a minute. Try again in 29 s."), "{}", refused.message);
        // What was refused took nothing.
        assert_eq!(value(&refused.headers, "x-ratelimit-remaining-tokens"), "996");
        assert!(take(29).is_err());
        assert!(take(30).is_ok());
        assert!(quotas.take("other", two, 10, start).is_ok());
    }

    #[test]
    fn tokens_are_settled_by_what_was_used() {
        let (quotas, now, hundred) = (Quotas::default(), Instant::now(), limits(100, 100));
        let left = |tokens| {
            let headers = quotas.take("k", hundred, tokens, now)?;
            Ok::<_, ApiError>(value(&headers, "x-ratelimit-remaining-tokens").to_owned())
        };
        assert_eq!(left(80).unwrap(), "20");
        assert!(left(80).is_err());
        quotas.settle("k", 80, 5);
        assert_eq!(left(80).unwrap(), "15");
        // An answer that was far longer than estimated pauses the key, for two minutes at most.
        quotas.settle("k", 80, 1_000_000);
        let refused = left(1).unwrap_err();
        assert!(refused.message.contains("Try again in 61 s"), "{}", refused.message);
    }

    #[test]
    fn a_request_larger_than_a_minute_goes_once_the_bucket_is_full() {
        let (quotas, start, few) = (Quotas::default(), Instant::now(), limits(100, 60));
        assert!(quotas.take("k", few, 500, start).is_ok());
        quotas.settle("k", 500, 30);
        assert!(quotas.take("k", few, 500, start).is_err());
        assert!(quotas.take("k", few, 500, start + Duration::from_secs(30)).is_ok());
    }

    #[test]
    fn a_new_limit_counts_at_once_and_a_clock_that_goes_back_does_no_harm() {
        let (quotas, start) = (Quotas::default(), Instant::now() + Duration::from_secs(60));
        quotas.take("k", limits(10, 10), 0, start).unwrap();
        let headers = quotas.take("k", limits(20, 10), 0, start - Duration::from_secs(30)).unwrap();
        assert_eq!(value(&headers, "x-ratelimit-remaining-requests"), "17");
        assert!(quotas.take("k", Limits::default(), 1 << 40, start).unwrap().is_empty());
        quotas.keep(|key| key != "k");
        assert!(quotas.lock().is_empty());
    }

    #[rstest]
    #[case(0, "0ms")]
    #[case(120, "120ms")]
    #[case(7660, "7.66s")]
    #[case(90_500, "1m30s")]
    fn durations_are_written_as_openai_does(#[case] millis: u64, #[case] text: &str) {
        assert_eq!(written(Duration::from_millis(millis)), text);
    }
}
