//! Connections: bounded in number, in headers and in patience, closed without cutting an answer.
//!
//! HTTP/1.1 alone. HTTP/2 without TLS would need its own timer for each of a silent beginning, an idle connection and a window that
//! never opens, and nothing that Lathe serves gains by it.
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, Request, StatusCode, header};
use axum::middleware::map_response_with_state;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1::Builder;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::ErrorBody;

const MAX_HEADERS: usize = 64;
const MAX_HEADER_BYTES: usize = 64 << 10;
/// A client that takes nothing of its answer for so long is given up.
const STALL_MILLIS: u32 = 120_000;
/// Connections beyond the bound that are told so at a time; the others are closed without a word.
const TOLD: usize = 64;
/// How long such a one has to take it.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a port takes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at a time; one more is told 503 and closed.
    pub connections: usize,
    /// How long a connection waits for a request's whole head, from its beginning or from the answer before.
    pub idle: Duration,
}

/// Serves until `stop`; then takes no connection more and returns when the last one has been answered.
pub async fn serve(listener: TcpListener, router: Router, bounds: Bounds, stop: CancellationToken) {
    serve_by(listener, TowerToHyperService::new(router), bounds, stop).await;
}

/// As [`serve`], by a service without a router, each of whose layers costs a short request something.
pub async fn serve_by<S>(listener: TcpListener, service: S, bounds: Bounds, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static,
{
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.idle)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES);
    let places = Arc::new(Semaphore::new(bounds.connections));
    let told = Arc::new(Semaphore::new(TOLD));
    let graceful = GracefulShutdown::new();
    while let Some(stream) = next(&listener, &stop).await {
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            if let Ok(turn) = Arc::clone(&told).try_acquire_owned() {
                tokio::spawn(refuse(stream, turn));
            }
            continue;
        };
        let watched = graceful.watch(builder.serve_connection(TokioIo::new(stream), service.clone()));
        tokio::spawn(async move {
            // A client that breaks off, or speaks no HTTP, is no event.
            if let Err(error) = watched.await {
                tracing::trace!(%error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// From when `draining` is cancelled on, each answer is the last one of its connection: who keeps connections asks over another
/// one next time, and nobody sends a request into one that [`serve`] closes a moment later.
pub fn last_answers(router: Router, draining: CancellationToken) -> Router {
    let layer = async |State(draining): State<CancellationToken>, mut answer: Response| {
        last_answer(&draining, &mut answer);
        answer
    };
    router.layer(map_response_with_state(draining, layer))
}

/// What [`last_answers`] does to each of them.
pub fn last_answer(draining: &CancellationToken, answer: &mut Response) {
    if draining.is_cancelled() {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

/// Opens a port. `[::]` means every address that there is, also where the kernel has no IPv6.
///
/// # Errors
/// The port is taken.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    let every = address.is_ipv6() && address.ip().is_unspecified();
    match bound {
        Err(error) if every && error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// The next connection; `None` after `stop`.
async fn next(listener: &TcpListener, stop: &CancellationToken) -> Option<TcpStream> {
    let accept = async {
        loop {
            match listener.accept().await.and_then(|(stream, _)| prepared(stream)) {
                Ok(stream) => return stream,
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    // Without file descriptors accepting fails at once, again and again.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => None,
        stream = accept => Some(stream),
    }
}

fn prepared(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    // Also ends connections whose peer still lives and takes nothing, which keep-alive probes do not.
    #[cfg(target_os = "linux")]
    rustix::net::sockopt::set_tcp_user_timeout(&stream, STALL_MILLIS)?;
    Ok(stream)
}

/// Tells a connection beyond the bound so. What it sends is read for a moment, since closing before would take our words back.
async fn refuse(mut stream: TcpStream, turn: OwnedSemaphorePermit) {
    let error = ErrorBody {
        message: "The server is at its limit of connections. Try again in 1 s.",
        kind: "server_error",
        param: None,
        code: Some("overloaded"),
    };
    let (status, body) = (StatusCode::SERVICE_UNAVAILABLE, error.json().to_string());
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let told = async {
        stream.write_all((head + &body).as_bytes()).await?;
        stream.shutdown().await?;
        let mut sent = [0; 1 << 10];
        while stream.read(&mut sent).await? > 0 {}
        io::Result::Ok(())
    };
    // Whoever does not listen is not told.
    drop(tokio::time::timeout(FAREWELL, told).await);
    drop(turn);
}

#[cfg(test)]
mod tests {
    use axum::routing::get;

    use super::*;

    const IDLE: Duration = Duration::from_secs(75);

    async fn start(connections: usize) -> (SocketAddr, CancellationToken) {
        start_with(|router| router, connections).await
    }

    async fn start_with(
        change: impl FnOnce(Router) -> Router,
        connections: usize,
    ) -> (SocketAddr, CancellationToken) {
        let listener = bind("[::]:0".parse().unwrap()).await.unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port()));
        let router = change(Router::new().route("/", get(async || "hello")));
        let (stop, bounds) = (CancellationToken::new(), Bounds { connections, idle: IDLE });
        tokio::spawn(serve(listener, router, bounds, stop.clone()));
        (address, stop)
    }

    async fn said(stream: &mut TcpStream) -> String {
        let mut text = Vec::new();
        // A reset is an end as well.
        let ended = tokio::time::timeout(10 * IDLE, stream.read_to_end(&mut text)).await;
        assert!(ended.is_ok(), "it stays open");
        String::from_utf8(text).unwrap()
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut text = [0; 1 << 10];
        let mut length = 0;
        while !text[..length].ends_with(b"hello") {
            let more = stream.read(&mut text[length..]).await.unwrap();
            assert!(more > 0);
            length += more;
        }
        String::from_utf8_lossy(&text[..length]).into_owned()
    }

    /// Whatever it begins with: nothing, half a head, or the beginning of HTTP/2's.
    #[tokio::test(start_paused = true)]
    async fn a_connection_that_sends_no_whole_head_is_closed_and_its_place_is_free() {
        let (address, _stop) = start(1).await;
        for sent in ["", "GET / HT", "PRI", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
            let began = tokio::time::Instant::now();
            let mut silent = TcpStream::connect(address).await.unwrap();
            silent.write_all(sent.as_bytes()).await.unwrap();
            let text = said(&mut silent).await;
            assert!(began.elapsed() <= IDLE + Duration::from_secs(1), "{sent}: {text}");
            assert!(!text.contains("200 OK"), "{sent}: {text}");
        }
        let mut good = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut good).await.starts_with("HTTP/1.1 200 OK"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_kept_as_long_as_is_said() {
        let (address, _stop) = start(1).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        ask(&mut stream).await;
        tokio::time::sleep(IDLE - Duration::from_secs(1)).await;
        ask(&mut stream).await;
        let began = tokio::time::Instant::now();
        assert_eq!(said(&mut stream).await, "");
        assert!(began.elapsed() >= IDLE);
    }

    #[tokio::test]
    async fn one_connection_more_than_the_bound_is_told_at_once() {
        let (address, _stop) = start(2).await;
        let mut open =
            [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        for stream in &mut open {
            ask(stream).await;
        }
        let mut third = TcpStream::connect(address).await.unwrap();
        third.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let text = said(&mut third).await;
        assert!(text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{text}");
        assert!(text.contains("retry-after: 1\r\n") && text.contains(r#""code":"overloaded""#), "{text}");
        // Those that have a place keep it.
        ask(&mut open[0]).await;
    }

    #[tokio::test]
    async fn while_it_drains_a_connection_ends_with_its_answer() {
        let draining = CancellationToken::new();
        let (address, _stop) = start_with(|router| last_answers(router, draining.clone()), 2).await;
        let mut open = TcpStream::connect(address).await.unwrap();
        for _ in 0..2 {
            assert!(!ask(&mut open).await.contains("connection:"));
        }
        draining.cancel();
        assert!(ask(&mut open).await.contains("connection: close\r\n"));
        assert_eq!(said(&mut open).await, "");
    }

    #[tokio::test]
    async fn after_the_stop_idle_connections_end() {
        let (address, stop) = start(2).await;
        let mut open = TcpStream::connect(address).await.unwrap();
        ask(&mut open).await;
        stop.cancel();
        assert_eq!(said(&mut open).await, "");
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }
}
