//! `hf://` against a server that speaks the hub's protocol, its large files on another host.
use std::sync::Mutex;

use lathe_source::{
    CancellationToken, Credentials, Fetched, Location, Options, SourceError, Update, fetch, headers,
};
use rstest::rstest;

use crate::model::{Files, complete, model, options, read};
use crate::server::{Fault, HubSide, Inner, Server, hex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";

struct Hub {
    hub: Server,
    store: Server,
    cache: tempfile::TempDir,
}

/// A hub with `files`; `sizes` tells them in the listing, as `blobs=true` asks for.
async fn hub(files: Files, sizes: bool, change: impl FnOnce(&mut HubSide)) -> Hub {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| match (sizes, name == WEIGHTS) {
        (true, true) => format!(
            r#"{{"rfilename":"{name}","size":{0},"lfs":{{"sha256":"{1}","size":{0}}}}}"#,
            bytes.len(),
            hex(bytes)
        ),
        (true, false) => format!(r#"{{"rfilename":"{name}","size":{}}}"#, bytes.len()),
        _ => format!(r#"{{"rfilename":"{name}"}}"#),
    };
    let siblings: Vec<String> = files.iter().map(sibling).collect();
    let store = Server::of(files.clone()).await;
    let mut side = HubSide {
        listing: format!(r#"{{"sha":"{COMMIT}","siblings":[{}]}}"#, siblings.join(",")),
        commit: COMMIT.into(),
        store: Some(store.url.clone()),
        ..HubSide::default()
    };
    change(&mut side);
    let inner = Inner { files: Mutex::new(files), hub: Some(side), ..Inner::default() };
    Hub { hub: Server::start(inner).await, store, cache: tempfile::tempdir().unwrap() }
}

impl Hub {
    fn options(&self, token: Option<&str>) -> Options {
        let mut credentials = Credentials::default().with("HF_ENDPOINT", &self.hub.url);
        if let Some(token) = token {
            credentials = credentials.with("HF_TOKEN", token);
        }
        Options { credentials, ..options(self.cache.path()) }
    }

    async fn get(&self, uri: &str, token: Option<&str>) -> Result<Fetched, SourceError> {
        let location = Location::parse(uri, None, None)?;
        fetch(&location, &self.options(token), &|_: Update<'_>| {}, &CancellationToken::new()).await
    }
}

#[rstest]
#[case::sizes_listed(true)]
#[case::sizes_in_headers(false)]
#[tokio::test]
async fn a_repository_at_its_commit_and_no_token_to_the_other_host(#[case] sizes: bool) {
    let h = hub(model(), sizes, |side| side.token = Some("hunter2".into())).await;
    let fetched = h.get("hf://org/name", Some("hunter2")).await.unwrap();
    assert_eq!(read(&fetched.dir), model());
    assert_eq!(fetched.revision.as_deref(), Some(COMMIT));
    let files = h.hub.seen().into_iter().filter(|s| s.path.contains("/resolve/"));
    assert!(files.map(|s| s.path).all(|path| path.contains(COMMIT)), "not pinned");
    let seen = h.store.seen();
    assert!(!seen.is_empty() && seen.iter().all(|s| s.authorization.is_none()), "{seen:?}");
    let again = h.get(&format!("hf://org/name@{COMMIT}"), Some("hunter2")).await.unwrap();
    assert_eq!(again.dir, fetched.dir);
}

#[tokio::test]
async fn a_cut_on_the_other_host_is_resumed_there() {
    let h = hub(model(), true, |side| side.token = Some("hunter2".into())).await;
    h.store.fault(WEIGHTS, Fault::Cut(1_500_000));
    assert_eq!(read(&h.get("hf://org/name", Some("hunter2")).await.unwrap().dir), model());
    assert_eq!(h.store.reads(WEIGHTS), [None, Some("bytes=1500000-".to_string())]);
    assert!(h.store.seen().iter().all(|s| s.authorization.is_none()), "{:?}", h.store.seen());
}

#[tokio::test]
async fn a_wrong_byte_is_found() {
    let h = hub(model(), true, |_| {}).await;
    h.store.fault(WEIGHTS, Fault::Flip);
    let error = h.get("hf://org/name", None).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("ChecksumMismatch", true));
    assert_eq!(complete(h.cache.path()), 0);
    assert_eq!(read(&h.get("hf://org/name", None).await.unwrap().dir), model());
}

#[tokio::test]
async fn one_file_of_a_repository() {
    let h = hub(model(), true, |_| {}).await;
    let fetched = h.get("hf://org/name/config.json", None).await.unwrap();
    assert_eq!(fetched.files.len(), 1);
    assert_eq!(h.get("hf://org/name/none.jsonl", None).await.unwrap_err().reason(), "NotFound");
}

#[rstest]
#[case::gated(None, true, "GatedRepository", "accept its terms")]
#[case::gated_with_token(Some("hunter2"), true, "GatedRepository", "account that the token belongs to")]
#[case::no_token(None, false, "Unauthorized", "name a Secret in `secretRef`")]
#[case::wrong_token(Some("wrong"), false, "Unauthorized", "the token is invalid")]
#[tokio::test]
async fn a_refusal_names_the_next_step(
    #[case] token: Option<&str>,
    #[case] gated: bool,
    #[case] reason: &str,
    #[case] next: &str,
) {
    let h = hub(model(), true, |side| (side.token, side.gated) = (Some("hunter2".into()), gated)).await;
    let error = h.get("hf://org/name", token).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), (reason, false));
    assert!(error.to_string().contains(next), "{error}");
    assert!(!error.to_string().contains("hunter2"));
}

#[tokio::test]
async fn an_unknown_revision_is_not_found() {
    let h = hub(model(), true, |_| {}).await;
    let error = h.get("hf://org/name@v9", None).await.unwrap_err();
    assert_eq!(error.reason(), "NotFound");
    assert!(error.to_string().contains("v9"), "{error}");
}

#[rstest]
#[case::only_pickles(r#"[{"rfilename":"config.json"},{"rfilename":"pytorch_model.bin"}]"#, "PickleRefused")]
#[case::nothing(r#"[{"rfilename":"a.gguf"}]"#, "NothingToFetch")]
#[case::too_large(r#"[{"rfilename":"config.json","size":999999999999}]"#, "TooLarge")]
#[case::huge(r#"[{"rfilename":"model.safetensors","size":18446744073709551615}]"#, "TooLarge")]
#[case::twice(r#"[{"rfilename":"config.json","size":2},{"rfilename":"config.json","size":2}]"#, "Malformed")]
#[case::odd_name(r#"[{"rfilename":"a\\b.safetensors","size":2}]"#, "UnsafeName")]
#[case::no_json("[", "Malformed")]
#[tokio::test]
async fn a_listing_is_not_believed(#[case] siblings: &str, #[case] reason: &str) {
    let listing = format!(r#"{{"sha":"{COMMIT}","siblings":{siblings}}}"#);
    let h = hub(model(), true, |side| side.listing = listing).await;
    assert_eq!(h.get("hf://org/name", None).await.unwrap_err().reason(), reason);
    assert_eq!(complete(h.cache.path()), 0);
}

#[tokio::test]
async fn a_commit_that_is_no_commit_is_refused() {
    let h = hub(model(), true, |side| side.listing = r#"{"sha":"../../x","siblings":[]}"#.into()).await;
    assert_eq!(h.get("hf://org/name", None).await.unwrap_err().reason(), "Malformed");
}

/// The listing tells the sha256 of the weights, so headers alone give the digest that the whole will have.
#[tokio::test]
async fn headers_know_the_digest() {
    let h = hub(model(), true, |_| {}).await;
    let location = Location::parse("hf://org/name", None, None).unwrap();
    let headers = headers(&location, &h.options(None), &CancellationToken::new()).await.unwrap();
    assert_eq!(h.store.reads(WEIGHTS), [Some("bytes=0-262143".to_string())]);
    assert_eq!(headers.parameters(), 3 << 20);
    assert_eq!(headers.digest, Some(h.get("hf://org/name", None).await.unwrap().digest));
}
