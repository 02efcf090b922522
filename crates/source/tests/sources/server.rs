//! An HTTP file server that breaks in the ways that it is told.
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use futures::{StreamExt, stream};
use sha2::{Digest, Sha256};

use crate::model::Files;

/// What goes wrong with one answer.
#[derive(Clone)]
pub enum Fault {
    /// The connection breaks after so many bytes.
    Cut(usize),
    /// Silence after so many bytes.
    Stall(usize),
    /// The body ends cleanly after so many bytes, its length unannounced.
    Short(usize),
    /// An answer of this status, with a header.
    Status(u16, &'static str, String),
    /// One byte is wrong.
    Flip,
    /// As `Cut`, and then the file is another one.
    CutAndReplace(usize, Vec<u8>),
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    pub if_range: Option<String>,
}

/// A hub in front of the files: everything below `/resolve/`.
#[derive(Clone, Default)]
pub struct HubSide {
    /// Answer of `/api/models/...`.
    pub listing: String,
    pub commit: String,
    pub token: Option<String>,
    pub gated: bool,
    /// Address that large files are redirected to.
    pub store: Option<String>,
}

#[derive(Default)]
pub struct Inner {
    pub files: Mutex<Files>,
    pub faults: Mutex<VecDeque<(String, Fault)>>,
    pub seen: Mutex<Vec<Seen>>,
    pub ignore_range: bool,
    /// Ranges are given of whatever is there now, also where another file was asked for by `If-Range`.
    pub ignore_if_range: bool,
    pub no_tag: bool,
    /// Tells `Last-Modified` instead of `ETag`.
    pub dates: bool,
    pub hub: Option<HubSide>,
}

pub struct Server {
    pub url: String,
    pub inner: Arc<Inner>,
}

impl Server {
    pub async fn start(inner: Inner) -> Self {
        let inner = Arc::new(inner);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(answer).with_state(inner.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, inner }
    }

    pub async fn of(files: Files) -> Self {
        Self::start(Inner { files: Mutex::new(files), ..Inner::default() }).await
    }

    /// The next read of a file whose path ends so goes wrong. Looking for its size does not.
    pub fn fault(&self, path: &str, fault: Fault) {
        self.inner.faults.lock().unwrap().push_back((path.into(), fault));
    }

