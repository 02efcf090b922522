//! Connections to workers, kept between requests.
//!
//! A connection has no task of its own: whoever asks over it, or reads its answer, moves it on. So a token goes from the worker's
//! socket to the client's in one turn of one task, and dropping an answer closes its connection at once.
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::{HeaderValue, Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use tokio::net::TcpStream;

use crate::tasks::Tasks;

/// Pods answer at once or not at all.
pub const CONNECT: Duration = Duration::from_secs(2);
/// A worker closes a connection that is idle for 15 s; ours goes before, so that no request meets a closing one.
const IDLE: Duration = Duration::from_secs(10);
/// A node that vanished is noticed so late, also by a request that waits long for its answer.
#[cfg(target_os = "linux")]
const GONE: Duration = Duration::from_secs(30);
const PROBE: Duration = Duration::from_secs(10);
const PROBES: u32 = 2;
/// Of an answer, what is read before it is passed on; its head must fit. A thousand streams that are read faster than they can be
/// passed on hold no more.
const READ_AHEAD: usize = 32 << 10;

/// What is sent to a worker.
pub type Sent = Request<Full<Bytes>>;

/// Asks workers over connections that it keeps.
#[derive(Clone, Debug, Default)]
pub struct Upstream(Arc<Mutex<Idle>>);

/// By replica, the one that was used last at the end.
type Idle = HashMap<SocketAddr, Vec<(Box<Link>, Instant)>>;

/// How a replica was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It could not be reached: it never saw the request.
    Refused,
    /// Its connection ended before the head of an answer: it may have died of the request.
    Reset,
}

impl Loss {
    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Loss::Refused => "refused",
            Loss::Reset => "reset",
        }
    }
}

impl Upstream {
    /// The head of the replica's answer, whose body moves its connection on and gives it back.
    ///
    /// # Errors
    /// The replica was lost. A connection that was closed while it idled is none: then the next one is asked, and a new one at last.
    pub async fn ask(&self, replica: SocketAddr, mut request: Sent) -> Result<Response<Answer>, Loss> {
        loop {
            let kept = self.take(replica, Instant::now());
            let is_new = kept.is_none();
            let mut link = match kept {
                Some(link) => link,
                None => Link::connect(replica).await.map_err(|_| Loss::Refused)?,
            };
            let unsent = match link.ask(request).await {
                Ok(answer) => {
                    let keeper = self.clone();
                    return Ok(answer.map(|body| Answer { body, link: Some(link), keeper }));
                }
                Err(unsent) => unsent,
            };
            request = match unsent {
                None => return Err(Loss::Reset),
                Some(_) if is_new => return Err(Loss::Refused),
                Some(request) => *request,
            };
        }
    }

    /// One that is open as far as is known.
    fn take(&self, replica: SocketAddr, now: Instant) -> Option<Box<Link>> {
        let mut idle = self.lock();
        let last = idle.get_mut(&replica)?.pop();
        let is_open = last.as_ref().is_some_and(|(_, since)| is_kept(*since, now));
        // The others idled for longer. Nobody waits for the lock while sockets are closed.
        let gone = if is_open { None } else { idle.remove(&replica) };
        drop(idle);
        drop(gone);
        last.filter(|_| is_open).map(|(link, _)| link)
    }

    fn keep(&self, link: Box<Link>, now: Instant) {
        self.lock().entry(link.replica).or_default().push((link, now));
    }

    /// Closes what has idled for too long.
    fn sweep(&self, now: Instant) {
        let mut gone = Vec::new();
        self.lock().retain(|_, links| {
            gone.extend(links.extract_if(.., |(_, since)| !is_kept(*since, now)));
            !links.is_empty()
        });
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_kept(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) < IDLE
}

/// Closes connections to whoever is asked no more, for as long as the program runs.
pub fn follow(tasks: &mut Tasks, upstream: Upstream) {
    tasks.spawn(async move {
        loop {
            tokio::time::sleep(IDLE / 4).await;
            upstream.sweep(Instant::now());
        }
    });
}

/// A connection.
struct Link {
    replica: SocketAddr,
    host: HeaderValue,
    sender: SendRequest<Full<Bytes>>,
    /// Until its end.
    connection: Option<Connection<TokioIo<TcpStream>, Full<Bytes>>>,
}

impl Link {
    async fn connect(replica: SocketAddr) -> io::Result<Box<Self>> {
        let stream = tokio::time::timeout(CONNECT, TcpStream::connect(replica)).await??;
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, PROBE)?;
        sockopt::set_tcp_keepintvl(&stream, PROBE)?;
        sockopt::set_tcp_keepcnt(&stream, PROBES)?;
        #[cfg(target_os = "linux")]
        sockopt::set_tcp_user_timeout(&stream, GONE.as_millis() as u32)?;
        let mut builder = Builder::new();
        builder.max_buf_size(READ_AHEAD);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let host = HeaderValue::try_from(replica.to_string()).map_err(io::Error::other)?;
        Ok(Box::new(Self { replica, host, sender, connection: Some(connection) }))
    }

    /// The head of the answer. An error bears the request where nothing of it was written.
    async fn ask(&mut self, mut request: Sent) -> Result<Response<Incoming>, Option<Box<Sent>>> {
        request.headers_mut().insert(header::HOST, self.host.clone());
        let mut answer = pin!(self.sender.try_send_request(request));
        std::future::poll_fn(|context| {
            self.moves(context);
            answer.as_mut().poll(context)
        })
        .await
        .map_err(|mut error| error.take_message().map(Box::new))
    }

    /// Writes and reads what can be; how the connection ended is told to whoever asked over it.
    fn moves(&mut self, context: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection
            && Pin::new(connection).poll(context).is_ready()
        {
            self.connection = None;
        }
    }

    /// Whether another request may be sent, now that an answer was read. Who read it is not woken by what comes later.
    fn is_free(&mut self) -> bool {
        self.moves(&mut Context::from_waker(Waker::noop()));
        self.connection.is_some() && self.sender.is_ready()
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Link").field("replica", &self.replica).finish_non_exhaustive()
    }
}

/// The body of a replica's answer.
#[derive(Debug)]
pub struct Answer {
    body: Incoming,
    /// Until the body was read.
    link: Option<Box<Link>>,
    keeper: Upstream,
}

impl Answer {
    /// Keeps the connection for another request, where it can take one.
    fn is_read(&mut self) {
        if let Some(mut link) = self.link.take()
            && link.is_free()
        {
            self.keeper.keep(link, Instant::now());
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    /// Body and connection wake each other, and both are polled here: only the socket wakes whoever reads.
    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let answer = &mut *self;
        let quiet = &mut Context::from_waker(Waker::noop());
        let mut polled = Pin::new(&mut answer.body).poll_frame(quiet);
        for waker in [Waker::noop(), context.waker()] {
            let Some(link) = answer.link.as_mut().filter(|_| polled.is_pending()) else { break };
            link.moves(&mut Context::from_waker(waker));
            polled = Pin::new(&mut answer.body).poll_frame(quiet);
        }
        if matches!(polled, Poll::Ready(None)) {
            answer.is_read();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    /// A body of known length is not always asked for its end.
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.is_read();
        }
    }
}

#[cfg(test)]
mod tests;
