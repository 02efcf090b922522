use std::time::Duration;

use super::*;

fn november() -> Month {
    Month::of(now(Instant::now()).time)
}

fn now(instant: Instant) -> Now {
    Now { instant, time: "2026-11-27T12:00:00Z".parse().unwrap() }
}

fn value<'a>(headers: &'a Headers, name: &str) -> &'a str {
    let found = headers.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no {name}"));
    found.1.to_str().unwrap()
}

fn limits(requests: u32, tokens: u32) -> Limits {
    Limits { requests: Some(requests), tokens: Some(tokens), month: None }
}

fn key(name: &str) -> Arc<str> {
    name.into()
}

#[test]
fn requests_are_refused_until_one_has_come_back() {
    let (quotas, start, two, k) = (Quotas::default(), Instant::now(), limits(2, 1000), key("k"));
    let at = |seconds| start + Duration::from_secs(seconds);
    quotas.enter(&k, two, now(start)).unwrap();
    let headers = quotas.take(&k, two, november(), 10, now(start)).unwrap();
    assert_eq!(value(&headers, "x-ratelimit-limit-requests"), "2");
    assert_eq!(value(&headers, "x-ratelimit-remaining-requests"), "1");
    assert_eq!(value(&headers, "x-ratelimit-reset-requests"), "30s");
    assert_eq!(value(&headers, "x-ratelimit-remaining-tokens"), "990");
    assert_eq!(value(&headers, "x-ratelimit-reset-tokens"), "600ms");
    quotas.enter(&k, two, now(start)).unwrap();
    let refused = quotas.enter(&k, two, now(at(1))).unwrap_err();
    assert_eq!((refused.status.as_u16(), refused.code), (429, "rate_limit_exceeded"));
    assert!(refused.message.contains("2 requests a minute. Try again in 29 s."), "{}", refused.message);
    // What was refused took nothing.
    assert_eq!(value(&refused.headers, "x-ratelimit-remaining-tokens"), "1000");
    assert!(quotas.enter(&k, two, now(at(29))).is_err());
    assert!(quotas.enter(&k, two, now(at(30))).is_ok());
    assert!(quotas.enter(&k, two, now(at(30))).is_err());
    quotas.give_back(&k, november());
    assert!(quotas.enter(&k, two, now(at(30))).is_ok());
    assert!(quotas.enter(&key("other"), two, now(start)).is_ok());
}

#[test]
fn tokens_are_settled_by_what_was_used() {
    let (quotas, start, hundred, k) = (Quotas::default(), Instant::now(), limits(100, 100), key("k"));
    let left = |tokens| {
        let headers = quotas.take(&k, hundred, november(), tokens, now(start))?;
        Ok::<_, ApiError>(value(&headers, "x-ratelimit-remaining-tokens").to_owned())
    };
    assert_eq!(left(80).unwrap(), "20");
    assert!(left(80).is_err());
    quotas.settle(&k, november(), 80, 5);
    assert_eq!(left(80).unwrap(), "15");
    // An answer that was longer than estimated pauses the key until it is paid.
    quotas.settle(&k, november(), 80, 195);
    let refused = left(1).unwrap_err();
    assert!(refused.message.contains("Try again in 61 s"), "{}", refused.message);
    // A long time is told shorter.
    quotas.settle(&k, november(), 0, 1_000_000);
    assert!(left(1).unwrap_err().message.contains("Try again in 600 s"));
}

#[test]
fn answers_at_the_same_time_cost_as_much_as_one_after_the_other() {
    let (quotas, start, few, k) = (Quotas::default(), Instant::now(), limits(100, 600), key("k"));
    for _ in 0..6 {
        quotas.take(&k, few, november(), 100, now(start)).unwrap();
    }
    for _ in 0..6 {
        quotas.settle(&k, november(), 100, 1100);
    }
    // 6600 were used of 600, and 10 come back in a second.
    let at = |seconds| start + Duration::from_secs(seconds);
    assert!(quotas.take(&k, few, november(), 1, now(at(600))).is_err());
    assert!(quotas.take(&k, few, november(), 1, now(at(601))).is_ok());
}

