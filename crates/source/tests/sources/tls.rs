//! https with the certificates that `SSL_CERT_FILE` names. The client runs as a process of its own, since the environment
//! belongs to a process.
use std::path::Path;
use std::sync::Arc;

use lathe_source::{CancellationToken, Location, Update, fetch};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;

use crate::model::options;

const URL: &str = "LATHE_TEST_HTTPS_URL";

/// Answers every request with one row; returns its address and its certificate.
async fn server() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
    let key = made.signing_key.serialize_der().try_into().unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let acceptor =
        TlsAcceptor::from(Arc::new(config.with_single_cert(vec![made.cert.der().clone()], key).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/train.jsonl", listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            // A client that does not trust us ends here.
            let Ok(mut socket) = acceptor.accept(socket).await else { continue };
            let (mut said, mut block) = (Vec::new(), [0; 1024]);
            while !said.ends_with(b"\r\n\r\n") {
                match socket.read(&mut block).await {
                    Ok(n @ 1..) => said.extend_from_slice(&block[..n]),
                    _ => break,
                }
            }
            let answer =
                "HTTP/1.1 200 OK\r\netag: \"1\"\r\ncontent-length: 3\r\nconnection: close\r\n\r\n{}\n";
            let _ = socket.write_all(answer.as_bytes()).await;
            let _ = socket.shutdown().await;
        }
    });
    (url, made.cert.pem())
}

/// The other half of the test below.
#[tokio::test]
async fn client() {
    let Ok(url) = std::env::var(URL) else { return };
    let cache = tempfile::tempdir().unwrap();
    let location = Location::parse(&url, None, None).unwrap();
    let fetched =
        fetch(&location, &options(cache.path()), &|_: Update<'_>| {}, &CancellationToken::new()).await;
    match fetched {
        Ok(fetched) => assert_eq!(std::fs::read(fetched.file().unwrap()).unwrap(), b"{}\n"),
        Err(error) => panic!("reason={} {error}", error.reason()),
    }
}

/// Output of a client that trusts `bundle`, where it failed.
async fn run(url: &str, bundle: &Path) -> Result<(), String> {
    let mut client = tokio::process::Command::new(std::env::current_exe().unwrap());
    client
        .args(["--exact", "tls::client", "--nocapture"])
        .env(URL, url)
        .env("SSL_CERT_FILE", bundle)
        .env_remove("SSL_CERT_DIR");
    let done = client.output().await.unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(said.contains("running 1 test"), "{said}");
    if done.status.success() { Ok(()) } else { Err(said) }
}

#[tokio::test]
async fn the_bundle_that_is_named_is_trusted_and_no_other() {
    let (url, certificate) = server().await;
    let dir = tempfile::tempdir().unwrap();
    let (right, wrong, none) = (dir.path().join("right"), dir.path().join("wrong"), dir.path().join("none"));
    std::fs::write(&right, &certificate).unwrap();
    let other = rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
    std::fs::write(&wrong, other.cert.pem()).unwrap();
    run(&url, &right).await.unwrap();
    let refused = run(&url, &wrong).await.unwrap_err();
    assert!(refused.contains("certificate"), "{refused}");
    let refused = run(&url, &none).await.unwrap_err();
    assert!(refused.contains("reason=InvalidCredentials") && refused.contains("SSL_CERT_FILE"), "{refused}");
}
