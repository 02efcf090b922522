//! The whole program, from its options to its end, over an API server that is scripted.
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use clap::Parser as _;
use kube::Client;
use lathe_contract::{Scope, Signer, TRAFFIC_AUDIENCE, TRAFFIC_PATH, Traffic, new_key};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::replica::{Act, Replica, completion, events, port};
use super::rig::{soon, verifier};
use crate::discovery::tests::Server;
use crate::exchange::tests::Store;
use crate::options::Options;
use crate::testing::{object, service, slice_at};
use crate::{Around, Stop};

fn options(folder: &Path, listen: SocketAddr, admin: SocketAddr, more: &[&str]) -> Options {
    let (keys, signing) = (folder.join("keys"), folder.join("gateway.key"));
    std::fs::create_dir(&keys).unwrap();
    let entry = json!({"hash": new_key([1; 32]).1, "namespace": "team-a"});
    std::fs::write(keys.join("alice"), entry.to_string()).unwrap();
    std::fs::write(&signing, Signer::from_seed(&[3; 32]).to_pem().unwrap()).unwrap();
    let [listen, admin] = [listen, admin].map(|address| address.to_string());
    let operator = folder.join("operator.pub");
    let [keys, signing, operator] = [keys, signing, operator].map(|path| path.display().to_string());
    let given = ["lathe-gateway", "--listen", &listen, "--admin-listen", &admin, "--keys-dir", &keys];
    let files = ["--signing-key", signing.as_str(), "--operator-key", operator.as_str()];
    Options::parse_from(given.iter().chain(&files).chain(&["--drain-seconds", "3"]).chain(more))
}

/// An API server with one service on this replica, and with what keys used in this `store`.
fn cluster(replica: &Replica, store: Arc<Store>) -> Client {
    let mut slice = slice_at("team-a", "support", replica.address.port());
    slice["endpoints"] =
        json!([{"addresses": [replica.address.ip().to_string()], "conditions": {"ready": true}}]);
    let service = serde_json::to_value(service("team-a", "support", &[], &["support"])).unwrap();
    Server::start_with(vec![service], vec![slice], store).client
}

fn around(client: Client, stop: &Stop) -> Around {
    Around { client, port: port(), metrics: Arc::default(), tracer: None, stop: stop.clone() }
}

async fn get(url: &str) -> (u16, String) {
    let answer = reqwest::Client::builder().no_proxy().build().unwrap().get(url).send().await;
    match answer {
        Ok(answer) => (answer.status().as_u16(), answer.text().await.unwrap()),
        Err(_) => (0, String::new()),
    }
}

/// The program, started before one replica and ready.
struct Running {
    listen: SocketAddr,
    admin: SocketAddr,
    stop: Stop,
    ended: JoinHandle<anyhow::Result<()>>,
    _folder: TempDir,
}

impl Running {
    /// With more arguments, and with what `change` makes of the options.
    async fn start(replica: &Replica, more: &[&str], change: impl FnOnce(&mut Options)) -> Self {
        Self::start_in(cluster(replica, Arc::default()), more, change).await
    }

    async fn start_in(client: Client, more: &[&str], change: impl FnOnce(&mut Options)) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (listen, admin) = (Replica::nobody(), Replica::nobody());
        let (folder, stop) = (tempfile::tempdir().unwrap(), Stop::default());
        let mut options = options(folder.path(), listen, admin, more);
        change(&mut options);
        let around = around(client, &stop);
        let ended = tokio::spawn(async move { crate::run(&options, around).await });
        until_ready(admin).await;
        Self { listen, admin, stop, ended, _folder: folder }
    }

    async fn ends(self) {
        soon(self.ended).await.unwrap().unwrap();
    }
}

