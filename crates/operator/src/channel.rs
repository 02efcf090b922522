//! The control channel: a worker's report, the adapters that it should hold, and what flows through a gateway.
//!
//! A worker is spoken to by its pod's IP, over plain HTTP, with a token made for this one object and call. It may be
//! anything: its answer is bounded in time and size and read by the contract's own parser; redirects and proxies of the
//! environment are never followed.
use std::{net::IpAddr, time::Duration};

use lathe_contract::{
    AdapterStatus, CONTROL_PORT, CURVES_PATH, DesiredAdapters, JobCurves, MAX_REPORT_BYTES,
    MAX_TRAFFIC_BYTES, Report, Scope, Signer, TRAFFIC_AUDIENCE, TRAFFIC_PATH, Traffic, TrafficQuery,
};
use reqwest::{Client, Method, RequestBuilder, Url, redirect};

/// The client, with the operator's key.
pub struct Channel {
    client: Client,
    signer: Signer,
    port: u16,
}

/// Why a worker did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The client cannot be made.
    #[error("the HTTP client cannot be set up: {0}")]
    Setup(reqwest::Error),
    /// The pod's IP is none: never a name, which could lead elsewhere.
    #[error("the pod's address must be an IP (found {0:?})")]
    Address(String),
    /// No answer.
    #[error("no answer from {0}: {1}")]
    Network(IpAddr, reqwest::Error),
    /// An answer that refuses.
    #[error("{0} answered {1}")]
    Refused(IpAddr, u16),
    /// More bytes than it may send.
    #[error("{0} sent more than {1} bytes")]
    TooLong(IpAddr, usize),
    /// Not what was agreed.
    #[error("{0} sent something else than the contract says: {1}")]
    Malformed(IpAddr, String),
}

impl Channel {
    /// A channel that signs with `signer`.
    ///
    /// # Errors
    /// [`ChannelError::Setup`]
    pub fn new(signer: Signer) -> Result<Self, ChannelError> {
        Self::on_port(signer, CONTROL_PORT)
    }

    /// As [`Channel::new`], on another port than the contract's.
    pub fn on_port(signer: Signer, port: u16) -> Result<Self, ChannelError> {
        // A second call is no error: both are ring.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .redirect(redirect::Policy::none())
            .no_proxy()
            .connect_timeout(Duration::from_secs(2))
            .timeout(Duration::from_secs(5))
            .pool_idle_timeout(Duration::from_secs(30))
            .build()
            .map_err(ChannelError::Setup)?;
        Ok(Self { client, signer, port })
    }

    /// What the worker of object `uid` says of its work.
    ///
    /// # Errors
    /// [`ChannelError`]; a worker that is starting or gone is no reason to fail a reconcile.
    pub async fn report(&self, ip: &str, uid: &str) -> Result<Report, ChannelError> {
        let ip = address(ip)?;
        let call =
            Call { method: Method::GET, path: "/v1/report", query: &[], audience: uid, scope: Scope::Report };
        let bytes = self.call(ip, call, |request| request, MAX_REPORT_BYTES).await?;
        Report::parse(&bytes).map_err(|e| ChannelError::Malformed(ip, e.to_string()))
    }

