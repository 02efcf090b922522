//! The control port: probes, metrics, and the report for those who hold a token.
//!
//! `serve` adds its own routes by [`router`]'s second argument; they check tokens by [`Control::check`].
mod access;
mod metrics;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use lathe_contract::Scope;
use lathe_http::Bounds;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

pub use access::{Access, Refusal};

use crate::failure::{Done, Halt};
use crate::status::Status;

/// Of each port. The gateway closes its idle connections before these do, so that no request meets a closing one.
pub const BOUNDS: Bounds = Bounds { connections: 4096, idle: Duration::from_secs(15) };

/// What the control port's handlers share.
pub struct Control {
    access: Access,
    status: Status,
    ready: AtomicBool,
    registry: Registry,
}

impl Control {
    /// Control of a process that is not ready yet. `registry` holds what a task measures beside the report.
    pub fn new(access: Access, status: Status, mut registry: Registry) -> Self {
        metrics::register(&mut registry, status.clone());
        Self { access, status, ready: AtomicBool::new(false), registry }
    }

    /// What `/readyz` says from now on.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Lets a request through that carries a token for `scope`.
    ///
    /// # Errors
    /// The answer to give: 401 without a good token, 403 for a token made for something else.
    pub fn check(&self, headers: &HeaderMap, scope: Scope) -> Result<(), Refusal> {
        self.access.check(headers, scope, jiff::Timestamp::now().as_second())
    }
}

/// The control port's routes: `/healthz`, `/readyz`, `/metrics` and `/v1/report`, and those that a task adds.
pub fn router(control: Arc<Control>, extra: Router) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/report", get(report))
        .with_state(control)
        .merge(extra)
}

/// Opens the control port: at `address` where one is given, else at `port` as [`bind`] does.
///
/// # Errors
/// The port is taken, or everyone could ask and nobody could be told apart.
pub async fn listen(access: &Access, address: Option<SocketAddr>, port: u16) -> Done<TcpListener> {
    let (what, bound) = match address {
        Some(address) if access.is_open() && !address.ip().is_loopback() => {
            let cause = format!("{address}: without keys the control port is for this machine alone");
            return Err(Halt::user("InvalidSettings", cause, "use 127.0.0.1"));
        }
        Some(address) => (address.to_string(), TcpListener::bind(address).await),
        None => (port.to_string(), bind(access, port).await),
    };
    bound.map_err(|error| Halt::transient("PortTaken", format!("port {what}: {error}"), "free the port"))
}

/// Opens a port: for everyone where tokens are asked for, else for this machine alone.
///
/// # Errors
/// The port is taken.
pub async fn bind(access: &Access, port: u16) -> std::io::Result<TcpListener> {
    if access.is_open() {
        return TcpListener::bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)).await;
    }
    lathe_http::bind(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)).await
}

async fn readyz(State(control): State<Arc<Control>>) -> Response {
    if control.ready.load(Ordering::Acquire) {
        return "ok\n".into_response();
    }
    let report = control.status.read();
    (StatusCode::SERVICE_UNAVAILABLE, format!("{:?}: {}\n", report.phase, report.message)).into_response()
}

async fn report(State(control): State<Arc<Control>>, headers: HeaderMap) -> Result<Response, Refusal> {
    control.check(&headers, Scope::Report)?;
    Ok(Json(control.status.read()).into_response())
}

/// All numbers in OpenMetrics' text; `serve` gives them on its own port too.
pub async fn metrics(State(control): State<Arc<Control>>) -> Response {
    lathe_http::openmetrics(&control.registry)
}

#[cfg(test)]
mod tests {
    use lathe_contract::{ObjectRef, Phase, Signer, Trust};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    struct Server {
        address: SocketAddr,
        control: Arc<Control>,
        status: Status,
    }

    async fn start(trust: &Trust) -> Server {
        let object = ObjectRef {
            kind: "FineTuneJob".into(),
            namespace: "n".into(),
            name: "j".into(),
            uid: "uid-1".into(),
        };
        let access = Access::new(&object, trust).unwrap();
        let listener = bind(&access, 0).await.unwrap();
        let status = Status::default();
        let control = Arc::new(Control::new(access, status.clone(), Registry::default()));
        let address = listener.local_addr().unwrap();
        let router = router(control.clone(), Router::new());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Server { address, control, status }
    }

    async fn get(server: &Server, path: &str, token: Option<String>) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", server.address.port())).await.unwrap();
        let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n{token}\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn the_report_needs_a_token_of_this_object() {
        let signer = Signer::from_seed(&[7; 32]);
        let trust = Trust { operator_key: Some(signer.public_pem().unwrap()), gateway_key: None };
        let server = start(&trust).await;
        server.status.phase(Phase::Training, "step 3");
        let now = jiff::Timestamp::now().as_second();
        let ask = |uid: &str, scope| Some(signer.sign(uid, scope, now));
        let (code, body) = get(&server, "/v1/report", ask("uid-1", Scope::Report)).await;
        assert_eq!(code, 200);
        let report = lathe_contract::Report::parse(body.as_bytes()).unwrap();
        assert_eq!((report.phase, report.message.as_str()), (Phase::Training, "step 3"));
        assert_eq!(get(&server, "/v1/report", None).await.0, 401);
        assert_eq!(get(&server, "/v1/report", ask("uid-2", Scope::Report)).await.0, 403);
        assert_eq!(get(&server, "/v1/report", ask("uid-1", Scope::Inference)).await.0, 403);
        let stranger = Signer::from_seed(&[8; 32]).sign("uid-1", Scope::Report, now);
        assert_eq!(get(&server, "/v1/report", Some(stranger)).await.0, 401);
    }

    #[tokio::test]
    async fn without_keys_only_this_machine_may_ask() {
        let server = start(&Trust::default()).await;
        assert!(server.address.ip().is_loopback());
        assert_eq!(get(&server, "/v1/report", None).await.0, 200);
    }

    #[tokio::test]
    async fn probes_and_metrics() {
        let server = start(&Trust::default()).await;
        server.status.update(|report| {
            report.progress =
                Some(lathe_contract::TrainProgress { step: 7, loss: 1.5, ..Default::default() });
        });
        assert_eq!(get(&server, "/healthz", None).await.0, 200);
        assert_eq!(get(&server, "/readyz", None).await.0, 503);
        server.control.set_ready(true);
        assert_eq!(get(&server, "/readyz", None).await.0, 200);
        let (_, text) = get(&server, "/metrics", None).await;
        assert!(text.contains("lathe_train_step 7"), "{text}");
        assert!(text.contains("lathe_train_loss 1.5"), "{text}");
    }
}
