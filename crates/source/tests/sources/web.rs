//! `https://` sources (plain http here, as it goes to this machine), and everything about downloads.
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use lathe_source::{
    CancellationToken, Credentials, Fetched, Location, Options, SourceError, Update, fetch, headers,
};
use rstest::rstest;

use crate::model::{Files, complete, model, options, read, safetensors};
use crate::server::{Fault, Inner, Server};

const WEIGHTS: &str = "model.safetensors";
const MIB: usize = 1 << 20;

fn at(server: &Server) -> Location {
    Location::parse(&server.url, None, None).unwrap()
}

async fn get(location: &Location, options: &Options) -> Result<Fetched, SourceError> {
    fetch(location, options, &|_: Update<'_>| {}, &CancellationToken::new()).await
}

#[tokio::test]
async fn a_folder_is_read_whole_once_and_without_what_is_not_on_the_list() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    server.inner.files.lock().unwrap().insert("modeling.py".into(), b"import os".to_vec());
    let options = options(cache.path());
    let first = get(&at(&server), &options).await.unwrap();
    assert_eq!(read(&first.dir), model());
    assert_eq!(first.files.len(), 4);
    let second = get(&at(&server), &options).await.unwrap();
    assert_eq!((second.dir, second.digest), (first.dir, first.digest));
    assert_eq!(server.reads(WEIGHTS), [None]);
}

#[tokio::test]
async fn shards_are_found_by_their_index() {
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let index = format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{}","b":"{}"}}}}"#, names[0], names[1]);
    let mut files = Files::from([("config.json".into(), b"{}".to_vec())]);
    files.insert("model.safetensors.index.json".into(), index.into());
    files.extend(names.map(|name| (name.to_string(), safetensors(10))));
    let (server, cache) = (Server::of(files.clone()).await, tempfile::tempdir().unwrap());
    assert_eq!(read(&get(&at(&server), &options(cache.path())).await.unwrap().dir), files);
}

#[tokio::test]
async fn one_file_by_its_url() {
    let rows = Files::from([("train.jsonl".into(), b"{\"text\":\"a\"}\n".to_vec())]);
    let (server, cache) = (Server::of(rows.clone()).await, tempfile::tempdir().unwrap());
    let location = Location::parse(&format!("{}/train.jsonl?sig=1", server.url), None, None).unwrap();
    let fetched = get(&location, &options(cache.path())).await.unwrap();
    assert_eq!(std::fs::read(fetched.file().unwrap()).unwrap(), rows["train.jsonl"]);
}

/// Each fault once; the bytes must be right and the second read must go on where the first stopped.
#[rstest]
#[case::cut(Fault::Cut(MIB + 7), &[None, Some("bytes=1048583-")])]
#[case::stalled(Fault::Stall(MIB + 7), &[None, Some("bytes=1048583-")])]
#[case::ended_early(Fault::Short(MIB + 7), &[None, Some("bytes=1048583-")])]
#[case::unavailable(Fault::Status(503, "retry-after", "0".into()), &[None, None])]
#[case::too_many(Fault::Status(429, "x-none", "0".into()), &[None, None])]
#[tokio::test]
async fn a_fault_is_survived(#[case] fault: Fault, #[case] reads: &[Option<&str>]) {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    server.fault(WEIGHTS, fault);
    let options = Options { stall_timeout: Duration::from_secs(2), ..options(cache.path()) };
    let fetched = get(&at(&server), &options).await.unwrap();
    assert_eq!(read(&fetched.dir), model());
    let seen = server.reads(WEIGHTS);
    assert_eq!(seen.iter().map(Option::as_deref).collect::<Vec<_>>(), reads);
}

#[rstest]
#[case::ignores_ranges(true, false)]
#[case::has_no_validator(false, true)]
#[tokio::test]
async fn where_resuming_is_not_safe_the_file_is_read_anew(#[case] ignore_range: bool, #[case] no_tag: bool) {
    let inner = Inner { files: Mutex::new(model()), ignore_range, no_tag, ..Inner::default() };
    let (server, cache) = (Server::start(inner).await, tempfile::tempdir().unwrap());
    server.fault(WEIGHTS, Fault::Cut(MIB + 7));
    let fetched = get(&at(&server), &options(cache.path())).await.unwrap();
    assert_eq!(read(&fetched.dir), model());
}