    /// Sets the whole set of adapters that a serving worker should hold, and reads where each stands.
    ///
    /// # Errors
    /// As [`Channel::report`].
    pub async fn put_adapters(
        &self,
        ip: &str,
        uid: &str,
        wanted: &DesiredAdapters,
    ) -> Result<AdapterStatus, ChannelError> {
        let ip = address(ip)?;
        let body = serde_json::to_vec(wanted).map_err(|e| ChannelError::Malformed(ip, e.to_string()))?;
        let (path, scope) = ("/v1/adapters", Scope::Adapters);
        let call = Call { method: Method::PUT, path, query: &[], audience: uid, scope };
        let with = |request: RequestBuilder| request.header("content-type", "application/json").body(body);
        let bytes = self.call(ip, call, with, MAX_REPORT_BYTES).await?;
        // Within a report, so that the same bounds hold.
        let report = [br#"{"adapters":"#.as_slice(), &bytes, b"}"].concat();
        let report = Report::parse(&report).map_err(|e| ChannelError::Malformed(ip, e.to_string()))?;
        Ok(report.adapters)
    }

    /// What flowed through a gateway since `known`; it answers once there is something new.
    ///
    /// # Errors
    /// [`ChannelError`]
    pub async fn traffic(&self, ip: &str, known: &TrafficQuery) -> Result<Traffic, ChannelError> {
        let ip = address(ip)?;
        let (method, path, audience) = (Method::GET, TRAFFIC_PATH, TRAFFIC_AUDIENCE);
        let query = [("instance", known.instance.clone()), ("after", known.after.to_string())];
        let call = Call { method, path, query: &query, audience, scope: Scope::Report };
        let bytes = self.call(ip, call, |request| request, MAX_TRAFFIC_BYTES).await?;
        Traffic::parse(&bytes).map_err(|e| ChannelError::Malformed(ip, e.to_string()))
    }

    /// Hands loss curves to a gateway.
    ///
    /// # Errors
    /// As [`Channel::report`].
    pub async fn put_curves(&self, ip: &str, curves: &JobCurves) -> Result<(), ChannelError> {
        let ip = address(ip)?;
        let body = serde_json::to_vec(curves).map_err(|e| ChannelError::Malformed(ip, e.to_string()))?;
        let (method, path, audience) = (Method::PUT, CURVES_PATH, TRAFFIC_AUDIENCE);
        let call = Call { method, path, query: &[], audience, scope: Scope::Curves };
        let with = |request: RequestBuilder| request.header("content-type", "application/json").body(body);
        self.call(ip, call, with, MAX_REPORT_BYTES).await.map(drop)
    }

    /// The answer, of at most `limit` bytes.
    async fn call(
        &self,
        ip: IpAddr,
        Call { method, path, query, audience, scope }: Call<'_>,
        with: impl FnOnce(RequestBuilder) -> RequestBuilder,
        limit: usize,
    ) -> Result<Vec<u8>, ChannelError> {
        let token = self.signer.sign(audience, scope, jiff::Timestamp::now().as_second());
        let host = std::net::SocketAddr::new(ip, self.port);
        let mut url = Url::parse(&format!("http://{host}{path}"))
            .map_err(|error| ChannelError::Malformed(ip, error.to_string()))?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let request = with(self.client.request(method, url).bearer_auth(token));
        let failed = |error: reqwest::Error| ChannelError::Network(ip, error.without_url());
        let mut answer = request.send().await.map_err(failed)?;
        if !answer.status().is_success() {
            return Err(ChannelError::Refused(ip, answer.status().as_u16()));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(failed)? {
            if bytes.len() + chunk.len() > limit {
                return Err(ChannelError::TooLong(ip, limit));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

/// What is asked, and what its token says.
struct Call<'a> {
    method: Method,
    path: &'a str,
    query: &'a [(&'a str, String)],
    audience: &'a str,
    scope: Scope,
}

/// An address that a pod can have: never loopback or link-local, where the operator's own neighbours listen.
fn address(ip: &str) -> Result<IpAddr, ChannelError> {
    let wrong = || ChannelError::Address(ip.chars().take(64).collect());
    let parsed: IpAddr = ip.parse().map_err(|_| wrong())?;
    let refused = parsed.is_unspecified()
        || parsed.is_multicast()
        || match parsed {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || (v4.is_loopback() && !cfg!(test)),
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_loopback() || v6.to_ipv4_mapped().is_some(),
        };
    if refused { Err(wrong()) } else { Ok(parsed) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::{
        Router,
        body::Bytes,
        http::{HeaderMap, StatusCode, header},
        response::{IntoResponse, Redirect},
        routing::{get, put},
    };
    use lathe_contract::{AdapterState, Verifier};
    use rstest::rstest;

    use super::*;

    async fn channel(router: Router) -> Channel {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Channel::on_port(Signer::from_seed(&[7; 32]), port).unwrap()
    }

    fn verifier() -> Arc<Verifier> {
        Arc::new(Verifier::from_pem(&Signer::from_seed(&[7; 32]).public_pem().unwrap()).unwrap())
    }

    fn token(headers: &HeaderMap) -> String {
        headers[header::AUTHORIZATION].to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned()
    }

    #[tokio::test]
    async fn each_call_carries_a_token_for_it_and_the_answer_is_read() {
        let verify = verifier();
        let report = move |headers: HeaderMap| async move {
            let now = jiff::Timestamp::now().as_second();
            match verify.verify(&token(&headers), "uid-1", Scope::Report, now) {
                Ok(()) => r#"{"phase":"Serving","message":"a\nb"}"#.into_response(),
                Err(_) => StatusCode::FORBIDDEN.into_response(),
            }
        };
        let verify = verifier();
        let adapters = move |headers: HeaderMap, body: Bytes| async move {
            let now = jiff::Timestamp::now().as_second();
            verify.verify(&token(&headers), "uid-1", Scope::Adapters, now).unwrap();
            assert_eq!(&body[..], br#"{"adapters":[]}"#);
            r#"{"adapters":[{"modelId":"a","state":"Loading"}]}"#
        };
        let router = Router::new().route("/v1/report", get(report)).route("/v1/adapters", put(adapters));
        let channel = channel(router).await;
        let found = channel.report("127.0.0.1", "uid-1").await.unwrap();
        assert_eq!(found.message, "a b");
        assert!(matches!(channel.report("127.0.0.1", "uid-2").await, Err(ChannelError::Refused(_, 403))));
        let wanted = DesiredAdapters { adapters: Vec::new() };
        let status = channel.put_adapters("127.0.0.1", "uid-1", &wanted).await.unwrap();
        assert_eq!(status.adapters[0].state, AdapterState::Loading);
    }

    #[tokio::test]
    async fn an_answer_that_is_too_long_or_leads_elsewhere_is_not_followed() {
        let long = channel(Router::new().route("/v1/report", get(|| async { "x".repeat(1 << 20) }))).await;
        assert!(matches!(long.report("127.0.0.1", "u").await, Err(ChannelError::TooLong(..))));
        let elsewhere = get(|| async { Redirect::temporary("http://127.0.0.1:1/secret") });
        let away = channel(Router::new().route("/v1/report", elsewhere)).await;
        assert!(matches!(away.report("127.0.0.1", "u").await, Err(ChannelError::Refused(_, 307))));
    }

    #[rstest]
    #[case("worker.svc")]
    #[case("169.254.169.254")]
    #[case("::1")]
    #[case("0.0.0.0")]
    #[case("::ffff:10.0.0.1")]
    #[case("10.0.0.1:80")]
    #[case("10.0.0.1/..")]
    #[case("")]
    fn only_an_ip_is_an_address(#[case] ip: &str) {
        assert!(matches!(address(ip), Err(ChannelError::Address(_))));
    }
}
