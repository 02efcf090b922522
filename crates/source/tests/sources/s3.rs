//! `s3://` against an S3 server that checks signatures, on a folder, behind a proxy that can cut.
use std::sync::{Arc, Mutex};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use lathe_source::{
    CancellationToken, Credentials, Digest, Fetched, Location, Options, SourceError, Update, fetch, headers,
    publish,
};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::model::{Files, complete, model, options, read, safetensors, sendable, write};
use crate::server::{Fault, Server};

struct Bucket {
    /// Objects are files in `<root>/models`.
    root: tempfile::TempDir,
    local: tempfile::TempDir,
    address: String,
    options: Options,
}

async fn bucket() -> Bucket {
    let (root, local) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::create_dir(root.path().join("models")).unwrap();
    let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root.path()).unwrap());
    service.set_auth(SimpleAuth::from_single("key", "hunter2"));
    let service = service.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let service = service.clone();
            tokio::spawn(async move {
                Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await
            });
        }
    });
    let options = Options {
        credentials: credentials(&format!("http://{address}")),
        ..options(&local.path().join("cache"))
    };
    Bucket { root, local, address, options }
}

fn credentials(endpoint: &str) -> Credentials {
    let given =
        Credentials::default().with("AWS_ACCESS_KEY_ID", "key").with("AWS_SECRET_ACCESS_KEY", "hunter2");
    given.with("AWS_REGION", "us-east-1").with("AWS_ENDPOINT_URL", endpoint)
}

impl Bucket {
    async fn get(&self, uri: &str) -> Result<Fetched, SourceError> {
        fetch(
            &Location::parse(uri, None, None)?,
            &self.options,
            &|_: Update<'_>| {},
            &CancellationToken::new(),
        )
        .await
    }