    /// Ranges of the reads of a file, `None` for a whole one, without the looks for its size.
    pub fn reads(&self, path: &str) -> Vec<Option<String>> {
        let seen = self.inner.seen.lock().unwrap();
        let reads = seen.iter().filter(|s| s.path.ends_with(path) && s.range.as_deref() != Some("bytes=0-0"));
        reads.map(|s| s.range.clone()).collect()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let text = |name| request.headers().get(name).map(|v| v.to_str().unwrap().to_string());
    let path = request.uri().path().to_string();
    let (range, authorization) = (text(header::RANGE), text(header::AUTHORIZATION));
    inner.seen.lock().unwrap().push(Seen {
        path: path.clone(),
        range: range.clone(),
        authorization: authorization.clone(),
        if_range: text(header::IF_RANGE),
    });
    let probe = range.as_deref() == Some("bytes=0-0");
    let fault = if probe { None } else { take(&inner, &path) };
    if let Some(Fault::Status(status, name, value)) = fault {
        return Response::builder()
            .status(status)
            .header(name, value)
            .body(Body::from("told to fail"))
            .unwrap();
    }
    if let Some(hub) = &inner.hub
        && let Some(response) = hub_side(hub, &inner, &path, authorization.as_deref())
    {
        return response;
    }
    let name = path.rsplit("/resolve/").next().unwrap().trim_start_matches('/');
    let name = if inner.hub.is_some() { name.split_once('/').map_or(name, |n| n.1) } else { name };
    let file = inner.files.lock().unwrap().get(name).cloned();
    let Some(mut bytes) = file else {
        return Response::builder().status(404).body(Body::from("not here")).unwrap();
    };
    let tag = if inner.dates { date(&bytes) } else { format!("\"{}\"", hex(&bytes)) };
    let same = inner.ignore_if_range || text(header::IF_RANGE).is_none_or(|t| t == tag);
    let wanted = range.filter(|_| !inner.ignore_range && same);
    match fault {
        Some(Fault::Flip) => bytes[200] ^= 1,
        Some(Fault::CutAndReplace(_, ref new)) => {
            inner.files.lock().unwrap().insert(name.into(), new.clone());
        }
        _ => {}
    }
    let mut headers = HeaderMap::new();
    if !inner.no_tag {
        let name = if inner.dates { header::LAST_MODIFIED } else { header::ETAG };
        headers.insert(name, tag.parse().unwrap());
    }
    let total = bytes.len();
    let (status, bytes) = match wanted.and_then(|r| parse(&r, total)) {
        Some((from, to)) => {
            headers
                .insert(header::CONTENT_RANGE, format!("bytes {from}-{}/{total}", to - 1).parse().unwrap());
            (StatusCode::PARTIAL_CONTENT, bytes[from..to].to_vec())
        }
        None => (StatusCode::OK, bytes),
    };
    let mut response = Response::builder().status(status);
    headers.insert(header::CONTENT_LENGTH, bytes.len().into());
    let body = match fault {
        Some(Fault::Cut(at) | Fault::CutAndReplace(at, _)) => {
            let parts = [Ok(Bytes::from(bytes).slice(..at)), Err(std::io::Error::other("cut"))];
            Body::from_stream(stream::iter(parts))
        }
        Some(Fault::Stall(at)) => {
            let first = stream::iter([Ok::<_, std::io::Error>(Bytes::from(bytes).slice(..at))]);
            Body::from_stream(first.chain(stream::pending()))
        }
        Some(Fault::Short(at)) => {
            headers.remove(header::CONTENT_LENGTH);
            Body::from_stream(stream::iter([Ok::<_, std::io::Error>(Bytes::from(bytes).slice(..at))]))
        }
        _ => Body::from(bytes),
    };
    *response.headers_mut().unwrap() = headers;
    response.body(body).unwrap()
}

/// The next fault for this path.
fn take(inner: &Inner, path: &str) -> Option<Fault> {
    let mut faults = inner.faults.lock().unwrap();
    let at = faults.iter().position(|(suffix, _)| path.ends_with(suffix))?;
    faults.remove(at).map(|f| f.1)
}

/// Token, listing and redirects, as a hub does them.
fn hub_side(hub: &HubSide, inner: &Inner, path: &str, authorization: Option<&str>) -> Option<Response> {
    let told = hub.token.as_ref().map(|t| format!("Bearer {t}"));
    let refuse = |status: u16, code: &str| {
        let response = Response::builder().status(status).header("x-error-code", code);
        response.header("x-error-message", "no").body(Body::empty()).unwrap()
    };
    if hub.gated {
        return Some(refuse(403, "GatedRepo"));
    }
    if told.is_some() && told.as_deref() != authorization {
        return Some(refuse(401, "RepoNotFound"));
    }
    if path.starts_with("/api/") {
        let known =
            ["main", &hub.commit].iter().any(|r| path == format!("/api/models/org/name/revision/{r}"));
        return Some(if known {
            Response::new(Body::from(hub.listing.clone()))
        } else {
            refuse(404, "RevisionNotFound")
        });
    }
    let name = path.strip_prefix(&format!("/org/name/resolve/{}/", hub.commit)).unwrap_or_default();
    let store = hub.store.as_ref().filter(|_| name.ends_with(".safetensors"))?;
    let bytes = inner.files.lock().unwrap().get(name).cloned()?;
    let response = Response::builder().status(302).header(header::LOCATION, format!("{store}/{name}"));
    let response = response.header("x-repo-commit", &hub.commit).header("x-linked-size", bytes.len());
    Some(response.header("x-linked-etag", format!("\"{}\"", hex(&bytes))).body(Body::empty()).unwrap())
}

fn parse(range: &str, total: usize) -> Option<(usize, usize)> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    let from: usize = from.parse().ok()?;
    let to = if to.is_empty() { total } else { (to.parse::<usize>().ok()? + 1).min(total) };
    (from < to).then_some((from, to))
}

/// A day of its own for each content.
fn date(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    format!("Thu, 01 Jan {} 00:{:02}:00 GMT", 1970 + u32::from(hash[0]), hash[1] % 60)
}

pub fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
