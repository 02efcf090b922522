use std::collections::BTreeMap;

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::testing::object;

const ZERO: i64 = 1_700_000_000;

/// How requests to the candidate ended, second by second.
#[derive(Clone, Default)]
struct Told {
    seconds: BTreeMap<i64, Ended>,
    /// Gateways have told up to then.
    until: i64,
}

impl Numbers for Told {
    fn told_until(&self, after: i64) -> i64 {
        self.until.max(after)
    }

    fn ended(&self, revision: &str, after: i64, until: i64) -> Ended {
        let all = self.seconds.iter().filter(|(at, _)| (after + 1..=until).contains(at) && revision == "new");
        all.fold(Ended::default(), |sum, (_, ended)| sum.and(*ended))
    }
}

fn rules(gates: Value) -> Rollout {
    let steps = json!([{"percent": 10, "after": "1m"}, {"percent": 50, "after": "2m"}]);
    object(json!({"strategy": "Canary", "steps": steps, "gates": gates}))
}

fn seen() -> Seen<'static> {
    Seen {
        wanted: "new",
        stable: Some("old"),
        comparable: true,
        prepared: true,
        answers: true,
        replaced: false,
        model: None,
    }
}

/// Streamed answers of 11 tokens in 500 ms, the first after 200 ms.
fn ended(requests: u64, errors: u64) -> Ended {
    let streams = requests - errors;
    Ended {
        requests,
        errors,
        streams,
        first_token_ms: 200 * streams,
        tokens: 10 * streams,
        decode_ms: 500 * streams,
    }
}

/// `each` second of these seconds ends so, and all of it is told.
fn flowing(each: Ended, seconds: i64) -> Told {
    let seconds: BTreeMap<_, _> = (1..=seconds).map(|at| (ZERO + at, each)).collect();
    Told { until: ZERO + seconds.len() as i64, seconds }
}

/// Every ten seconds from the beginning on; where it stands after each, until nothing changes any more.
fn run(rules: &Rollout, seen: &Seen<'_>, told: &Told, seconds: i64) -> Vec<RolloutStatus> {
    let mut all: Vec<RolloutStatus> = Vec::new();
    for at in (0..=seconds).step_by(10) {
        let next = decide(Some(rules), all.last(), seen, told, ZERO + at).expect("a candidate");
        if all.last() != Some(&next) {
            all.push(next);
        }
    }
    all
}

fn phases(all: &[RolloutStatus]) -> Vec<(RolloutPhase, i32, i32)> {
    let mut phases: Vec<_> = all.iter().map(|status| (status.phase, status.step, status.percent)).collect();
    phases.dedup();
    phases
}

use RolloutPhase::{Failed, Promoted, Promoting, Starting, Testing};

#[test]
fn a_candidate_that_holds_its_gates_goes_through_every_step_and_stays() {
    let gates = json!([
        {"metric": "ErrorRate", "atMost": "0.01"}, {"metric": "TimeToFirstToken", "atMost": "0.25"},
        {"metric": "TokensPerSecond", "atLeast": "19"},
    ]);
    let (rules, told) = (rules(gates), flowing(ended(3, 0), 400));
    let all = run(&rules, &seen(), &told, 400);
    let expected =
        [(Starting, 1, 0), (Testing, 1, 10), (Starting, 2, 10), (Testing, 2, 50), (Promoting, 2, 50)];
    assert_eq!(phases(&all), expected);
    let last = all.last().expect("some");
    let told_of = last.message.clone().expect("why");
    for words in
        ["ErrorRate is 0 and must be at most 0.01", "TimeToFirstToken is 0.2 s", "TokensPerSecond is 20"]
    {
        assert!(told_of.contains(words), "{told_of}");
    }
    // Each step lasted as long as it should, and counted its own requests alone.
    let begun: Vec<i64> =
        all.iter().filter(|s| s.phase == Testing && s.counted == s.since).map(|s| s.since).collect();
    assert_eq!(begun.len(), 2);
    assert!(begun[1] - begun[0] >= 60 && last.counted - last.since >= 120);
    assert_eq!(last.candidate.requests, 3 * (last.counted - last.since));
    // It stays until the replicas are what it is, and is told of until something else is wanted.
    let now = ZERO + 500;
    let same = decide(Some(&rules), Some(last), &Seen { stable: Some("new"), ..seen() }, &told, now);
    assert_eq!(same.as_ref(), Some(last));
    let whole = Seen { stable: Some("new"), replaced: true, ..seen() };
    let promoted = decide(Some(&rules), Some(last), &whole, &told, now).expect("told");
    assert_eq!((promoted.phase, promoted.percent, &promoted.message), (Promoted, 0, &last.message));
    assert_eq!(decide(Some(&rules), Some(&promoted), &whole, &told, now).as_ref(), Some(&promoted));
    let next = Seen { wanted: "newer", stable: Some("new"), ..seen() };
    assert_eq!(decide(Some(&rules), Some(&promoted), &next, &told, now).expect("begun").phase, Starting);
}