#[tokio::test]
async fn without_validators_nothing_old_is_taken_for_new() {
    let inner = Inner { files: Mutex::new(model()), no_tag: true, ..Inner::default() };
    let (server, cache) = (Server::start(inner).await, tempfile::tempdir().unwrap());
    get(&at(&server), &options(cache.path())).await.unwrap();
    server.inner.files.lock().unwrap().insert("tokenizer.json".into(), b"[]".to_vec());
    let fetched = get(&at(&server), &options(cache.path())).await.unwrap();
    assert_eq!(read(&fetched.dir)["tokenizer.json"], b"[]");
}

/// The model with other weights of the same size.
fn changed() -> Files {
    let mut weights = safetensors(3 * MIB);
    *weights.last_mut().unwrap() ^= 0x55;
    Files::from_iter(model().into_iter().chain([(WEIGHTS.to_string(), weights)]))
}

#[rstest]
#[case::by_tag(false, false)]
#[case::by_date(true, false)]
#[case::server_ignores_if_range(false, true)]
#[case::server_of_dates_ignores_if_range(true, true)]
#[tokio::test]
async fn a_file_that_changes_between_two_ranges_is_never_mixed(
    #[case] dates: bool,
    #[case] ignore_if_range: bool,
) {
    let inner = Inner { files: Mutex::new(model()), dates, ignore_if_range, ..Inner::default() };
    let (server, cache) = (Server::start(inner).await, tempfile::tempdir().unwrap());
    server.fault(WEIGHTS, Fault::CutAndReplace(MIB + 7, changed()[WEIGHTS].clone()));
    let fetched = get(&at(&server), &options(cache.path())).await.unwrap();
    assert!(read(&fetched.dir) == changed(), "old and new bytes in one file");
    assert_eq!(complete(cache.path()), 1);
}

/// Servers that send no validator with a range, or lose it in a proxy, must be told which bytes are wanted.
#[rstest]
#[case::by_tag(false, "\"")]
#[case::by_date(true, "Thu, ")]
#[tokio::test]
async fn a_resumed_read_asks_for_the_same_bytes(#[case] dates: bool, #[case] begins: &str) {
    let inner = Inner { files: Mutex::new(model()), dates, ..Inner::default() };
    let (server, cache) = (Server::start(inner).await, tempfile::tempdir().unwrap());
    server.fault(WEIGHTS, Fault::Cut(MIB + 7));
    get(&at(&server), &options(cache.path())).await.unwrap();
    let resumed = server.seen().into_iter().find(|s| s.range.as_deref() == Some("bytes=1048583-")).unwrap();
    assert!(resumed.if_range.is_some_and(|tag| tag.starts_with(begins)));
}

#[tokio::test]
async fn a_file_that_changed_while_nobody_read_it_is_read_anew() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    server.fault(WEIGHTS, Fault::Stall(2 * MIB));
    let stop = CancellationToken::new();
    let progress = |update: Update<'_>| {
        if update.file == WEIGHTS && update.done > MIB as u64 {
            stop.cancel();
        }
    };
    fetch(&at(&server), &options(cache.path()), &progress, &stop).await.unwrap_err();
    *server.inner.files.lock().unwrap() = changed();
    let fetched = get(&at(&server), &options(cache.path())).await.unwrap();
    assert!(read(&fetched.dir) == changed(), "old and new bytes in one file");
}

#[tokio::test]
async fn tries_end_and_leave_nothing_under_a_final_name() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    for _ in 0..5 {
        server.fault(WEIGHTS, Fault::Status(500, "x-none", "0".into()));
    }
    let error = get(&at(&server), &options(cache.path())).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("Unreachable", true));
    assert_eq!(complete(cache.path()), 0);
}

#[tokio::test]
async fn cancelled_at_once_and_resumed_by_the_next_process() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    server.fault(WEIGHTS, Fault::Stall(2 * MIB));
    let stop = CancellationToken::new();
    let progress = |update: Update<'_>| {
        if update.file == WEIGHTS && update.done > MIB as u64 {
            stop.cancel();
        }
    };
    let error = fetch(&at(&server), &options(cache.path()), &progress, &stop).await.unwrap_err();
    assert_eq!(error.reason(), "Cancelled");
    assert_eq!(complete(cache.path()), 0);
    let fetched = get(&at(&server), &options(cache.path())).await.unwrap();
    assert_eq!(read(&fetched.dir), model());
    let reads = server.reads(WEIGHTS);
    assert!(reads[1].is_some(), "began anew: {reads:?}");
}

#[tokio::test]
async fn two_at_once_read_once() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    let (location, options) = (at(&server), options(cache.path()));
    let task =
        |location: Location, options: Options| tokio::spawn(async move { get(&location, &options).await });
    let (a, b) = (task(location.clone(), options.clone()), task(location, options));
    assert_eq!(a.await.unwrap().unwrap().dir, b.await.unwrap().unwrap().dir);
    assert_eq!(server.reads(WEIGHTS), [None]);
}

