//! The page at `/`: files of this program alone, the same for everybody, and the small API that they ask with the user's key.
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::error::ApiError;
use crate::http::Gateway;
use crate::keys::{Auth, Caller};
use crate::looks::{self, Looks};
use crate::overview::{self, Losses, Overview};
use crate::places::{Place, Room};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Where each file is, what it is, and its text.
const FILES: [(&str, &str, &str); 11] = [
    ("/", HTML, include_str!("page/index.html")),
    ("/favicon.ico", SVG, ICON),
    ("/lathe/icon.svg", SVG, ICON),
    ("/lathe/style.css", CSS, include_str!("page/style.css")),
    ("/lathe/app.js", SCRIPT, include_str!("page/app.js")),
    ("/lathe/api.js", SCRIPT, include_str!("page/api.js")),
    ("/lathe/curve.js", SCRIPT, include_str!("page/curve.js")),
    ("/lathe/dom.js", SCRIPT, include_str!("page/dom.js")),
    ("/lathe/jobs.js", SCRIPT, include_str!("page/jobs.js")),
    ("/lathe/playground.js", SCRIPT, include_str!("page/playground.js")),
    ("/lathe/services.js", SCRIPT, include_str!("page/services.js")),
];
const ICON: &str = include_str!("page/icon.svg");
/// Stands in the document where keys are asked for.
const WITH_KEYS: &str = r#"data-auth="keys""#;
const WITHOUT_KEYS: &str = r#"data-auth="none""#;

/// What a browser may do with the files: load and ask their own origin, nothing else; no form is sent, so no key gets into a URL.
const HEADERS: [(HeaderName, &str); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
         trusted-types 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    // Kept, and asked for again by its digest each time.
    (header::CACHE_CONTROL, "no-cache"),
];

/// The files, which need no key.
pub fn files(auth: &Auth) -> Router {
    let asked_for = matches!(auth, Auth::Keys(_));
    let not_allowed =
        async |method: Method, uri: Uri| ApiError::method_not_allowed(method.as_str(), uri.path());
    FILES.into_iter().fold(Router::new(), |router, (path, kind, text)| {
        let text = match kind {
            HTML if !asked_for => text.replace(WITH_KEYS, WITHOUT_KEYS).into(),
            _ => Bytes::from_static(text.as_bytes()),
        };
        let file = Arc::new(File::new(kind, text));
        let answer = async move |headers: HeaderMap| file.answer(&headers);
        router.route(path, get(answer).fallback(not_allowed))
    })
}

/// What is asked with a key.
pub fn api() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/lathe/v1/overview", get(overview))
        .route("/lathe/v1/jobs/{namespace}/{name}/losses", get(losses))
        .layer(Extension(Arc::new(Looks::default())))
}

/// One file, as it is sent.
struct File {
    headers: HeaderMap,
    etag: HeaderValue,
    text: Bytes,
}

impl File {
    fn new(kind: &'static str, text: Bytes) -> Self {
        let digest: String =
            Sha256::digest(&text).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        // Hexadecimal digits are a header's value.
        let etag = HeaderValue::try_from(format!("\"{digest}\"")).unwrap_or(HeaderValue::from_static("\"\""));
        let mut headers: HeaderMap =
            HEADERS.into_iter().map(|(name, value)| (name, HeaderValue::from_static(value))).collect();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::ETAG, etag.clone());
        Self { headers, etag, text }
    }

    fn answer(&self, asked: &HeaderMap) -> Response {
        let known = asked.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut tags = known.flat_map(|tags| tags.split(',')).map(|tag| tag.trim().trim_start_matches("W/"));
        if tags.any(|tag| tag == "*" || tag.as_bytes() == self.etag.as_bytes()) {
            return (StatusCode::NOT_MODIFIED, self.headers.clone()).into_response();
        }
        (self.headers.clone(), self.text.clone()).into_response()
    }
}

/// Of now, and of one key.
const NOT_KEPT: [(HeaderName, &str); 1] = [(header::CACHE_CONTROL, "no-store")];
type Told<T> = Result<([(HeaderName, &'static str); 1], Json<T>), ApiError>;

/// A place, and one of the key's looks.
fn enter(gateway: &Gateway, caller: &Caller, looks: &Looks) -> Result<(Place, Room), ApiError> {
    if let Some(key) = caller.shares_as() {
        let early = |wait| ApiError::rate_limited("looks", looks::A_MINUTE, wait);
        looks.look(key, Instant::now()).map_err(early)?;
    }
    gateway.places.enter(caller.shares_as())
}

async fn overview(
    State(gateway): State<Arc<Gateway>>,
    Extension(caller): Extension<Arc<Caller>>,
    Extension(looks): Extension<Arc<Looks>>,
) -> Told<Overview> {
    let _place = enter(&gateway, &caller, &looks)?;
    let table = gateway.table()?;
    Ok((NOT_KEPT, Json(overview::of(&caller, &table, &gateway.cluster))))
}

async fn losses(
    State(gateway): State<Arc<Gateway>>,
    Extension(caller): Extension<Arc<Caller>>,
    Extension(looks): Extension<Arc<Looks>>,
    uri: Uri,
    place: Result<Path<(String, String)>, PathRejection>,
) -> Told<Losses> {
    let _place = enter(&gateway, &caller, &looks)?;
    let found = place
        .ok()
        .and_then(|Path((namespace, name))| overview::losses(&caller, &gateway.cluster, &namespace, &name));
    // One of another namespace and none at all are told the same.
    found.map(|losses| (NOT_KEPT, Json(losses))).ok_or_else(|| ApiError::unknown_url("GET", uri.path()))
}
