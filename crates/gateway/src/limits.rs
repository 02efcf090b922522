//! What a key may use in a minute and in a month. Tokens are taken as an estimate and settled when the answer is known.
//!
//! A minute is a [`Bucket`] each for requests and tokens, a month a sum in the [`Ledger`]; both know of the other replicas of the
//! gateway what they told last ([`crate::exchange`]).
//!
//! **Bound of a month.** With one replica, what is let in is never estimated at more than the budget. Of several, each knows what the
//! others let in until D seconds ago (two pauses between exchanges, so 30 s): the budget is exceeded by at most what the others let in
//! during these seconds, which the key's limit of tokens a minute bounds where it has one.
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use jiff::Timestamp;

use crate::bucket::{Bucket, Pool};
use crate::counts::{Change, Page, Told};
use crate::error::{ApiError, Headers};
use crate::ledger::Ledger;
use crate::month::Month;

/// A key's limits; absent: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a minute.
    pub requests: Option<u32>,
    /// Tokens a minute.
    pub tokens: Option<u32>,
    /// Tokens a calendar month in UTC.
    pub month: Option<u64>,
}

/// The moment, by the clock that never goes back and by the calendar's.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For minutes.
    pub instant: Instant,
    /// For months.
    pub time: Timestamp,
}

impl Now {
    /// By the machine's clocks.
    pub fn read() -> Self {
        Self { instant: Instant::now(), time: Timestamp::now() }
    }
}

/// What all keys used, by the keys' names.
#[derive(Debug)]
pub struct Quotas(Mutex<State>);

#[derive(Debug)]
struct State {
    minutes: HashMap<Arc<str>, Buckets>,
    months: Ledger,
    pool: Pool,
}

#[derive(Debug, Default)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

impl Default for Quotas {
    /// As of a gateway that is alone until it hears of others.
    fn default() -> Self {
        let months = Ledger::new(format!("{:016x}", rand::random::<u64>()));
        let pool = Pool { replicas: 1, heard: None };
        Self(Mutex::new(State { minutes: HashMap::new(), months, pool }))
    }
}

impl Quotas {
    /// Takes one request of what the key may send in a minute, and gives the month that the request belongs to.
    ///
    /// # Errors
    /// 429 where there is none left, with the time after which there is; nothing is taken then.
    pub fn enter(&self, key: &Arc<str>, limits: Limits, now: Now) -> Result<Month, ApiError> {
        let month = Month::of(now.time);
        let State { minutes, months, pool } = &mut *self.lock();
        let buckets = minutes.entry(Arc::clone(key)).or_default();
        buckets.fill(limits, *pool, now.instant);
        take(&mut buckets.requests, "requests", 1).map_err(|refusal| refusal.with_headers(buckets.told()))?;
        months.add(key, month, Change { requests: 1, tokens: 0 });
        Ok(month)
    }

    /// Gives a request back that the gateway could not serve, through no fault of its client.
    pub fn give_back(&self, key: &Arc<str>, month: Month) {
        let State { minutes, months, pool: _ } = &mut *self.lock();
        if let Some(bucket) = minutes.get_mut(key).and_then(|buckets| buckets.requests.as_mut()) {
            bucket.put(1.0);
        }
        months.add(key, month, Change { requests: -1, tokens: 0 });
    }

    /// Takes `tokens` of the key's minute and month, and says in OpenAI's headers what is left of the minute.
    ///
    /// # Errors
    /// 429 where they are not there: `insufficient_quota` for a month, else as [`Quotas::enter`]; nothing is taken then.
    pub fn take(
        &self,
        key: &Arc<str>,
        limits: Limits,
        month: Month,
        tokens: u64,
        now: Now,
    ) -> Result<Headers, ApiError> {
        let State { minutes, months, pool } = &mut *self.lock();
        let buckets = minutes.entry(Arc::clone(key)).or_default();
        buckets.fill(limits, *pool, now.instant);
        if let Some(budget) = limits.month {
            let used = months.used(key, month).tokens;
            if used.saturating_add(tokens) > budget {
                let refusal = ApiError::budget_used(budget, used, tokens, month, now.time);
                return Err(refusal.with_headers(buckets.told()));
            }
        }
        take(&mut buckets.tokens, "tokens", tokens)
            .map_err(|refusal| refusal.with_headers(buckets.told()))?;
        months.add(key, month, Change { requests: 0, tokens: signed(tokens) });
        Ok(buckets.told())
    }