#[tokio::test]
async fn what_the_folder_cannot_hold_is_refused_before_a_byte_is_read() {
    let rows = |name: &str| Files::from([(name.to_string(), vec![b'\n'; 1000])]);
    let files = ["a.jsonl", "b.jsonl"].iter().flat_map(|name| rows(name)).collect();
    let (server, cache) = (Server::of(files).await, tempfile::tempdir().unwrap());
    let options = Options { cache_room: Some(2000), ..options(cache.path()) };
    let file = |name: &str| Location::parse(&format!("{}/{name}", server.url), None, None).unwrap();
    let a = get(&file("a.jsonl"), &options).await.unwrap();
    let error = get(&file("b.jsonl"), &options).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("DownloadTooLarge", false), "{error}");
    assert!(error.to_string().contains("needs 1000 bytes"), "{error}");
    assert_eq!(server.reads("b.jsonl"), []);
    // What nobody uses makes room.
    drop(a);
    get(&file("b.jsonl"), &options).await.unwrap();
}

#[tokio::test]
async fn what_has_no_size_is_refused_once_it_is_more_than_the_folder_can_hold() {
    let rows = || async {
        axum::body::Body::from_stream(futures::stream::iter(
            std::iter::repeat_n("x\n", 900).map(Ok::<_, std::io::Error>),
        ))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/a.jsonl", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(rows)).await });
    let (cache, location) = (tempfile::tempdir().unwrap(), Location::parse(&url, None, None).unwrap());
    let options = Options { cache_room: Some(1000), ..options(cache.path()) };
    let error = get(&location, &options).await.unwrap_err();
    assert_eq!(error.reason(), "DownloadTooLarge", "{error}");
    let options = Options { cache_room: Some(2000), ..options };
    assert_eq!(get(&location, &options).await.unwrap().files[0].size, 1800);
}

#[tokio::test]
async fn the_cache_has_a_limit_and_keeps_what_is_in_use() {
    let rows = |name: &str| Files::from([(name.to_string(), vec![b'\n'; 1000])]);
    let files = ["a.jsonl", "b.jsonl", "c.jsonl"].iter().flat_map(|name| rows(name)).collect();
    let (server, cache) = (Server::of(files).await, tempfile::tempdir().unwrap());
    // Room for two with their manifests.
    let options = Options { cache_bytes: 3000, ..options(cache.path()) };
    let file = |name: &str| Location::parse(&format!("{}/{name}", server.url), None, None).unwrap();
    let a = get(&file("a.jsonl"), &options).await.unwrap();
    drop(get(&file("b.jsonl"), &options).await.unwrap());
    let c = get(&file("c.jsonl"), &options).await.unwrap();
    assert_eq!(complete(cache.path()), 2);
    assert!(a.file().unwrap().exists() && c.file().unwrap().exists(), "what is in use was removed");
    // Also where there is no room for both, both are kept; and what was removed is read again.
    let b = get(&file("b.jsonl"), &options).await.unwrap();
    assert_eq!((complete(cache.path()), server.reads("b.jsonl").len()), (3, 2));
    drop((a, b, c));
    drop(get(&file("a.jsonl"), &Options { cache_bytes: 0, ..options.clone() }).await.unwrap());
    assert_eq!(
        (complete(cache.path()), server.reads("a.jsonl").len()),
        (3, 1),
        "what is there is taken as it is"
    );
}

#[tokio::test]
async fn a_pinned_digest_is_held() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    let options = options(cache.path());
    let digest = get(&at(&server), &options).await.unwrap().digest.to_string();
    let pinned = Location::parse(&server.url, None, Some(&digest)).unwrap();
    get(&pinned, &options).await.unwrap();
    server.inner.files.lock().unwrap().insert("tokenizer.json".into(), b"[]".to_vec());
    let error = get(&pinned, &options).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("DigestMismatch", false));
    assert_eq!(complete(cache.path()), 1);
}

#[rstest]
#[case::pickle_in_disguise("model.safetensors", b"PK\x03\x04 a zip of pickles", "PickleRefused")]
#[case::not_weights("model.safetensors", b"<html>log in first</html>", "Malformed")]
#[tokio::test]
async fn content_is_looked_at(#[case] name: &str, #[case] bytes: &[u8], #[case] reason: &str) {
    let files = Files::from([("config.json".into(), b"{}".to_vec()), (name.into(), bytes.to_vec())]);
    let (server, cache) = (Server::of(files).await, tempfile::tempdir().unwrap());
    assert_eq!(get(&at(&server), &options(cache.path())).await.unwrap_err().reason(), reason);
    assert_eq!(complete(cache.path()), 0);
}

