//! What a key may use in a minute: token buckets. Tokens are taken as an estimate and settled when the answer is known.
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderName, HeaderValue};

use crate::error::{ApiError, Headers};

const MINUTE: f64 = 60.0;
/// What a client is told to wait at most: its key may have another limit by then.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

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
pub struct Quotas(Mutex<HashMap<Arc<str>, Buckets>>);

#[derive(Debug, Default)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

impl Quotas {
    /// Takes one request of what the key may send.
    ///
    /// # Errors
    /// 429 where there is none left, with the time after which there is; nothing is taken then.
    pub fn enter(&self, key: &Arc<str>, limits: Limits, now: Instant) -> Result<(), ApiError> {
        self.with(key, |buckets| {
            buckets.fill(limits, now);
            let taken = Bucket::take(&mut buckets.requests, "requests", 1);
            taken.map_err(|refusal| refusal.with_headers(buckets.told()))
        })
    }

    /// Gives a request back that the gateway could not serve, through no fault of its client.
    pub fn give_back(&self, key: &Arc<str>) {
        self.with(key, |buckets| Bucket::put(&mut buckets.requests, 1.0));
    }

    /// Takes `tokens`, and says in OpenAI's headers what is left.
    ///
    /// # Errors
    /// As [`Quotas::enter`].
    pub fn take(
        &self,
        key: &Arc<str>,
        limits: Limits,
        tokens: u64,
        now: Instant,
    ) -> Result<Headers, ApiError> {
        self.with(key, |buckets| {
            buckets.fill(limits, now);
            let taken = Bucket::take(&mut buckets.tokens, "tokens", tokens);
            taken.map(|()| buckets.told()).map_err(|refusal| refusal.with_headers(buckets.told()))
        })
    }

    /// Corrects what a request took as an estimate: `used` is what it cost. A debt is paid in full, whatever it came from: many
    /// long answers at a time are not less than one after the other.
    pub fn settle(&self, key: &Arc<str>, estimate: u64, used: u64) {
        self.with(key, |buckets| Bucket::put(&mut buckets.tokens, estimate as f64 - used as f64));
    }

    /// Forgets keys that are no more.
    pub fn keep(&self, known: &HashSet<Arc<str>>) {
        self.lock().retain(|key, _| known.contains(key));
    }

