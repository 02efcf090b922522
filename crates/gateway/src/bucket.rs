//! One limit of one key: a token bucket that several replicas of the gateway share.
//!
//! A replica alone fills its bucket at the key's limit, up to a minute's worth. Of several, each holds at most its share of that, so
//! that a burst is not theirs times, but fills at the whole limit less what the others use: a client all of whose requests go to one
//! replica has all of its limit. What the others use is believed to be what they used until the last exchange of counts, at most all
//! shares but one's own, and is settled with the truth at the next one. A replica that has not heard of the others for a minute
//! believes that they use all of their shares.
//!
//! **Bound.** With a limit of L a minute, R replicas and D seconds until each knows what another admitted, all replicas together admit
//! in any t seconds at most `L * (1 + t / 60 + R * D / 60)`, and R times the largest single request. D is two pauses between exchanges
//! at most, so 30 s. With one replica nothing is delayed: `L * (1 + t / 60)` and one request.
//!
//! *Why.* Take the last request admitted in the t seconds, and the replica i that did so. Its bucket held at most L/R at the
//! beginning. Each interval between two exchanges fills it with what was not withheld and takes what the others used beyond that, so
//! by L times the interval less all that others used, at most; of the first interval, what was withheld before the t seconds may
//! count against what was used in them: at most (1 - 1/R) * L * D/60. So all that i admitted or knows of is at most
//! `L * (1/R + t/60 + (1 - 1/R) * D/60)` and a request. What it does not know was admitted in the last D seconds by the R - 1 others, each
//! at most its share and D seconds' worth, `L * (1/R + D/60)`, and a request. The sum is the bound.
use std::time::{Duration, Instant};

use axum::http::{HeaderName, HeaderValue};

use crate::error::Headers;

const MINUTE: f64 = 60.0;
/// Nothing heard of the others for so long: they are believed to use all of their shares.
const SILENCE: Duration = Duration::from_secs(60);
/// Between two exchanges that tell how fast the others use the limit.
const SHORTEST: Duration = Duration::from_secs(1);

/// The replicas of the gateway.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// How many there are, this one with them; at least 1.
    pub replicas: u32,
    /// When counts were last exchanged.
    pub heard: Option<Instant>,
}

impl Pool {
    fn share(self, limit: u32) -> f64 {
        f64::from(limit) / f64::from(self.replicas.max(1))
    }

    fn is_silent(self, now: Instant) -> bool {
        self.heard.is_none_or(|heard| now.saturating_duration_since(heard) > SILENCE)
    }
}

/// Fills evenly; below zero after answers that were longer than estimated, and after what others used beyond what was believed.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// A minute's worth.
    pub limit: u32,
    level: f64,
    /// This replica's share of the limit, to which it fills.
    share: f64,
    /// What it fills with in a minute.
    pace: f64,
    at: Instant,
    /// What others used in a minute, as last heard.
    others: f64,
    /// What was left to the others since.
    withheld: f64,
    heard: Instant,
}

impl Bucket {
    /// Full.
    pub fn new(limit: u32, pool: Pool, now: Instant) -> Self {
        let (pace, share) = (f64::from(limit), pool.share(limit));
        Self { limit, level: share, share, pace, at: now, others: 0.0, withheld: 0.0, heard: now }
    }

    /// As it stands now; a new limit keeps the share that was left.
    pub fn fill(&mut self, limit: u32, pool: Pool, now: Instant) {
        let full = f64::from(limit);
        if self.limit != limit {
            self.level *= full / f64::from(self.limit);
            self.limit = limit;
        }
        self.share = pool.share(limit);
        let all_theirs = full - self.share;
        let theirs = if pool.is_silent(now) { all_theirs } else { self.others.min(all_theirs) };
        self.pace = full - theirs;
        let passed = now.saturating_duration_since(self.at).as_secs_f64() / MINUTE;
        self.withheld += passed * theirs;
        self.level = (self.level + passed * self.pace).min(self.share);
        self.at = self.at.max(now);
    }

    /// Others used `amount` since last time; less than nothing where they gave back what they had taken as an estimate.
    pub fn hear(&mut self, amount: f64, pool: Pool, now: Instant) {
        self.fill(self.limit, pool, now);
        let used = amount.max(0.0);
        self.level = (self.level - (amount - self.withheld.min(used))).min(self.share);
        self.withheld = 0.0;
        let since = now.saturating_duration_since(self.heard);
        // Of a moment no pace can be told.
        if since >= SHORTEST {
            self.others = used * MINUTE / since.as_secs_f64();
        }
        self.heard = now;
    }