#[tokio::test]
async fn limits_hold_before_a_byte_is_read() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    let small = Options { max_bytes: 1000, ..options(cache.path()) };
    assert_eq!(get(&at(&server), &small).await.unwrap_err().reason(), "TooLarge");
    assert!(server.reads(WEIGHTS).is_empty());
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let (server, cache) = (Server::of(Files::new()).await, tempfile::tempdir().unwrap());
    assert_eq!(get(&at(&server), &options(cache.path())).await.unwrap_err().reason(), "NotFound");
    let file = Location::parse(&format!("{}/train.jsonl", server.url), None, None).unwrap();
    assert_eq!(get(&file, &options(cache.path())).await.unwrap_err().reason(), "NotFound");
    let pickle = Location::parse(&format!("{}/pytorch_model.bin", server.url), None, None).unwrap();
    assert_eq!(get(&pickle, &options(cache.path())).await.unwrap_err().reason(), "PickleRefused");
}

#[tokio::test]
async fn a_redirect_gets_no_credentials() {
    let (server, other) = (Server::of(model()).await, Server::of(model()).await);
    let cache = tempfile::tempdir().unwrap();
    server.fault(WEIGHTS, Fault::Status(302, "location", format!("{}/{WEIGHTS}", other.url)));
    let credentials = Credentials::default().with("token", "hunter2");
    let options = Options { credentials, ..options(cache.path()) };
    assert_eq!(read(&get(&at(&server), &options).await.unwrap().dir), model());
    assert!(server.seen().iter().all(|s| s.authorization.as_deref() == Some("Bearer hunter2")));
    let seen = other.seen();
    assert!(!seen.is_empty() && seen.iter().all(|s| s.authorization.is_none()), "{seen:?}");
}

/// The resumed read begins at the configured host again: a signed address may be over by then.
#[tokio::test]
async fn a_connection_cut_behind_a_redirect_is_resumed_and_the_token_stays_at_home() {
    let (server, other) = (Server::of(model()).await, Server::of(model()).await);
    let cache = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        server.fault(WEIGHTS, Fault::Status(302, "location", format!("{}/{WEIGHTS}", other.url)));
    }
    other.fault(WEIGHTS, Fault::Cut(MIB + 7));
    let credentials = Credentials::default().with("token", "hunter2");
    let options = Options { credentials, ..options(cache.path()) };
    assert_eq!(read(&get(&at(&server), &options).await.unwrap().dir), model());
    assert_eq!(other.reads(WEIGHTS), [None, Some("bytes=1048583-".to_string())]);
    assert!(server.seen().iter().all(|s| s.authorization.as_deref() == Some("Bearer hunter2")));
    assert!(other.seen().iter().all(|s| s.authorization.is_none()), "{:?}", other.seen());
}

#[tokio::test]
async fn plain_http_leaves_this_machine_only_where_allowed() {
    let cache = tempfile::tempdir().unwrap();
    let location = Location::parse("http://192.0.2.1/train.jsonl", None, None).unwrap();
    let error = get(&location, &options(cache.path())).await.unwrap_err();
    assert_eq!(error.reason(), "InvalidLocation");
}

#[tokio::test]
async fn headers_leave_the_weights_where_they_are() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    let headers = headers(&at(&server), &options(cache.path()), &CancellationToken::new()).await.unwrap();
    assert_eq!(headers.small["config.json"], model()["config.json"]);
    assert_eq!(headers.license.as_deref(), Some("apache-2.0"));
    assert_eq!(headers.parameters(), 3 << 20);
    assert_eq!(headers.bytes_by_dtype(), BTreeMap::from([("I8".to_string(), 3 << 20)]));
    assert_eq!(server.reads(WEIGHTS), [Some("bytes=0-262143".to_string())]);
}

#[tokio::test]
async fn progress_ends_at_the_whole() {
    let (server, cache) = (Server::of(model()).await, tempfile::tempdir().unwrap());
    server.fault(WEIGHTS, Fault::Cut(MIB + 7));
    let last = Mutex::new((0, None));
    let progress = |u: Update<'_>| *last.lock().unwrap() = (u.done, u.total);
    fetch(&at(&server), &options(cache.path()), &progress, &CancellationToken::new()).await.unwrap();
    let whole = model().values().map(|f| f.len() as u64).sum();
    assert_eq!(*last.lock().unwrap(), (whole, Some(whole)));
}