#[rstest]
#[case::errors(json!([{"metric": "ErrorRate", "atMost": "0.1"}]), ended(3, 1), "ErrorRate is 0.333 and must be at most 0.1")]
#[case::slow_first(json!([{"metric": "TimeToFirstToken", "atMost": "0.1"}]), ended(3, 0), "TimeToFirstToken is 0.2 s and must be at most 0.1")]
#[case::slow(json!([{"metric": "TokensPerSecond", "atLeast": "1000"}]), ended(3, 0), "TokensPerSecond is 20 and must be at least 1000")]
fn a_gate_that_does_not_hold_ends_it_and_the_same_is_not_tried_again(
    #[case] gates: Value,
    #[case] each: Ended,
    #[case] words: &str,
) {
    let (first, told) = (rules(gates), flowing(each, 400));
    let all = run(&first, &seen(), &told, 400);
    assert_eq!(phases(&all), [(Starting, 1, 0), (Testing, 1, 10), (Failed, 1, 0)]);
    let last = all.last().expect("some");
    let message = last.message.as_deref().expect("why");
    assert!(message.contains(words) && message.contains("old goes on as before"), "{message}");
    assert!(last.counted - last.since < 60, "as soon as it is known");
    assert!(holds_back(Some(last)) && !has_candidate(Some(last)));
    // Other rules, another revision, or none: each is another attempt, or ends it.
    let now = ZERO + 500;
    let again = |rules: Option<&Rollout>, seen: Seen<'_>| decide(rules, Some(last), &seen, &told, now);
    assert_eq!(again(Some(&first), seen()).as_ref(), Some(last));
    assert_eq!(again(Some(&rules(json!([]))), seen()).expect("again").phase, Starting);
    assert_eq!(again(Some(&first), Seen { wanted: "newer", ..seen() }).expect("again").revision, "newer");
    assert_eq!(again(Some(&first), Seen { wanted: "old", ..seen() }), None);
    assert_eq!(again(None, seen()), None);
    assert_eq!(again(Some(&object(json!({"strategy": "RollingUpdate"}))), seen()), None);
}

#[test]
fn where_nothing_works_there_is_nothing_to_compare_with() {
    let (rules, told) = (rules(json!([])), Told::default());
    for alone in [
        Seen { stable: None, ..seen() },
        Seen { stable: Some("new"), ..seen() },
        Seen { comparable: false, ..seen() },
    ] {
        assert_eq!(decide(Some(&rules), None, &alone, &told, ZERO), None);
    }
    // One that has begun goes on, whatever becomes of the stable revision.
    let begun = decide(Some(&rules), None, &seen(), &told, ZERO);
    let lost = Seen { comparable: false, ..seen() };
    assert_eq!(decide(Some(&rules), begun.as_ref(), &lost, &told, ZERO).expect("goes on").phase, Testing);
}

