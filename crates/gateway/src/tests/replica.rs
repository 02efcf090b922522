//! A replica that does what a test says, on a real socket.
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use http::HeaderMap;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// The port of all replicas, which nobody else has at the address of none.
pub fn port() -> u16 {
    static PORT: OnceLock<u16> = OnceLock::new();
    *PORT.get_or_init(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port())
}

/// What a replica does with a request, once it has read it.
#[derive(Clone, Debug)]
pub enum Act {
    /// Sends these bytes, and keeps the connection.
    Says(String),
    /// Sends these bytes, and closes the connection.
    SaysAndCloses(String),
    /// Sends these bytes, and then nothing.
    SaysAndStalls(String),
    /// Sends what this makes of the request, and keeps the connection.
    Answers(fn(&Asked) -> String),
}

/// One that was started.
#[derive(Clone)]
pub struct Replica {
    pub address: SocketAddr,
    act: Arc<Mutex<Act>>,
    asked: Arc<Mutex<Vec<Asked>>>,
    left: Arc<Notify>,
    connections: Arc<AtomicU32>,
}

/// What it was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Replica {
    pub async fn start(act: Act) -> Self {
        let address = Self::nobody();
        let listener = TcpListener::bind(address).await.unwrap();
        let replica = Self {
            address,
            act: Arc::new(Mutex::new(act)),
            asked: Arc::default(),
            left: Arc::default(),
            connections: Arc::default(),
        };
        let served = replica.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let replica = served.clone();
                replica.connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move { replica.serve(stream).await });
            }
        });
        replica
    }

    /// An address where nobody listens: as pods do, all replicas have one port and an address each.
    pub fn nobody() -> SocketAddr {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let [_, _, high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        SocketAddr::from(([127, 1 + high, low / 250, 1 + low % 250], port()))
    }

    /// From the next request on.
    pub fn now(&self, act: Act) {
        *self.act.lock().unwrap() = act;
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// That were opened to it.
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Resolves when a connection was closed by the gateway while it stalled.
    pub async fn left(&self) {
        self.left.notified().await;
    }

    async fn serve(self, mut stream: TcpStream) {
        let mut seen = Vec::new();
        while let Some(asked) = read(&mut stream, &mut seen).await {
            let act = self.act.lock().unwrap().clone();
            let text = match &act {
                Act::Says(text) | Act::SaysAndCloses(text) | Act::SaysAndStalls(text) => text.clone(),
                Act::Answers(make) => make(&asked),
            };
            self.asked.lock().unwrap().push(asked);
            stream.write_all(text.as_bytes()).await.unwrap();
            match act {
                Act::Says(_) | Act::Answers(_) => {}
                Act::SaysAndCloses(_) => return,
                Act::SaysAndStalls(_) => {
                    let ended = stream.read(&mut [0; 1]).await;
                    assert!(ended.is_err() || ended.is_ok_and(|bytes| bytes == 0));
                    self.left.notify_one();
                    return;
                }
            }
        }
    }
}

/// One request, by its content-length.
async fn read(stream: &mut TcpStream, seen: &mut Vec<u8>) -> Option<Asked> {
    let mut more = async |seen: &mut Vec<u8>| {
        let mut piece = [0; 4096];
        let bytes = stream.read(&mut piece).await.ok().filter(|bytes| *bytes > 0)?;
        seen.extend_from_slice(&piece[..bytes]);
        Some(())
    };
    let head = loop {
        if let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") {
            break seen.drain(..end + 4).collect::<Vec<u8>>();
        }
        more(seen).await?;
    };
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.trim_end().split("\r\n");
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers: HeaderMap = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (http::HeaderName::try_from(name).unwrap(), value.parse().unwrap()))
        .collect();
    let length: usize = headers["content-length"].to_str().unwrap().parse().unwrap();
    while seen.len() < length {
        more(seen).await?;
    }
    let body = serde_json::from_slice(&seen.drain(..length).collect::<Vec<u8>>()).unwrap();
    Some(Asked { path, headers, body })
}

/// A whole answer, with these headers beside the length.
pub fn answer(status: u16, headers: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A completion whose text is `text`.
pub fn completion(text: &str) -> String {
    let headers = "lathe-usage: prompt=7,completion=3\r\nendpoint-load-metrics: TEXT x=1\r\n";
    answer(200, headers, &json!({"choices": [{"text": text}]}))
}

/// An error in OpenAI's form.
pub fn error(status: u16, code: &str, headers: &str) -> String {
    answer(status, headers, &json!({"error": {"message": code, "code": code}}))
}

/// The head of a stream and pieces of its body, a chunk each.
pub fn events(pieces: &[&str]) -> String {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\
                trailer: lathe-usage\r\n\r\n";
    let chunks = pieces.iter().map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len()));
    head.to_owned() + &chunks.collect::<String>()
}

/// The end of a stream.
pub const LAST_CHUNK: &str = "0\r\nlathe-usage: prompt=11,completion=5,cached=8\r\n\r\n";
