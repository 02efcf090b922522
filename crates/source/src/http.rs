//! One HTTP request: redirects followed by hand, credentials kept to their host, answers turned into errors.
use std::time::Duration;

use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Client, Response, StatusCode, Url, redirect};

use crate::error::{SourceError, printable};
use crate::options::Options;

const MAX_REDIRECTS: usize = 10;
/// Longest server text that is read to explain a refusal.
const MAX_ERROR_TEXT: usize = 4096;

/// A client and the rules that every request keeps.
pub(crate) struct Http {
    client: Client,
    stall: Duration,
    allow_http: bool,
}

/// What to send besides the URL.
#[derive(Clone, Default)]
pub(crate) struct Ask {
    /// `Authorization`, for the first URL's origin alone.
    pub auth: Option<HeaderValue>,
    /// First byte, and last byte where bounded.
    pub range: Option<(u64, Option<u64>)>,
    /// Answer with the range only while the file still has this `ETag` or `Last-Modified`.
    pub if_range: Option<String>,
}

/// A successful answer.
pub(crate) struct Answer {
    pub response: Response,
    /// Headers of the answers before the last redirect, from the first URL's origin.
    pub origin: HeaderMap,
}

/// A client for HTTP and S3: no redirects of its own, certificates of the system or `SSL_CERT_FILE`.
pub(crate) fn client(options: &Options, silence: Option<Duration>) -> Result<Client, SourceError> {
    // A second call, or another crate's choice before ours, is no error: both are ring.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = Client::builder()
        .redirect(redirect::Policy::none())
        .connect_timeout(options.connect_timeout)
        .user_agent(concat!("lathe/", env!("CARGO_PKG_VERSION")));
    let builder = silence.into_iter().fold(builder, reqwest::ClientBuilder::read_timeout);
    builder.build().map_err(|e| SourceError::InvalidCredentials {
        path: "SSL_CERT_FILE".into(),
        problem: format!("TLS cannot be set up; are CA certificates installed? {}", chain(&e)),
    })
}

impl Http {
    pub fn new(options: &Options) -> Result<Self, SourceError> {
        Ok(Self {
            client: client(options, None)?,
            stall: options.stall_timeout,
            allow_http: options.allow_http,
        })
    }

    /// Gets `url`. Success is 200 or 206; everything else is an error, with the server's words where it has some.
    pub async fn get(&self, url: &Url, ask: &Ask) -> Result<Answer, SourceError> {
        check_scheme(url, self.allow_http)?;
        let mut at = url.clone();
        let mut origin = HeaderMap::new();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client.get(at.clone()).header(header::ACCEPT_ENCODING, "identity");
            if let Some(auth) = ask.auth.as_ref().filter(|_| at.origin() == url.origin()) {
                request = request.header(header::AUTHORIZATION, auth);
            }
            if let Some((from, to)) = ask.range {
                let to = to.map(|t| t.to_string()).unwrap_or_default();
                request = request.header(header::RANGE, format!("bytes={from}-{to}"));
            }
            if let Some(tag) = &ask.if_range {
                request = request.header(header::IF_RANGE, tag);
            }
            let sent = tokio::time::timeout(self.stall, request.send()).await;
            let response = match sent {
                Err(_) => return Err(SourceError::unreachable(shown(&at), "no answer in time")),
                Ok(Err(e)) => return Err(SourceError::unreachable(shown(&at), chain(&e.without_url()))),
                Ok(Ok(response)) => response,
            };
            if !response.status().is_redirection() {
                return match response.status() {
                    StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(Answer { response, origin }),
                    _ => Err(refusal(response, &at, ask.auth.is_some()).await),
                };
            }
            let next = next_hop(&at, response.headers(), self.allow_http)?;
            if at.origin() == url.origin() {
                origin.extend(response.headers().clone());
            }
            at = next;
        }
        Err(SourceError::Refused { what: shown(url), cause: format!("more than {MAX_REDIRECTS} redirects") })
    }
}

/// Where a redirect leads; never from https to http.
fn next_hop(at: &Url, headers: &HeaderMap, allow_http: bool) -> Result<Url, SourceError> {
    let refused = |cause: &str| SourceError::Refused { what: shown(at), cause: cause.into() };
    let to = headers
        .get(header::LOCATION)
        .and_then(|v| v.to_str().ok())
        .ok_or_else(|| refused("a redirect without `Location`"))?;
    let next = at.join(to).map_err(|_| refused("a redirect to what is no URL"))?;
    if at.scheme() == "https" && next.scheme() != "https" {
        return Err(refused("a redirect from https to another scheme"));
    }
    check_scheme(&next, allow_http)?;
    Ok(next)
}

