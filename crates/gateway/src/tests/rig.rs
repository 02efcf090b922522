//! A gateway on a real socket, over a table that is made of objects.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use lathe_contract::{Signer, Verifier, new_key};
use lathe_http::{Bounds, serve};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::replica::{self, Replica};
use crate::account::Books;
use crate::balance::Balances;
use crate::forward::Forwarder;
use crate::http::{Gateway, router};
use crate::keys::{Auth, Keyring};
use crate::limits::Quotas;
use crate::metrics::Metrics;
use crate::places::Places;
use crate::table::Table;
use crate::testing::{object, service, slice_at};
use crate::tokens::Tokens;

/// Long enough for the slowest machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Rig {
    pub url: String,
    pub client: reqwest::Client,
    pub metrics: Arc<Metrics>,
    books: Arc<Books>,
    pub places: Arc<Places>,
    pub stop: CancellationToken,
    pub ended: tokio::task::JoinHandle<()>,
}

/// How a gateway is set up.
pub struct Setup {
    /// Fields of the one key's entry.
    pub key: Value,
    pub max_in_flight: usize,
    pub per_key: usize,
    pub usage_log: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { key: json!({}), max_in_flight: 64, per_key: 64, usage_log: false }
    }
}

pub fn verifier() -> Verifier {
    Verifier::from_pem(&Signer::from_seed(&[3; 32]).public_pem().unwrap()).unwrap()
}

/// The service `team-a/support` with the adapter `tone` on these replicas, and `team-b/support` on none.
pub async fn start(replicas: &[SocketAddr]) -> Rig {
    start_with(replicas, Setup::default()).await
}

pub async fn start_with(replicas: &[SocketAddr], setup: Setup) -> Rig {
    // Another test may have done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let services = [
        service("team-a", "support", &["tone", "late"], &["support", "tone"]),
        service("team-b", "support", &[], &["support"]),
    ];
    let slices: Vec<EndpointSlice> = replicas
        .iter()
        .map(|replica| {
            let mut slice = slice_at("team-a", "support", replica.port());
            slice["endpoints"] =
                json!([{"addresses": [replica.ip().to_string()], "conditions": {"ready": true}}]);
            object(slice)
        })
        .collect();
    let table = Arc::new(Table::build(replica::port(), &services, &slices));
    let mut entry = json!({"hash": new_key([1; 32]).1, "namespace": "team-a"});
    for (field, value) in setup.key.as_object().unwrap() {
        entry[field] = value.clone();
    }
    let keyring = Keyring::read(&[("k".to_owned(), entry.to_string().into_bytes())].into());
    assert!(keyring.broken.is_empty());
    let (metrics, quotas) = (Arc::new(Metrics::default()), Arc::new(Quotas::default()));
    let books = Arc::new(Books {
        balances: Balances::default(),
        quotas,
        metrics: Arc::clone(&metrics),
        usage_log: setup.usage_log,
    });
    let places = Places::new(setup.max_in_flight, setup.per_key);
    let gateway = Gateway::new(
        Auth::Keys(watch::channel(Arc::new(keyring)).1),
        watch::channel(Some(table)).1,
        Forwarder::new(Arc::new(Tokens::new(Signer::from_seed(&[3; 32])))),
        Arc::clone(&books),
        Arc::clone(&places),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let bounds = Bounds { connections: 1024, idle: PATIENCE };
    let ended = tokio::spawn(serve(listener, router(gateway), bounds, stop.clone()));
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    Rig { url, client, metrics, books, places, stop, ended }
}

/// The addresses of replicas.
pub fn addresses(replicas: &[Replica]) -> Vec<SocketAddr> {
    replicas.iter().map(|replica| replica.address).collect()
}

impl Rig {
    pub fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.client.get(format!("{}{path}", self.url)).bearer_auth(new_key([1; 32]).0)
    }

    pub fn post(&self, body: &Value) -> reqwest::RequestBuilder {
        let request = self.client.post(format!("{}/v1/completions", self.url));
        request.bearer_auth(new_key([1; 32]).0).json(body)
    }

    /// A completion of `support` that asks for 10 tokens; status and body.
    pub async fn complete(&self, prompt: &str) -> (u16, Value) {
        let body = json!({"model": "support", "prompt": prompt, "max_tokens": 10});
        let answer = self.post(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    /// Waits until no request is open, and nobody is charged with one that is over.
    pub async fn until_idle(&self) {
        self.until_metric("lathe_gateway_requests_in_flight 0").await;
        assert!(self.books.balances.are_idle());
    }

    /// Waits until nothing of any request is held.
    pub async fn until_free(&self) {
        let asking = async {
            while !self.places.are_free() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, asking).await.expect("it comes");
    }

    /// Waits until the metrics have this line: an account is closed a moment after its client has everything.
    pub async fn until_metric(&self, line: &str) {
        let asking = async {
            while !self.metrics.text().unwrap().lines().any(|l| l == line) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let text = || self.metrics.text().unwrap();
        tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("no {line} in {}", text()));
    }
}

/// What a test waits for must come.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it comes")
}