    async fn put(&self, uri: &str) -> Result<Digest, SourceError> {
        let location = Location::parse(uri, None, None)?;
        let (artefact, never) = (self.artefact(), CancellationToken::new());
        sendable(publish(&artefact, &location, &self.options, &|_: Update<'_>| {}, &never)).await
    }

    fn artefact(&self) -> std::path::PathBuf {
        self.local.path().join("artefact")
    }

    fn objects(&self, prefix: &str) -> Files {
        read(&self.root.path().join("models").join(prefix))
    }
}

/// 17 MiB of weights go in two parts.
fn large() -> Files {
    let mut files = model();
    files.insert("model.safetensors".into(), safetensors(17 << 20));
    files.insert("adapters/a/adapter_model.safetensors".into(), safetensors(10));
    files
}

#[tokio::test]
async fn an_artefact_goes_up_and_comes_back() {
    let b = bucket().await;
    write(&b.artefact(), &large());
    let digest = b.put("s3://models/jobs/one").await.unwrap();
    assert_eq!(b.objects("jobs/one"), large());
    let fetched = b.get("s3://models/jobs/one").await.unwrap();
    assert_eq!((fetched.digest, read(&fetched.dir)), (digest, large()));
    let location = Location::parse("s3://models/jobs/one", None, None).unwrap();
    let headers = sendable(headers(&location, &b.options, &CancellationToken::new())).await.unwrap();
    assert_eq!((headers.parameters(), headers.digest), ((17 << 20) + 10, Some(digest)));
    // Again the same: nothing is written. Something else: refused.
    let manifest = b.root.path().join("models/jobs/one").join(lathe_source::MANIFEST);
    let written = std::fs::metadata(&manifest).unwrap().modified().unwrap();
    assert_eq!(b.put("s3://models/jobs/one").await.unwrap(), digest);
    assert_eq!(std::fs::metadata(&manifest).unwrap().modified().unwrap(), written);
    std::fs::write(b.artefact().join("config.json"), "{}").unwrap();
    assert_eq!(b.put("s3://models/jobs/one").await.unwrap_err().reason(), "AlreadyExists");
}

#[tokio::test]
async fn a_broken_upload_is_refused_by_readers_and_replaced_by_the_next() {
    let mut b = bucket().await;
    b.options.parallel = 1;
    write(&b.artefact(), &model());
    let location = Location::parse("s3://models/a", None, None).unwrap();
    let stop = CancellationToken::new();
    let progress = |_: Update<'_>| stop.cancel();
    let error = publish(&b.artefact(), &location, &b.options, &progress, &stop).await.unwrap_err();
    assert_eq!(error.reason(), "Cancelled");
    assert_eq!(b.get("s3://models/a").await.unwrap_err().reason(), "IncompleteUpload");
    write(&b.root.path().join("models/a"), &Files::from([("stale.json".into(), vec![1])]));
    b.put("s3://models/a").await.unwrap();
    assert_eq!(b.objects("a"), model());
    b.get("s3://models/a").await.unwrap();
}

/// Publishes `first`, and `second` to the same prefix as the first is half done.
async fn both(
    b: &Bucket,
    first: &std::path::Path,
    second: &std::path::Path,
) -> [Result<Digest, SourceError>; 2] {
    let location = Location::parse("s3://models/a", None, None).unwrap();
    let (between, never) = (std::sync::Mutex::new(None), CancellationToken::new());
    let progress = |_: Update<'_>| {
        between.lock().unwrap().get_or_insert_with(|| {
            let put = || publish(second, &location, &b.options, &|_: Update<'_>| {}, &never);
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(put()))
        });
    };
    let done = publish(first, &location, &b.options, &progress, &never).await;
    [done, between.lock().unwrap().take().unwrap()]
}

#[tokio::test(flavor = "multi_thread")]
async fn two_writers_of_the_same_are_both_done() {
    let mut b = bucket().await;
    b.options.parallel = 1;
    write(&b.artefact(), &model());
    let [first, second] = both(&b, &b.artefact(), &b.artefact()).await;
    assert_eq!(first.unwrap(), second.unwrap());
    assert_eq!(b.objects("a"), model());
    b.get("s3://models/a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_of_different_things_the_later_one_is_done() {
    let mut b = bucket().await;
    b.options.parallel = 1;
    write(&b.artefact(), &model());
    let other = b.artefact().with_file_name("other");
    let mut files = model();
    files.insert("config.json".into(), b"{}".to_vec());
    write(&other, &files);
    let [first, second] = both(&b, &b.artefact(), &other).await;
    assert_eq!(first.unwrap_err().reason(), "AlreadyExists");
    assert_eq!(b.get("s3://models/a").await.unwrap().digest, second.unwrap());
    assert_eq!(b.objects("a"), files);
}

#[tokio::test]
async fn a_mark_over_a_whole_artefact_of_the_same_digest_hides_nothing() {
    let b = bucket().await;
    write(&b.artefact(), &model());
    let digest = b.put("s3://models/a").await.unwrap();
    let mark = b.root.path().join("models/a/lathe-unfinished");
    std::fs::write(&mark, digest.to_string()).unwrap();
    assert_eq!(b.get("s3://models/a").await.unwrap().digest, digest);
    b.put("s3://models/a").await.unwrap();
    assert!(!mark.exists());
    std::fs::write(&mark, format!("sha256:{}", "0".repeat(64))).unwrap();
    assert_eq!(b.get("s3://models/a").await.unwrap_err().reason(), "IncompleteUpload");
}

#[tokio::test]
async fn a_prefix_that_somebody_else_filled() {
    let b = bucket().await;
    write(&b.root.path().join("models/base"), &model());
    write(
        &b.root.path().join("models"),
        &Files::from([("d/train.jsonl".into(), b"{}\n".to_vec()), ("p/pytorch_model.bin".into(), vec![1])]),
    );
    let fetched = b.get("s3://models/base").await.unwrap();
    assert_eq!(read(&fetched.dir), model());
    assert_eq!(b.get("s3://models/d/train.jsonl").await.unwrap().files.len(), 1);
    assert_eq!(b.get("s3://models/d").await.unwrap().files.len(), 1);
    assert_eq!(b.get("s3://models/p").await.unwrap_err().reason(), "PickleRefused");
    write(&b.artefact(), &model());
    assert_eq!(b.put("s3://models/base").await.unwrap_err().reason(), "AlreadyExists");
}

#[tokio::test]
async fn what_cannot_be_read_is_named() {
    let mut b = bucket().await;
    for uri in ["s3://models/none", "s3://models/none.jsonl", "s3://nobucket/x"] {
        let error = b.get(uri).await.unwrap_err();
        assert_eq!(error.reason(), "NotFound", "{error}");
    }
    write(&b.root.path().join("models/base"), &model());
    b.options.credentials = b.options.credentials.clone().with("AWS_SECRET_ACCESS_KEY", "wrong");
    let error = b.get("s3://models/base").await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("Unauthorized", false), "{error}");
    assert!(!error.to_string().contains("hunter2"));
}

#[tokio::test]
async fn without_credentials_nobody_else_is_asked_for_some() {
    let b = bucket().await;
    let credentials = Credentials::default().with("AWS_ENDPOINT_URL", &format!("http://{}", b.address));
    let options = Options { credentials, ..b.options };
    let location = Location::parse("s3://models/base", None, None).unwrap();
    let error = fetch(&location, &options, &|_: Update<'_>| {}, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.reason(), "Unauthorized");
    assert!(error.to_string().contains("AWS_ACCESS_KEY_ID"), "{error}");
}

/// Parts of an upload that was stopped cost storage until they are aborted.
#[tokio::test]
async fn a_stopped_upload_in_parts_is_aborted() {
    let b = bucket().await;
    write(&b.artefact(), &Files::from([("model.safetensors".into(), safetensors(17 << 20))]));
    let location = Location::parse("s3://models/a", None, None).unwrap();
    let stop = CancellationToken::new();
    let progress = |_: Update<'_>| stop.cancel();
    let error = publish(&b.artefact(), &location, &b.options, &progress, &stop).await.unwrap_err();
    assert_eq!(error.reason(), "Cancelled");
    let left =
        std::fs::read_dir(b.root.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.contains("upload")).collect::<Vec<_>>(), [""; 0]);
}

#[tokio::test]
async fn a_server_that_is_away_is_transient() {
    let b = bucket().await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let options = Options { credentials: credentials(&format!("http://{closed}")), ..b.options };
    let location = Location::parse("s3://models/base", None, None).unwrap();
    let error = fetch(&location, &options, &|_: Update<'_>| {}, &CancellationToken::new()).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("Unreachable", true), "{error}");
}

/// Passes bytes on to `to`; the first connection that carries more than `limit` bytes back, or `forth` bytes there, is
/// cut, and then `cut` is run. Keeps what clients said.
async fn proxy(
    to: String,
    (limit, most_forth): (usize, usize),
    at_cut: impl FnOnce() + Send + 'static,
) -> (String, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let said = Arc::new(Mutex::new(Vec::new()));
    let (heard, at_cut) = (said.clone(), Arc::new(Mutex::new(Some(at_cut))));
    // Whether this connection is the one to break.
    let breaks = move |sent: usize, limit: usize| {
        let cut = (sent > limit).then(|| at_cut.lock().unwrap().take()).flatten();
        cut.map(|cut| cut()).is_some()
    };
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (mut server, heard, breaks) =
                (TcpStream::connect(&to).await.unwrap(), heard.clone(), breaks.clone());
            let mut client = client;
            tokio::spawn(async move {
                let (mut from_client, mut from_server) = ([0; 4096], [0; 4096]);
                let (mut forth, mut back) = (0, 0);
                loop {
                    // Dropping both ends breaks the connection.
                    tokio::select! {
                        n = client.read(&mut from_client) => {
                            let Ok(n @ 1..) = n else { return };
                            heard.lock().unwrap().extend_from_slice(&from_client[..n]);
                            forth += n;
                            if breaks(forth, most_forth) || server.write_all(&from_client[..n]).await.is_err() {
                                return;
                            }
                        }
                        n = server.read(&mut from_server) => {
                            let Ok(n @ 1..) = n else { return };
                            back += n;
                            if breaks(back, limit) || client.write_all(&from_server[..n]).await.is_err() {
                                return;
                            }
                        }
                    }
                }
            });
        }
    });
    (endpoint, said)
}