/// https anywhere; http to this machine, or where the caller allows it.
fn check_scheme(url: &Url, allow_http: bool) -> Result<(), SourceError> {
    let ok = match url.scheme() {
        "https" => true,
        "http" => allow_http || is_loopback(url),
        _ => false,
    };
    if ok {
        return Ok(());
    }
    Err(SourceError::InvalidLocation {
        uri: shown(url),
        problem: "it must be https:// (http:// only to this machine)".into(),
    })
}

/// Whether the URL's host is this machine.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let Some(host) = url.host_str() else { return false };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn refusal(response: Response, url: &Url, with_credentials: bool) -> SourceError {
    let status = response.status();
    let what = shown(url);
    let told = retry_after(response.headers());
    // The hub puts its reason into headers; they are short and say more than a page of HTML.
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(printable);
    let code = header("x-error-code");
    let mut words = header("x-error-message").unwrap_or_default();
    if words.is_empty() && status != StatusCode::RANGE_NOT_SATISFIABLE {
        words = error_text(response).await;
    }
    let cause = printable(&format!("{status} {words}"));
    match status.as_u16() {
        401 | 403 if code.as_deref() == Some("GatedRepo") => SourceError::Gated { repo: what, next: words },
        401 | 403 => SourceError::Unauthorized {
            what,
            next: if with_credentials {
                format!("the server said {cause}: check that the credentials are valid and may read it")
            } else {
                format!("the server said {cause}: it needs credentials; name a Secret in `secretRef`")
            },
        },
        404 | 410 => SourceError::NotFound {
            what,
            next: format!("the server said {cause}: check the address and the revision"),
        },
        412 | 416 => SourceError::Changed { what },
        408 | 425 | 429 | 500..=599 => SourceError::Unreachable { what, cause, retry_after: told },
        _ => SourceError::Refused { what, cause },
    }
}

/// The beginning of an error's body, if it is text and comes soon.
async fn error_text(mut response: Response) -> String {
    let mut text = Vec::new();
    let is_text = response
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| v.starts_with("text/plain") || v.contains("json"));
    while is_text && text.len() < MAX_ERROR_TEXT {
        match tokio::time::timeout(Duration::from_secs(2), response.chunk()).await {
            Ok(Ok(Some(chunk))) => text.extend_from_slice(&chunk),
            _ => break,
        }
    }
    printable(&String::from_utf8_lossy(&text))
}

/// `Retry-After` in seconds (a date is left to our own back-off).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// A URL for messages: its query may hold a signature.
pub(crate) fn shown(url: &Url) -> String {
    let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
    printable(&format!("{}://{}{port}{}", url.scheme(), url.host_str().unwrap_or_default(), url.path()))
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("https://a/x", "https://b/y", Some("https://b/y"))]
    #[case("https://a/x/z", "../y", Some("https://a/y"))]
    #[case("https://a/x", "http://a/y", None)]
    #[case("https://a/x", "http://127.0.0.1/y", None)]
    #[case("http://127.0.0.1/x", "http://localhost:1/y", Some("http://localhost:1/y"))]
    #[case("http://127.0.0.1/x", "http://10.0.0.1/y", None)]
    #[case("http://127.0.0.1/x", "file:///etc/passwd", None)]
    fn redirects(#[case] at: &str, #[case] to: &str, #[case] expected: Option<&str>) {
        let headers = HeaderMap::from_iter([(header::LOCATION, HeaderValue::from_str(to).unwrap())]);
        let next = next_hop(&Url::parse(at).unwrap(), &headers, false).ok();
        assert_eq!(next.as_ref().map(Url::as_str), expected);
    }

    #[rstest]
    #[case("http://[::1]:80/", true)]
    #[case("http://127.9.9.9/", true)]
    #[case("http://localhost.evil.example/", false)]
    #[case("http://127.0.0.1.evil.example/", false)]
    fn loopback(#[case] url: &str, #[case] expected: bool) {
        assert_eq!(is_loopback(&Url::parse(url).unwrap()), expected);
    }
}