async fn until_ready(admin: SocketAddr) {
    soon(async {
        while get(&format!("http://{admin}/readyz")).await.0 != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn it_becomes_ready_answers_and_finishes_what_is_open_when_it_is_stopped() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let running = Running::start(&replica, &[], |_| {}).await;
    let (listen, admin) = (running.listen, running.admin);
    assert_eq!(get(&format!("http://{admin}/healthz")).await, (200, "ok".to_owned()));

    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = || {
        let request =
            client.post(format!("http://{listen}/v1/chat/completions")).bearer_auth(new_key([1; 32]).0);
        request.json(&json!({"model": "support", "messages": [{"role": "user", "content": "x"}]})).send()
    };
    let answer = ask().await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap()["choices"][0]["text"], "hi");
    let token = replica.asked()[0].headers["authorization"].to_str().unwrap()["Bearer ".len()..].to_owned();
    let now = jiff::Timestamp::now().as_second();
    assert_eq!(verifier().verify(&token, "uid-team-a-support", Scope::Inference, now), Ok(()));

    replica.now(Act::SaysAndStalls(events(&["data: 1\n\n"])));
    let mut open = ask().await.unwrap();
    assert_eq!(open.chunk().await.unwrap().unwrap(), "data: 1\n\n");
    running.stop.asked.cancel();
    let (status, why) = soon(async {
        loop {
            let answer = get(&format!("http://{admin}/readyz")).await;
            if answer.0 != 200 {
                return answer;
            }
        }
    })
    .await;
    assert_eq!((status, why.as_str()), (503, "stopping: answering what is open\n"));
    drop(open);
    running.ends().await;
    assert_eq!(get(&format!("http://{listen}/v1/models")).await.0, 0);
}

#[tokio::test]
async fn a_second_signal_ends_the_waiting() {
    let replica = Replica::start(Act::SaysAndStalls(events(&["data: 1\n\n"]))).await;
    let running = Running::start(&replica, &[], |options| options.drain_seconds = 100_000).await;
    let listen = running.listen;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = || {
        let request = client.post(format!("http://{listen}/v1/completions")).bearer_auth(new_key([1; 32]).0);
        request.json(&json!({"model": "support", "prompt": "x"})).send()
    };
    let mut open = ask().await.unwrap();
    assert_eq!(open.chunk().await.unwrap().unwrap(), "data: 1\n\n");
    assert!(!open.headers().contains_key("connection"));
    running.stop.asked.cancel();
    soon(async { while get(&format!("http://{}/readyz", running.admin)).await.0 == 200 {} }).await;
    // Whoever comes before the port is closed is answered, and asks over another connection next time.
    replica.now(Act::Says(completion("hi")));
    assert_eq!(ask().await.unwrap().headers()["connection"], "close");
    running.stop.abort.cancel();
    running.ends().await;
}

#[tokio::test]
async fn who_waits_for_a_replica_is_told_before_the_end() {
    let mut service = service("team-a", "support", &[], &[]);
    service.spec.autoscaling = Some(object(json!({"minReplicas": 0, "maxReplicas": 2})));
    let client = Server::start(vec![serde_json::to_value(service).unwrap()], vec![]).client;
    let running = Running::start_in(client, &[], |_| {}).await;
    let (listen, admin) = (running.listen, running.admin);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(format!("http://{listen}/v1/completions")).bearer_auth(new_key([1; 32]).0);
    let asking = tokio::spawn(request.json(&json!({"model": "support", "prompt": "x"})).send());
    soon(async {
        while !get(&format!("http://{admin}/metrics")).await.1.contains("requests_held 1\n") {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    running.stop.asked.cancel();
    let told = soon(asking).await.unwrap().unwrap();
    assert_eq!((told.status().as_u16(), &told.headers()["retry-after"]), (503, &"1".parse().unwrap()));
    assert_eq!(told.json::<Value>().await.unwrap()["error"]["code"], "shutting_down");
    running.ends().await;
}

#[tokio::test]
async fn without_the_operators_key_it_serves_all_the_same_and_says_what_is_missing() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let running = Running::start(&replica, &[], |_| {}).await;
    let (status, body) = get(&format!("http://{}/v1/traffic", running.admin)).await;
    assert!(status == 503 && body.contains("`operator.pub` of the Secret `lathe-keys`"), "{status} {body}");
    running.stop.asked.cancel();
    running.ends().await;
}

#[tokio::test]
async fn with_the_operators_key_it_tells_the_operator_what_flows() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let operator = Signer::from_seed(&[4; 32]);
    let written = |options: &mut Options| {
        std::fs::write(&options.operator_key, operator.public_pem().unwrap()).unwrap()
    };
    let running = Running::start(&replica, &[], written).await;
    let token = operator.sign(TRAFFIC_AUDIENCE, Scope::Report, jiff::Timestamp::now().as_second());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.get(format!("http://{}{TRAFFIC_PATH}", running.admin)).bearer_auth(token);
    let told = Traffic::parse(&soon(request.send()).await.unwrap().bytes().await.unwrap()).unwrap();
    assert!(told.second > 0 && told.services.is_empty());
    running.stop.asked.cancel();
    running.ends().await;
}

#[tokio::test]
async fn without_keys_in_words_it_serves_full_ids_and_says_so() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let running = Running::start(&replica, &["--auth", "none"], |_| {}).await;
    let listen = running.listen;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for (model, status) in [("team-a/support", 200), ("support", 404)] {
        let request = client.post(format!("http://{listen}/v1/completions"));
        let answer = request.json(&json!({"model": model, "prompt": "x"})).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{model}");
    }
    drop(client);
    running.stop.asked.cancel();
    running.ends().await;
}

#[tokio::test]
async fn a_gateway_without_its_own_key_says_where_it_comes_from() {
    let folder = tempfile::tempdir().unwrap();
    let (listen, admin) = (Replica::nobody(), Replica::nobody());
    let options = Options { signing_key: "/nowhere".into(), ..options(folder.path(), listen, admin, &[]) };
    let client = Server::start(vec![], vec![]).client;
    let failed = crate::run(&options, around(client, &Stop::default())).await.unwrap_err();
    assert!(failed.to_string().contains("`gateway.key` of the Secret `lathe-keys`"), "{failed}");
}

/// A Secret that is optional and not there is an empty folder.
#[tokio::test]
async fn without_any_key_it_is_ready_and_answers_nobody() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let no_key = |options: &mut Options| std::fs::remove_file(options.keys_dir.join("alice")).unwrap();
    let running = Running::start(&replica, &[], no_key).await;
    let (status, body) = get(&format!("http://{}/v1/models", running.listen)).await;
    assert_eq!(status, 401, "{body}");
    assert!(body.contains("This gateway has no keys"), "{body}");
    running.stop.asked.cancel();
    running.ends().await;
}