    /// Corrects what a request of `month` took as an estimate: `used` is what it cost. A debt is paid in full, whatever it came from:
    /// many long answers at a time are not less than one after the other.
    pub fn settle(&self, key: &Arc<str>, month: Month, estimate: u64, used: u64) {
        let State { minutes, months, pool: _ } = &mut *self.lock();
        if let Some(bucket) = minutes.get_mut(key).and_then(|buckets| buckets.tokens.as_mut()) {
            bucket.put(estimate as f64 - used as f64);
        }
        months.add(key, month, Change { requests: 0, tokens: signed(used).saturating_sub(signed(estimate)) });
    }

    /// Tokens that a key has used in this month, as far as this replica knows.
    pub fn used(&self, key: &str, month: Month) -> u64 {
        self.lock().months.used(key, month).tokens
    }

    /// Forgets the minutes of keys that are no more; what they used stays in their months.
    pub fn keep(&self, known: &HashSet<Arc<str>>) {
        self.lock().minutes.retain(|key, _| known.contains(key));
    }

    /// There are so many replicas, this one with them.
    pub fn are_shared_by(&self, replicas: u32) {
        self.lock().pool.replicas = replicas.max(1);
    }

    /// Takes in what stands in the ConfigMap.
    pub fn hear(&self, page: &Page, now: Instant) {
        let State { minutes, months, pool } = &mut *self.lock();
        let others = months.hear(page);
        for (key, buckets) in minutes {
            let change = others.get(key).copied().unwrap_or_default();
            let all = [(&mut buckets.requests, change.requests), (&mut buckets.tokens, change.tokens)];
            for (bucket, amount) in all {
                if let Some(bucket) = bucket {
                    bucket.hear(amount as f64, *pool, now);
                }
            }
        }
    }

    /// Whether it is not known of the last write that it was done: then it is what is to be written.
    pub fn is_telling(&self) -> bool {
        self.lock().months.is_telling()
    }

    /// What is to be written there after [`Quotas::hear`], if anything.
    pub fn tell(&self) -> Option<Told> {
        self.lock().months.tell()
    }

    /// It was written.
    pub fn was_told(&self) {
        self.lock().months.was_told();
    }

    /// The others were heard, and hear of this replica.
    pub fn in_touch(&self, now: Instant) {
        self.lock().pool.heard = Some(now);
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No request has so many tokens.
fn signed(tokens: u64) -> i64 {
    tokens.try_into().unwrap_or(i64::MAX)
}

/// Takes `amount` of `what`; nothing where that is not there.
fn take(place: &mut Option<Bucket>, what: &'static str, amount: u64) -> Result<(), ApiError> {
    let Some(bucket) = place else { return Ok(()) };
    bucket.take(amount).map_err(|wait| ApiError::rate_limited(what, bucket.limit, wait))
}

impl Buckets {
    /// As they stand now.
    fn fill(&mut self, limits: Limits, pool: Pool, now: Instant) {
        for (place, limit) in [(&mut self.requests, limits.requests), (&mut self.tokens, limits.tokens)] {
            match (place.as_mut(), limit) {
                (_, None) => *place = None,
                (None, Some(limit)) => *place = Some(Bucket::new(limit, pool, now)),
                (Some(bucket), Some(limit)) => bucket.fill(limit, pool, now),
            }
        }
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

#[cfg(test)]
mod shared;
#[cfg(test)]
mod tests;
