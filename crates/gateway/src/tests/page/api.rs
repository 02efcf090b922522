//! What is told to whom.
use lathe_contract::{MAX_CURVES_BYTES, Scope, new_key};
use reqwest::StatusCode;
use rstest::rstest;
use serde_json::{Value, json};

use super::super::rig::{Rig, Setup, start, start_with};
use super::{at_step, hand_over, operators_token, plot, tenants};

const OVERVIEW: &str = "/lathe/v1/overview";

/// What the key of this number is told.
async fn told(rig: &Rig, key: u8, path: &str) -> (u16, Value) {
    let answer =
        rig.client.get(format!("{}{path}", rig.url)).bearer_auth(new_key([key; 32]).0).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

fn names(list: &Value) -> Vec<String> {
    let name =
        |item: &Value| format!("{}/{}", item["namespace"].as_str().unwrap(), item["name"].as_str().unwrap());
    list.as_array().unwrap().iter().map(name).collect()
}

#[tokio::test]
async fn a_key_is_told_of_its_own_namespace_and_nothing_of_another() {
    let rig = start_with(&[], tenants()).await;
    let (status, overview) = told(&rig, 1, OVERVIEW).await;
    assert_eq!((status, &overview["key"], &overview["namespace"]), (200, &json!("k"), &json!("team-a")));
    assert_eq!(names(&overview["services"]), ["team-a/summaries", "team-a/support"]);
    assert_eq!(names(&overview["jobs"]), ["team-a/later", "team-a/tone"]);
    let support = &overview["services"][1];
    assert_eq!((&support["replicas"], &support["readyReplicas"]), (&json!(3), &json!(2)));
    assert_eq!(support["throughput"], json!({"prompt": 1240.0, "generation": 87.5, "waiting": 4}));
    let models = json!([{"id": "team-a/support", "answers": true}, {"id": "team-a/tone", "answers": true}]);
    assert_eq!(support["models"], models);
    let decision = json!({"time": "2026-01-01T10:05:00Z", "from": 1, "to": 3, "reason": "AboveTarget", "message": "190 of 210 tokens/s are used."});
    assert_eq!((&support["decisions"][0], support["decisions"].as_array().unwrap().len()), (&decision, 2));
    assert!(overview["services"][0]["ready"]["message"].as_str().unwrap().contains("0 of 3 nvidia-h200"));
    let tone = &overview["jobs"][1];
    assert_eq!((&tone["base"], &tone["scores"][0]["after"]), (&json!("base"), &json!("3.25")));
    assert!(!overview.to_string().contains("secret"), "{overview}");

    let (_, other) = told(&rig, 2, OVERVIEW).await;
    assert_eq!(
        (names(&other["services"]), names(&other["jobs"])),
        (vec!["team-b/secret-plans".to_owned()], vec!["team-b/secret-job".to_owned()])
    );
    assert!(!other.to_string().contains("team-a"), "{other}");
}

#[tokio::test]
async fn a_key_of_some_models_is_told_of_no_other_one() {
    let rig = start_with(&[], tenants()).await;
    let (_, overview) = told(&rig, 3, OVERVIEW).await;
    assert_eq!(names(&overview["services"]), ["team-a/support"]);
    assert_eq!(overview["services"][0]["models"], json!([{"id": "team-a/tone", "answers": true}]));
    assert_eq!(names(&overview["jobs"]), ["team-a/tone"]);
    // Their words may name what it must not know.
    let decision = &overview["services"][0]["decisions"][0];
    assert_eq!((&decision["to"], &decision["message"]), (&json!(3), &json!("")));
    assert_eq!(
        (&overview["services"][0]["ready"]["message"], &overview["services"][0]["ready"]["reason"]),
        (&json!(""), &json!("Ready"))
    );
    assert_eq!(
        (&overview["jobs"][0]["succeeded"]["message"], &overview["jobs"][0]["base"]),
        (&json!(""), &json!(null))
    );
    assert_eq!(told(&rig, 3, "/lathe/v1/jobs/team-a/later/losses").await.0, 404);
}

#[tokio::test]
async fn losses_are_those_of_a_job_that_the_key_may_see() {
    let rig = start_with(&[], tenants()).await;
    rig.cluster.jobs.saw(&at_step(20));
    plot(&rig, vec![(10, 2.8562), (20, 2.411)]).await;
    let (status, losses) = told(&rig, 1, "/lathe/v1/jobs/team-a/later/losses").await;
    assert_eq!((status, losses), (200, json!({"points": [[10, 2.8562], [20, 2.411]]})));
    let unknown = told(&rig, 1, "/lathe/v1/jobs/team-b/none/losses").await;
    assert_eq!(unknown.0, 404);
    for path in
        ["/lathe/v1/jobs/team-b/secret-job/losses", "/lathe/v1/jobs/team-a%2F..%2Fteam-b/secret-job/losses"]
    {
        let (status, error) = told(&rig, 1, path).await;
        assert_eq!((status, &error["error"]["code"]), (404, &unknown.1["error"]["code"]), "{path}");
    }
}

#[tokio::test]
async fn losses_are_taken_from_the_operator_alone_and_once_jobs_are_known() {
    let rig = start_with(&[], tenants()).await;
    let key = new_key([1; 32]).0;
    let (reader, writer) = (operators_token(Scope::Report), operators_token(Scope::Curves));
    let none = || r#"{"curves": []}"#.to_owned();
    for stranger in [None, Some(key.as_str()), Some(reader.as_str())] {
        assert_eq!(hand_over(&rig, stranger, none()).await, 401);
    }
    for (body, status) in [
        (none(), 204),
        (r#"{"curves": [{"namespace": 1}]}"#.to_owned(), 400),
        (format!(r#"{{"curves": [], "rest": "{}"}}"#, "x".repeat(MAX_CURVES_BYTES)), 413),
    ] {
        assert_eq!(hand_over(&rig, Some(&writer), body).await, status);
    }
    rig.cluster.jobs.forget_that_they_are_listed();
    assert_eq!(hand_over(&rig, Some(&writer), none()).await, 503);
}

#[tokio::test]
async fn where_no_key_is_asked_for_everything_that_is_served_is_told() {
    let rig = start_with(&[], Setup { open: true, ..tenants() }).await;
    let overview: Value =
        rig.client.get(rig.url.clone() + OVERVIEW).send().await.unwrap().json().await.unwrap();
    assert_eq!((&overview["namespace"], overview["services"].as_array().unwrap().len()), (&json!(null), 3));
    assert_eq!(overview["jobs"].as_array().unwrap().len(), 3);
    let page = rig.client.get(&rig.url).send().await.unwrap().text().await.unwrap();
    assert!(page.contains(r#"data-auth="none""#));
}

#[tokio::test]
async fn an_overview_needs_a_known_key_and_a_place_but_none_of_the_keys_minute() {
    let key = json!({"requestsPerMinute": 1, "tokensPerMinute": 1});
    let rig = start_with(&[], Setup { key, per_key: 1, ..tenants() }).await;
    assert_eq!(rig.client.get(rig.url.clone() + OVERVIEW).send().await.unwrap().status(), 401);
    assert_eq!(told(&rig, 9, OVERVIEW).await.0, 401);
    for _ in 0..5 {
        assert_eq!(told(&rig, 1, OVERVIEW).await.0, 200);
    }
    let place = rig.places.enter(Some(&"k".into())).unwrap();
    let (status, error) = told(&rig, 1, OVERVIEW).await;
    assert_eq!((status, &error["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    assert_eq!(told(&rig, 2, OVERVIEW).await.0, 200);
    drop(place);
    assert_eq!(told(&rig, 1, OVERVIEW).await.0, 200);
    assert!(rig.places.are_free());
}

#[tokio::test]
async fn no_key_looks_as_fast_as_it_can() {
    let rig = start_with(&[], tenants()).await;
    let mut answers = Vec::new();
    for _ in 0..400 {
        answers.push(told(&rig, 1, OVERVIEW).await);
    }
    let (status, error) = answers.iter().find(|(status, _)| *status != 200).unwrap();
    let message = error["error"]["message"].as_str().unwrap();
    assert_eq!((*status, &error["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    assert!(message.contains("this key may use 600 looks a minute"), "{message}");
    assert_eq!(told(&rig, 2, OVERVIEW).await.0, 200, "another key's looks are its own");
}

#[rstest]
#[case("/", "text/html; charset=utf-8")]
#[case("/lathe/app.js", "text/javascript; charset=utf-8")]
#[case("/lathe/style.css", "text/css; charset=utf-8")]
#[case("/favicon.ico", "image/svg+xml")]
#[tokio::test]
async fn a_file_needs_no_key_may_ask_nobody_else_and_is_sent_once(#[case] path: &str, #[case] kind: &str) {
    let rig = start(&[]).await;
    let url = rig.url.clone() + path;
    let answer = rig.client.get(&url).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let headers = answer.headers().clone();
    assert_eq!(
        (&headers["content-type"], &headers["x-content-type-options"]),
        (&kind.parse().unwrap(), &"nosniff".parse().unwrap())
    );
    let policy = headers["content-security-policy"].to_str().unwrap();
    assert!(
        policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe") && !policy.contains("http"),
        "{policy}"
    );
    assert_eq!(headers["referrer-policy"], "no-referrer");
    let length = answer.bytes().await.unwrap().len();

    let head = rig.client.head(&url).send().await.unwrap();
    assert_eq!(
        (head.status(), head.headers()["content-length"].to_str().unwrap()),
        (StatusCode::OK, &*length.to_string())
    );
    let etag = headers["etag"].to_str().unwrap();
    for (tags, status) in
        [(etag.to_owned(), 304), (format!("\"x\", W/{etag}"), 304), ("\"x\"".to_owned(), 200)]
    {
        let again = rig.client.get(&url).header("if-none-match", &tags).send().await.unwrap();
        assert_eq!(
            (again.status().as_u16(), again.headers()["etag"].to_str().unwrap()),
            (status, etag),
            "{tags}"
        );
    }
    let posted = rig.client.post(&url).send().await.unwrap();
    assert_eq!(posted.status(), 405);
}

/// Elsewhere nothing is shown to those who are not let in.
#[tokio::test]
async fn what_is_no_file_asks_for_a_key() {
    let rig = start(&[]).await;
    for path in ["/lathe/", "/lathe/nothing.js", "/index.html", "/lathe/../app.js", "//"] {
        assert_eq!(
            rig.client.get(format!("{}{path}", rig.url)).send().await.unwrap().status(),
            401,
            "{path}"
        );
    }
}
