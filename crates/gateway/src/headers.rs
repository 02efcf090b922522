//! Headers that speak of one connection alone, and what else does not go through.
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use lathe_contract::{USAGE_HEADER, Usage};

/// Of the connection that they came over (RFC 9110, 7.6.1), beside those that `Connection` names.
const HOPS: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
];
/// Written anew for the worker. `Expect` was answered when the body was read.
const OWN: [HeaderName; 5] =
    [header::HOST, header::CONTENT_LENGTH, header::AUTHORIZATION, header::EXPECT, header::COOKIE];
/// A replica's load and an answer's cost are the gateway's to know.
pub const LOAD: HeaderName = HeaderName::from_static("endpoint-load-metrics");
const USAGE: HeaderName = HeaderName::from_static(USAGE_HEADER);
/// What replicas answer in. A page or a script of theirs would be one of this origin, which all tenants share.
const KINDS: [&str; 2] = ["application/json", "text/event-stream"];

/// A client's headers for a worker, with the gateway's token and its wish for trailers.
pub fn for_worker(client: &HeaderMap, token: HeaderValue) -> HeaderMap {
    let mut headers = without_hops(client.clone());
    for name in OWN {
        headers.remove(name);
    }
    headers.insert(header::AUTHORIZATION, token);
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers
}

/// A worker's headers for the client.
pub fn for_client(worker: HeaderMap) -> HeaderMap {
    let mut headers = without_hops(worker);
    // Cookies would be everybody's: all tenants share this origin.
    for name in [LOAD, USAGE, header::SET_COOKIE] {
        headers.remove(name);
    }
    if !headers.get_all(header::CONTENT_TYPE).iter().all(is_known) {
        headers.remove(header::CONTENT_TYPE);
    }
    headers
}

fn is_known(kind: &HeaderValue) -> bool {
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    KINDS.iter().any(|known| kind.eq_ignore_ascii_case(known))
}

/// What the worker says of the tokens, in a head or in trailers.
pub fn usage(headers: &HeaderMap) -> Option<Usage> {
    Usage::parse(headers.get(USAGE)?.to_str().ok()?)
}

fn without_hops(mut headers: HeaderMap) -> HeaderMap {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderValue> = headers.get_all(header::CONNECTION).iter().cloned().collect();
        for name in named.iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')) {
            headers.remove(name.trim());
        }
    }
    for name in HOPS.into_iter().chain([header::UPGRADE]) {
        headers.remove(name);
    }
    headers
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn what_speaks_of_one_connection_or_of_the_client_stays_here() {
        let client = headers(&[
            ("authorization", "Bearer lathe-secret"),
            ("connection", "keep-alive, X-Hop"),
            ("x-hop", "1"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("cookie", "a=b"),
            ("host", "gateway"),
            ("content-type", "application/json"),
        ]);
        let expected = headers(&[
            ("authorization", "Bearer token"),
            ("te", "trailers"),
            ("content-type", "application/json"),
        ]);
        assert_eq!(for_worker(&client, HeaderValue::from_static("Bearer token")), expected);
    }

    #[rstest]
    #[case("application/json", true)]
    #[case("Application/JSON; charset=utf-8", true)]
    #[case("text/event-stream;charset=utf-8", true)]
    #[case("text/html", false)]
    #[case("application/json, text/html", false)]
    #[case("application/jsonx", false)]
    #[case("", false)]
    fn a_replica_answers_with_no_page_and_no_script(#[case] kind: &'static str, #[case] passes: bool) {
        let worker = headers(&[("content-type", kind)]);
        assert_eq!(for_client(worker.clone()), if passes { worker } else { HeaderMap::new() });
    }

    #[test]
    fn what_a_worker_tells_the_gateway_is_not_told_to_the_client() {
        let worker = headers(&[
            ("lathe-usage", "prompt=1,completion=2"),
            ("endpoint-load-metrics", "TEXT a=1"),
            ("trailer", "lathe-usage"),
            ("set-cookie", "a=b"),
            ("retry-after", "3"),
        ]);
        assert_eq!(for_client(worker.clone()), headers(&[("retry-after", "3")]));
        assert_eq!(usage(&worker), Some(Usage { prompt: 1, completion: 2, cached: 0 }));
    }
}
