use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::tests::replica::{Act, Replica, completion};

async fn asked(upstream: &Upstream, replica: &Replica) -> Response<Answer> {
    upstream.ask(replica.address, request()).await.expect("an answer")
}

fn kept(upstream: &Upstream) -> usize {
    upstream.lock().values().map(Vec::len).sum()
}

#[tokio::test]
async fn one_connection_is_for_one_request_after_another_until_it_idles_for_too_long() {
    let replica = Replica::start(Act::Says(completion("x"))).await;
    let upstream = Upstream::default();
    for _ in 0..3 {
        let answer = asked(&upstream, &replica).await;
        assert_eq!(kept(&upstream), 0);
        answer.into_body().collect().await.expect("a body");
        assert_eq!(kept(&upstream), 1);
    }
    assert_eq!(replica.connections(), 1);
    upstream.sweep(Instant::now());
    assert_eq!(kept(&upstream), 1);
    upstream.sweep(Instant::now() + IDLE);
    assert_eq!(kept(&upstream), 0);
    asked(&upstream, &replica).await;
    assert_eq!(
        (kept(&upstream), replica.connections()),
        (0, 2),
        "a body that is not read ends its connection"
    );
}

/// Answers the one request of the next connection so; the connection stays open as long as what is returned.
async fn served(listener: &TcpListener, said: String) -> TcpStream {
    let (mut stream, _) = listener.accept().await.expect("another connection");
    let mut request = Vec::new();
    while !request.ends_with(b"{}") {
        assert_ne!(stream.read_buf(&mut request).await.expect("a request"), 0);
    }
    stream.write_all(said.as_bytes()).await.expect("an answer");
    stream
}

async fn a_replica() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    (listener, address)
}

fn request() -> Sent {
    Request::new(Full::new("{}".into()))
}

/// The runtime looks at sockets.
async fn a_moment() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[tokio::test]
async fn what_happens_to_a_connection_while_it_idles_is_no_loss() {
    let (listener, replica) = a_replica().await;
    let upstream = Upstream::default();
    for connection in 0..6 {
        let (answer, mut stream) =
            tokio::join!(upstream.ask(replica, request()), served(&listener, completion("x")));
        answer.expect("an answer").into_body().collect().await.expect("a body");
        assert_eq!(kept(&upstream), 1, "{connection}");
        // Closed, or answered before anything was asked.
        if connection % 2 == 1 {
            stream.write_all(completion("somebody else's").as_bytes()).await.expect("written");
        }
        drop(stream);
        a_moment().await;
    }
}

#[tokio::test]
async fn what_says_more_than_its_answer_is_not_asked_again() {
    let (listener, replica) = a_replica().await;
    let upstream = Upstream::default();
    let closing = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx".to_owned();
    for said in [completion("x") + &completion("y"), closing] {
        let (answer, _stream) = tokio::join!(upstream.ask(replica, request()), served(&listener, said));
        let body = answer.expect("an answer").into_body().collect().await.expect("a body").to_bytes();
        assert!(!body.contains(&b'y') && kept(&upstream) == 0);
    }
}

#[tokio::test]
async fn who_took_the_request_is_a_loss_and_is_not_asked_again() {
    let (listener, replica) = a_replica().await;
    let upstream = Upstream::default();
    let (answer, stream) = tokio::join!(upstream.ask(replica, request()), served(&listener, completion("x")));
    answer.expect("an answer").into_body().collect().await.expect("a body");
    let dies = async {
        let mut stream = stream;
        assert_ne!(stream.read(&mut [0; 512]).await.expect("a request"), 0);
    };
    let (answer, ()) = tokio::join!(upstream.ask(replica, request()), dies);
    assert_eq!((answer.expect_err("a loss"), kept(&upstream)), (Loss::Reset, 0));
}