#[test]
fn nobody_is_sent_to_a_candidate_whose_replicas_are_not_ready() {
    let (rules, told) = (rules(json!([])), flowing(Ended::default(), 4000));
    let all = run(&rules, &Seen { prepared: false, ..seen() }, &told, 4000);
    assert_eq!(phases(&all), [(Starting, 1, 0)]);
    let all = run(&rules, &Seen { answers: false, ..seen() }, &told, 4000);
    assert_eq!(phases(&all), [(Starting, 1, 0)]);
}

#[test]
fn a_gate_is_judged_by_enough_requests_and_the_step_says_that_it_waits() {
    let (rules, told) = (
        rules(json!([{"metric": "ErrorRate", "atMost": "0.02"}])),
        Told { until: ZERO + 900, ..Told::default() },
    );
    let mut few = told.clone();
    (11..=59).for_each(|at| _ = few.seconds.insert(ZERO + at, ended(1, 0)));
    let all = run(&rules, &seen(), &few, 900);
    assert_eq!(phases(&all), [(Starting, 1, 0), (Testing, 1, 10)]);
    let words = doing(&rules, all.last().expect("some"), "old").unwrap();
    assert!(words.contains("The step waits: ErrorRate is judged by 50 requests, and 49 came"), "{words}");
    // An error among so few is none too many, two are, since no later request makes up for them.
    few.seconds.insert(ZERO + 20, ended(1, 1));
    assert_eq!(run(&rules, &seen(), &few, 900).last().expect("some").phase, Testing);
    few.seconds.insert(ZERO + 21, ended(1, 1));
    assert_eq!(run(&rules, &seen(), &few, 900).last().expect("some").phase, Failed);
}

#[rstest]
#[case::good(Some("0.4"), None)]
#[case::bad(Some("0.3"), Some("ROUGEL of Model tuned is 0.3 and must be at least 0.35"))]
#[case::unknown(None, Some("Model tuned has no score ROUGEL"))]
fn a_score_is_judged_before_a_pod_is_made(#[case] score: Option<&str>, #[case] why: Option<&str>) {
    let scores: Vec<Value> = score.iter().map(|score| json!({"metric": "ROUGEL", "after": score})).collect();
    let model: Model = object(json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "tuned"},
        "spec": {"source": {"uri": "pvc://models/x"}}, "status": {"scores": scores},
    }));
    let rules = rules(json!([{"metric": "ROUGEL", "atLeast": "0.35"}]));
    let seen = Seen { model: Some(&model), ..seen() };
    let begun = decide(Some(&rules), None, &seen, &Told::default(), ZERO).expect("a candidate");
    assert_eq!(begun.phase, if why.is_some() { Failed } else { Starting });
    assert!(why.is_none_or(|why| begun.message.expect("why").contains(why)));
}

#[test]
fn errors_while_the_next_steps_replicas_start_count_as_well() {
    let rules = rules(json!([{"metric": "ErrorRate", "atMost": "0.1"}]));
    let mut told = flowing(ended(3, 0), 400);
    let first = run(&rules, &seen(), &told, 70);
    let waits = first.last().expect("some");
    assert_eq!((waits.phase, waits.step, waits.percent), (Starting, 2, 10));
    (100..=120).for_each(|at| _ = told.seconds.insert(ZERO + at, ended(3, 2)));
    let unprepared = Seen { prepared: false, ..seen() };
    let next = decide(Some(&rules), Some(waits), &unprepared, &told, ZERO + 130).expect("told");
    assert_eq!(next.phase, Failed);
}

#[test]
fn a_clock_that_is_set_back_begins_the_step_anew() {
    let (rules, told) = (rules(json!([])), flowing(ended(1, 0), 400));
    let all = run(&rules, &seen(), &told, 50);
    let before = all.last().expect("some");
    let after = decide(Some(&rules), Some(before), &seen(), &told, ZERO - 5000).expect("told");
    assert_eq!((after.phase, after.step, after.percent, after.since), (Testing, 1, 10, ZERO - 5000));
    assert_eq!(after.candidate, EndedStatus::default());
}