#[tokio::test]
async fn a_gateway_that_stops_tells_what_was_used_and_the_next_one_goes_on_from_there() {
    let replica = Replica::start(Act::Says(completion("hi"))).await;
    let store = Arc::<Store>::default();
    let budget = |options: &mut Options| {
        let entry = json!({"hash": new_key([1; 32]).1, "namespace": "team-a", "tokensPerMonth": 100});
        std::fs::write(options.keys_dir.join("alice"), entry.to_string()).unwrap();
    };
    let ask = async |running: &Running, answer: u64| {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client.post(format!("http://{}/v1/completions", running.listen));
        let body = json!({"model": "support", "prompt": "x", "max_tokens": answer});
        let answer = request.bearer_auth(new_key([1; 32]).0).json(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let first = Running::start_in(cluster(&replica, Arc::clone(&store)), &[], budget).await;
    assert_eq!(ask(&first, 90).await.0, 200);
    first.stop.asked.cancel();
    first.ends().await;
    // As the worker counted: 7 and 3.
    assert_eq!(store.tokens("alice"), Some(10));
    let second = Running::start_in(cluster(&replica, Arc::clone(&store)), &[], budget).await;
    let (status, refused) = ask(&second, 95).await;
    assert_eq!((status, &refused["error"]["code"]), (429, &json!("insufficient_quota")));
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("100 tokens a month: 10 are used"), "{message}");
    assert_eq!(ask(&second, 90).await.0, 200);
    second.stop.asked.cancel();
    second.ends().await;
    assert_eq!(store.tokens("alice"), Some(20));
}