    fn with<T>(&self, key: &Arc<str>, change: impl FnOnce(&mut Buckets) -> T) -> T {
        change(self.lock().entry(Arc::clone(key)).or_default())
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Buckets>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buckets {
    /// As they stand now.
    fn fill(&mut self, limits: Limits, now: Instant) {
        Bucket::fill(&mut self.requests, limits.requests, now);
        Bucket::fill(&mut self.tokens, limits.tokens, now);
    }

    /// What is left, in OpenAI's headers.
    fn told(&self) -> Headers {
        let mut headers = Headers::new();
        for (what, bucket) in [("requests", &self.requests), ("tokens", &self.tokens)] {
            if let Some(bucket) = bucket {
                bucket.tell(what, &mut headers);
            }
        }
        headers
    }
}

/// Fills evenly up to a minute's worth; below zero after answers that were longer than estimated.
#[derive(Clone, Debug)]
struct Bucket {
    limit: u32,
    level: f64,
    at: Instant,
}

impl Bucket {
    /// The bucket as it stands now; a new limit keeps the share that was left.
    fn fill(place: &mut Option<Bucket>, limit: Option<u32>, now: Instant) {
        let Some(limit) = limit else {
            *place = None;
            return;
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
    }

    /// Takes `amount` of `what`; nothing where that is not there.
    fn take(place: &mut Option<Bucket>, what: &'static str, amount: u64) -> Result<(), ApiError> {
        let Some(bucket) = place else { return Ok(()) };
        if let Some(wait) = bucket.wait(amount) {
            let seconds = wait.min(LONGEST_WAIT).as_secs_f64().ceil().max(1.0) as u64;
            return Err(ApiError::rate_limited(what, bucket.limit, seconds));
        }
        bucket.level -= amount as f64;
        Ok(())
    }

    /// Puts `amount` back, or takes more where it is negative.
    fn put(place: &mut Option<Bucket>, amount: f64) {
        if let Some(bucket) = place {
            bucket.level = (bucket.level + amount).min(f64::from(bucket.limit));
        }
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

    fn key(name: &str) -> Arc<str> {
        name.into()
    }

    #[test]
    fn requests_are_refused_until_one_has_come_back() {
        let (quotas, start, two, k) = (Quotas::default(), Instant::now(), limits(2, 1000), key("k"));
        let at = |seconds| start + Duration::from_secs(seconds);
        quotas.enter(&k, two, start).unwrap();
        let headers = quotas.take(&k, two, 10, start).unwrap();
        assert_eq!(value(&headers, "x-ratelimit-limit-requests"), "2");
        assert_eq!(value(&headers, "x-ratelimit-remaining-requests"), "1");
        assert_eq!(value(&headers, "x-ratelimit-reset-requests"), "30s");
        assert_eq!(value(&headers, "x-ratelimit-remaining-tokens"), "990");
        assert_eq!(value(&headers, "x-ratelimit-reset-tokens"), "600ms");
        quotas.enter(&k, two, start).unwrap();
        let refused = quotas.enter(&k, two, at(1)).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code), (429, "rate_limit_exceeded"));
        assert!(refused.message.contains("2 requests a minute. Try again in 29 s."), "{}", refused.message);
        // What was refused took nothing.
        assert_eq!(value(&refused.headers, "x-ratelimit-remaining-tokens"), "1000");
        assert!(quotas.enter(&k, two, at(29)).is_err());
        assert!(quotas.enter(&k, two, at(30)).is_ok());
        assert!(quotas.enter(&k, two, at(30)).is_err());
        quotas.give_back(&k);
        assert!(quotas.enter(&k, two, at(30)).is_ok());
        assert!(quotas.enter(&key("other"), two, start).is_ok());
    }

    #[test]
    fn tokens_are_settled_by_what_was_used() {
        let (quotas, now, hundred, k) = (Quotas::default(), Instant::now(), limits(100, 100), key("k"));
        let left = |tokens| {
            let headers = quotas.take(&k, hundred, tokens, now)?;
            Ok::<_, ApiError>(value(&headers, "x-ratelimit-remaining-tokens").to_owned())
        };
        assert_eq!(left(80).unwrap(), "20");
        assert!(left(80).is_err());
        quotas.settle(&k, 80, 5);
        assert_eq!(left(80).unwrap(), "15");
        // An answer that was longer than estimated pauses the key until it is paid.
        quotas.settle(&k, 80, 195);
        let refused = left(1).unwrap_err();
        assert!(refused.message.contains("Try again in 61 s"), "{}", refused.message);
        // A long time is told shorter.
        quotas.settle(&k, 0, 1_000_000);
        assert!(left(1).unwrap_err().message.contains("Try again in 600 s"));
    }

    #[test]
    fn answers_at_the_same_time_cost_as_much_as_one_after_the_other() {
        let (quotas, start, few, k) = (Quotas::default(), Instant::now(), limits(100, 600), key("k"));
        for _ in 0..6 {
            quotas.take(&k, few, 100, start).unwrap();
        }
        for _ in 0..6 {
            quotas.settle(&k, 100, 1100);
        }
        // 6600 were used of 600, and 10 come back in a second.
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(quotas.take(&k, few, 1, at(600)).is_err());
        assert!(quotas.take(&k, few, 1, at(601)).is_ok());
    }

    #[test]
    fn a_request_larger_than_a_minute_goes_once_the_bucket_is_full() {
        let (quotas, start, few, k) = (Quotas::default(), Instant::now(), limits(100, 60), key("k"));
        assert!(quotas.take(&k, few, 500, start).is_ok());
        quotas.settle(&k, 500, 30);
        assert!(quotas.take(&k, few, 500, start).is_err());
        assert!(quotas.take(&k, few, 500, start + Duration::from_secs(30)).is_ok());
    }

    #[test]
    fn a_new_limit_counts_at_once_and_a_clock_that_goes_back_does_no_harm() {
        let (quotas, start, k) = (Quotas::default(), Instant::now() + Duration::from_secs(60), key("k"));
        quotas.enter(&k, limits(10, 10), start).unwrap();
        let back = start - Duration::from_secs(30);
        quotas.enter(&k, limits(20, 10), back).unwrap();
        let headers = quotas.take(&k, limits(20, 10), 0, back).unwrap();
        assert_eq!(value(&headers, "x-ratelimit-remaining-requests"), "17");
        assert!(quotas.take(&k, Limits::default(), 1 << 40, start).unwrap().is_empty());
        quotas.keep(&HashSet::from([key("other")]));
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