/// Whatever flows, whenever it is looked at, whatever an operator forgets by starting anew.
#[test]
fn however_often_it_is_decided_the_same_comes_of_it() {
    for seed in 0..300 {
        let mut random = StdRng::seed_from_u64(seed);
        let gates =
            json!([{"metric": "ErrorRate", "atMost": "0.1"}, {"metric": "TokensPerSecond", "atLeast": "15"}]);
        let rules = rules(gates);
        let mut told = Told::default();
        for at in 1..=900 {
            let requests = random.random_range(0..4);
            let errors = if random.random_bool(0.05) { random.random_range(0..=requests) } else { 0 };
            told.seconds.insert(ZERO + at, ended(requests, errors));
        }
        let mut status: Option<RolloutStatus> = None;
        let mut sum = Ended::default();
        let (mut counted, mut percent) = (ZERO, 0);
        let mut at = 0;
        while at < 900 {
            at += random.random_range(1..15);
            told.until = told.until.max(ZERO + at - random.random_range(0..20));
            let next = decide(Some(&rules), status.as_ref(), &seen(), &told, ZERO + at).expect("a candidate");
            // Deciding twice by the same notes is deciding once: what was written may not have come back yet.
            let again = decide(Some(&rules), status.as_ref(), &seen(), &told, ZERO + at);
            assert_eq!(again.as_ref(), Some(&next), "{seed}");
            // Nobody goes back from the candidate but when it fails.
            assert!(next.percent >= percent || next.phase == Failed, "{seed}");
            percent = next.percent;
            if next.since > counted {
                (counted, sum) = (next.since, Ended::default());
            }
            sum = sum.and(told.ended("new", counted, next.counted));
            counted = counted.max(next.counted);
            // No request counts twice, none is left out.
            assert_eq!(next.candidate.requests, sum.requests as i64, "{seed}");
            assert_eq!(next.candidate.errors, sum.errors as i64, "{seed}");
            if next.phase == Promoting {
                assert!(next.candidate.errors as f64 <= 0.1 * next.candidate.requests as f64, "{seed}");
                assert!(next.candidate.requests >= 20 && next.step == 2, "{seed}");
                break;
            }
            status = Some(next);
        }
    }
}

/// More errors of the same requests never make a candidate that had failed hold.
#[test]
fn more_errors_never_help() {
    let rules = rules(json!([{"metric": "ErrorRate", "atMost": "0.05"}]));
    let furthest = |errors: i64| {
        let mut told = flowing(ended(1, 0), 400);
        (1..=errors).for_each(|n| _ = told.seconds.insert(ZERO + 7 * n, ended(1, 1)));
        let last = run(&rules, &seen(), &told, 400).pop().expect("some");
        if last.phase == Failed { -1 } else { last.step }
    };
    let steps: Vec<i32> = (0..=40).map(furthest).collect();
    assert!(steps.windows(2).all(|pair| pair[1] <= pair[0]), "{steps:?}");
    assert_eq!((steps[0], steps[40]), (2, -1));
}

#[rstest]
#[case::absurd(Ended { requests: u64::MAX, errors: u64::MAX, streams: u64::MAX, first_token_ms: u64::MAX, tokens: u64::MAX, decode_ms: u64::MAX })]
#[case::more_errors_than_requests(Ended { errors: 9, ..Ended::default() })]
#[case::tokens_in_no_time(Ended { requests: 30, streams: 30, tokens: 30, ..Ended::default() })]
fn whatever_a_gateway_says_is_a_number(#[case] each: Ended) {
    let gates = json!([
        {"metric": "ErrorRate", "atMost": "0"}, {"metric": "TimeToFirstToken", "atMost": "1"},
        {"metric": "TokensPerSecond", "atLeast": "1"},
    ]);
    let rules = rules(gates);
    for status in run(&rules, &seen(), &flowing(each, 300), 300) {
        assert!(doing(&rules, &status, "old").unwrap().len() < 1000);
        let json = serde_json::to_value(&status).expect("JSON");
        let most = |value: &Value| value.as_i64().is_none_or(|n| (0..=MOST as i64).contains(&n));
        assert!(json["candidate"].as_object().expect("counts").values().all(most), "{json}");
    }
}