#[tokio::test]
async fn a_connection_cut_in_the_middle_is_resumed() {
    let mut b = bucket().await;
    write(&b.root.path().join("models/base"), &model());
    let (endpoint, said) = proxy(b.address.clone(), (2 << 20, usize::MAX), || ()).await;
    b.options.credentials = credentials(&endpoint);
    let fetched = b.get("s3://models/base").await.unwrap();
    assert_eq!(read(&fetched.dir), model());
    assert_eq!(complete(&b.options.cache), 1);
    let said = String::from_utf8_lossy(&said.lock().unwrap()).to_ascii_lowercase();
    assert!(said.contains("range: bytes="), "began anew");
}

#[tokio::test]
async fn an_object_that_changes_between_two_ranges_is_never_mixed() {
    let mut b = bucket().await;
    write(&b.root.path().join("models/base"), &model());
    let mut new = safetensors(3 << 20);
    *new.last_mut().unwrap() ^= 0x55;
    let (path, after) = (b.root.path().join("models/base/model.safetensors"), new.clone());
    let replace = move || std::fs::write(path, after).unwrap();
    let (endpoint, said) = proxy(b.address.clone(), (2 << 20, usize::MAX), replace).await;
    b.options.credentials = credentials(&endpoint);
    let fetched = b.get("s3://models/base/model.safetensors").await.unwrap();
    let found = std::fs::read(fetched.file().unwrap()).unwrap();
    assert!(found == new, "old and new bytes in one file");
    let said = String::from_utf8_lossy(&said.lock().unwrap()).to_ascii_lowercase();
    assert!(said.contains("if-match: \""), "the bytes that are meant are not named");
}

#[tokio::test]
async fn an_upload_whose_connection_breaks_is_tried_again() {
    let mut b = bucket().await;
    write(&b.artefact(), &large());
    let (endpoint, _) = proxy(b.address.clone(), (usize::MAX, 5 << 20), || ()).await;
    b.options.credentials = credentials(&endpoint);
    let digest = b.put("s3://models/jobs/one").await.unwrap();
    assert_eq!(b.objects("jobs/one"), large());
    assert_eq!(b.get("s3://models/jobs/one").await.unwrap().digest, digest);
}

/// A signed request would be worth something to whoever gets it.
#[tokio::test]
async fn a_redirect_to_another_host_is_not_followed() {
    let (server, other) = (Server::of(Files::new()).await, Server::of(model()).await);
    for _ in 0..20 {
        server.fault("", Fault::Status(307, "location", format!("{}/models/base", other.url)));
    }
    let b = bucket().await;
    let options = Options { credentials: credentials(&server.url), ..b.options };
    let location = Location::parse("s3://models/base", None, None).unwrap();
    let error = fetch(&location, &options, &|_: Update<'_>| {}, &CancellationToken::new()).await.unwrap_err();
    assert!(!server.seen().is_empty(), "{error}");
    assert!(other.seen().is_empty(), "{error}: {:?}", other.seen());
}
