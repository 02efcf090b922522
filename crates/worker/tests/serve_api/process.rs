//! The program itself: its command line, its signals, its exit.
use std::process::Stdio;

use lathe_contract::exit;
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::model;
use crate::server::{Server, contract, joined, until, volume};

/// `lathe-worker serve` on free ports, and a [`Server`] to ask it.
async fn spawn() -> (Child, Server) {
    let folder = tempfile::tempdir().expect("a folder");
    model::write_model(&volume(folder.path()).join("base"), 1, &[]);
    let at = |name: &str| folder.path().join(name);
    let text = serde_json::to_vec(&contract(folder.path())).expect("JSON");
    std::fs::write(at("contract.json"), text).expect("a file");
    let child = Command::new(env!("CARGO_BIN_EXE_lathe-worker"))
        .args(["serve", "--serve-addr", "127.0.0.1:0", "--control-addr", "127.0.0.1:0"])
        .arg("--contract")
        .arg(at("contract.json"))
        .arg("--addr-file")
        .arg(at("addresses"))
        .arg("--summary")
        .arg(at("summary"))
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the program runs");
    let told: Value = until("the addresses are told", async || {
        serde_json::from_slice(&std::fs::read(at("addresses")).ok()?).ok()
    })
    .await;
    let url = |field: &str| format!("http://{}", told[field].as_str().expect("an address"));
    let server = Server {
        base: url("serveAddr"),
        control: url("controlAddr"),
        stop: CancellationToken::new(),
        abort: CancellationToken::new(),
        folder,
        client: crate::server::client(),
        ended: tokio::spawn(async { exit::SUCCESS }),
    };
    server.until_ready().await;
    (child, server)
}

async fn terminate(child: &Child) {
    let id = child.id().expect("it runs").to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().await.expect("kill runs").success());
}

#[tokio::test]
async fn sigterm_lets_answers_end_and_the_program_succeeds() {
    let (child, server) = spawn().await;
    let body = json!({"model": "base", "prompt": "long", "max_tokens": 1500, "ignore_eos": true});
    let mut running = server.stream("/v1/completions", body).await;
    running.next().await.expect("an event");
    terminate(&child).await;
    assert_eq!(joined(&running.rest().await).1, "length");
    let output = child.wait_with_output().await.expect("it ends");
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit::SUCCESS), "{log}");
    let told = log.lines().find_map(|line| serde_json::from_str::<Value>(line).ok()).expect("a line of JSON");
    assert_eq!(told["serveAddr"], json!(server.base.strip_prefix("http://")));
}

#[tokio::test]
async fn a_second_sigterm_ends_the_waiting() {
    let (mut child, server) = spawn().await;
    let running = server.long_stream("base").await;
    terminate(&child).await;
    until("it is unready", async || (server.ready().await == 503).then_some(())).await;
    terminate(&child).await;
    let events = running.rest().await;
    let last: Value = serde_json::from_str(events.last().expect("an event")).expect("JSON");
    assert_eq!(last["error"]["code"], "shutting_down");
    assert_eq!(child.wait().await.expect("it ends").code(), Some(exit::SUCCESS));
}