    /// Takes `amount`.
    ///
    /// # Errors
    /// It is not there, and nothing is taken; how long until it is.
    pub fn take(&mut self, amount: u64) -> Result<(), Duration> {
        if let Some(wait) = self.wait(amount) {
            return Err(wait);
        }
        self.level -= amount as f64;
        Ok(())
    }

    /// Puts `amount` back, or takes more where it is negative.
    pub fn put(&mut self, amount: f64) {
        self.level = (self.level + amount).min(self.share);
    }

    /// How long until `amount` is there. More than it can hold never is: it may go once the bucket is full.
    fn wait(&self, amount: u64) -> Option<Duration> {
        let missing = (amount as f64).min(self.share) - self.level;
        // Filling in many small steps rounds.
        (missing > 1e-6).then(|| self.filled_in(missing))
    }

    fn filled_in(&self, missing: f64) -> Duration {
        Duration::try_from_secs_f64(missing * MINUTE / self.pace).unwrap_or(Duration::MAX)
    }

    /// What is left of `what`, in OpenAI's headers.
    pub fn tell(&self, what: &str, headers: &mut Headers) {
        let reset = self.filled_in((self.share - self.level).max(0.0));
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

    fn pool(replicas: u32, heard: Instant) -> Pool {
        Pool { replicas, heard: Some(heard) }
    }

    #[test]
    fn a_share_is_held_and_the_whole_limit_comes_back_where_nobody_else_uses_it() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut bucket = Bucket::new(120, pool(3, start), start);
        assert!(bucket.take(40).is_ok());
        assert_eq!(bucket.take(1), Err(Duration::from_millis(500)));
        bucket.fill(120, pool(3, start), at(10));
        assert!(bucket.take(20).is_ok() && bucket.take(1).is_err());
        // The others use half of it.
        bucket.hear(10.0, pool(3, at(10)), at(10));
        assert_eq!(bucket.level, -10.0);
        bucket.fill(120, pool(3, at(10)), at(20));
        assert_eq!(bucket.level, 0.0);
        // As was believed: nothing is owed for it.
        bucket.hear(10.0, pool(3, at(20)), at(20));
        assert_eq!(bucket.level, 0.0);
        // They used less; what was left to them is lost.
        bucket.hear(0.0, pool(3, at(30)), at(30));
        assert_eq!(bucket.level, 10.0);
        bucket.hear(-15.0, pool(3, at(30)), at(30));
        assert_eq!(bucket.level, 25.0);
    }

    #[test]
    fn two_exchanges_in_one_moment_do_not_make_the_others_idle() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut bucket = Bucket::new(120, pool(3, start), start);
        bucket.take(40).unwrap();
        bucket.hear(10.0, pool(3, at(10)), at(10));
        bucket.hear(0.0, pool(3, at(10)), at(10) + Duration::from_millis(5));
        bucket.fill(120, pool(3, at(10)), at(20));
        // They are still believed to use half of it.
        assert!((19.9..20.1).contains(&bucket.level), "{}", bucket.level);
    }

    #[test]
    fn who_hears_nothing_for_long_keeps_to_its_share() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut bucket = Bucket::new(120, pool(2, start), start);
        bucket.take(60).unwrap();
        bucket.fill(120, pool(2, start), at(61));
        bucket.take(60).unwrap();
        bucket.fill(120, pool(2, start), at(76));
        assert_eq!(bucket.level, 15.0);
        let nobody = Pool { replicas: 2, heard: None };
        bucket.fill(120, nobody, at(91));
        assert_eq!(bucket.level, 30.0);
        // The others kept to theirs meanwhile, and nobody pays for it.
        bucket.hear(60.0, pool(2, at(91)), at(91));
        assert_eq!(bucket.level, 30.0);
    }

    #[test]
    fn one_replica_needs_nobody() {
        let start = Instant::now();
        let mut bucket = Bucket::new(60, Pool { replicas: 1, heard: None }, start);
        bucket.take(60).unwrap();
        bucket.fill(60, Pool { replicas: 1, heard: None }, start + Duration::from_secs(3600));
        assert_eq!(bucket.level, 60.0);
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