#[test]
fn a_request_larger_than_a_minute_goes_once_the_bucket_is_full() {
    let (quotas, start, few, k) = (Quotas::default(), Instant::now(), limits(100, 60), key("k"));
    assert!(quotas.take(&k, few, november(), 500, now(start)).is_ok());
    quotas.settle(&k, november(), 500, 30);
    assert!(quotas.take(&k, few, november(), 500, now(start)).is_err());
    assert!(quotas.take(&k, few, november(), 500, now(start + Duration::from_secs(30))).is_ok());
}

#[test]
fn a_new_limit_counts_at_once_and_a_clock_that_goes_back_does_no_harm() {
    let (quotas, start, k) = (Quotas::default(), Instant::now() + Duration::from_secs(60), key("k"));
    quotas.enter(&k, limits(10, 10), now(start)).unwrap();
    let back = start - Duration::from_secs(30);
    quotas.enter(&k, limits(20, 10), now(back)).unwrap();
    let headers = quotas.take(&k, limits(20, 10), november(), 0, now(back)).unwrap();
    assert_eq!(value(&headers, "x-ratelimit-remaining-requests"), "17");
    assert!(quotas.take(&k, Limits::default(), november(), 1 << 40, now(start)).unwrap().is_empty());
    quotas.keep(&HashSet::from([key("other")]));
    assert!(quotas.lock().minutes.is_empty());
}

/// A month's budget of 1000 tokens, and no other limit.
const BUDGET: Limits = Limits { requests: None, tokens: None, month: Some(1000) };

#[test]
fn a_month_is_over_when_its_budget_is_used_and_the_next_one_begins_anew() {
    let (quotas, k) = (Quotas::default(), key("k"));
    let take = |time: &str, tokens| {
        let now = Now { instant: Instant::now(), time: time.parse().unwrap() };
        let month = quotas.enter(&k, BUDGET, now).unwrap();
        quotas.take(&k, BUDGET, month, tokens, now).map(|_| month)
    };
    let last_second = "2026-11-30T23:59:59Z";
    let month = take(last_second, 800).unwrap();
    let refused = take(last_second, 201).unwrap_err();
    assert_eq!((refused.status.as_u16(), refused.code), (429, "insufficient_quota"));
    assert_eq!(refused.body()["error"]["type"], "insufficient_quota");
    for told in
        ["1000 tokens a month", "800 are used", "up to 201", "anew on 2026-12-01 00:00 UTC", "tokensPerMonth"]
    {
        assert!(refused.message.contains(told), "{}", refused.message);
    }
    // OpenAI's clients ask no second time.
    assert_eq!(value(&refused.headers, "x-should-retry"), "false");
    // What was refused took nothing, and an estimate is settled.
    take(last_second, 200).unwrap();
    quotas.settle(&k, month, 800, 700);
    take(last_second, 100).unwrap();
    assert!(take(last_second, 1).is_err());
    let december = take("2026-12-01T00:00:00Z", 999).unwrap();
    // A request of November costs nothing of December.
    quotas.settle(&k, month, 200, 50_000);
    take("2026-12-01T00:00:01Z", 1).unwrap();
    assert!(take("2026-12-01T00:00:02Z", 1).is_err());
    quotas.settle(&k, december, 999, 998);
    take("2026-12-31T23:59:59Z", 1).unwrap();
}

#[test]
fn a_minute_that_refuses_takes_nothing_of_the_month() {
    let (quotas, start, k) = (Quotas::default(), Instant::now(), key("k"));
    let both = Limits { month: Some(1000), ..limits(100, 100) };
    quotas.take(&k, both, november(), 100, now(start)).unwrap();
    let refused = quotas.take(&k, both, november(), 100, now(start)).unwrap_err();
    assert_eq!(refused.code, "rate_limit_exceeded");
    quotas.take(&k, BUDGET, november(), 900, now(start)).unwrap();
    assert!(quotas.take(&k, BUDGET, november(), 1, now(start)).is_err());
}
