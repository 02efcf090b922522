//! A gateway on a real socket, over a table that is made of objects.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use lathe_api::{FineTuneJob, InferenceService};
use lathe_contract::{Signer, Verifier, new_key};
use lathe_http::{Bounds, serve, serve_by};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::replica::{self, Replica};
use crate::account::Books;
use crate::balance::Balances;
use crate::discovery::Cluster;
use crate::flow::{self, Flows};
use crate::forward::Forwarder;
use crate::hold::answer::Asker;
use crate::hold::{self, HoldBounds, Holds};
use crate::http::{self, Gateway};
use crate::jobs;
use crate::keys::{Auth, Keyring};
use crate::limits::Quotas;
use crate::metrics::Metrics;
use crate::operator_key::OperatorKey;
use crate::places::Places;
use crate::table::Table;
use crate::tasks::Tasks;
use crate::testing::{object, service, slice_at};
use crate::tokens::Tokens;
use crate::upstream::Upstream;

/// Long enough for the slowest machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Rig {
    pub url: String,
    pub cluster: Cluster,
    pub client: reqwest::Client,
    pub metrics: Arc<Metrics>,
    books: Arc<Books>,
    pub places: Arc<Places>,
    pub holds: Arc<Holds>,
    /// The port of probes, of which there is the operator's alone.
    pub admin: String,
    autoscaled: bool,
    table: watch::Sender<Option<Arc<Table>>>,
    pub stop: CancellationToken,
    pub ended: tokio::task::JoinHandle<()>,
    _tasks: Tasks,
}

/// How a gateway is set up.
pub struct Setup {
    /// Fields of the key's entry.
    pub key: Value,
    /// Entries of other keys, by their names; the key of each is of the bytes of its number: 2 and on.
    pub more_keys: Vec<(&'static str, Value)>,
    /// Everybody is let in, without a key.
    pub open: bool,
    /// None: `team-a/support` and `team-b/support`.
    pub services: Vec<InferenceService>,
    pub jobs: Vec<FineTuneJob>,
    pub max_in_flight: usize,
    pub per_key: usize,
    pub usage_log: bool,
    /// Whether the services have `spec.autoscaling`.
    pub autoscaled: bool,
    pub holds: HoldBounds,
    pub tracer: Option<lathe_telemetry::SdkTracer>,
}

impl Default for Setup {
    fn default() -> Self {
        let holds = HoldBounds { requests: 64, bytes: 1 << 20, time: Duration::from_secs(300) };
        Self {
            key: json!({}),
            more_keys: vec![],
            open: false,
            services: vec![],
            jobs: vec![],
            max_in_flight: 64,
            per_key: 64,
            usage_log: false,
            autoscaled: false,
            holds,
            tracer: None,
        }
    }
}

/// The services, of which each has these replicas; those of the operator's status answer where there are any.
fn table(autoscaled: bool, of_a: &[SocketAddr], of_b: &[SocketAddr]) -> Arc<Table> {
    let service = |namespace: &str, adapters: &[&str], answers: &[&str], replicas: &[SocketAddr]| {
        let asleep = autoscaled && replicas.is_empty();
        let mut made = service(namespace, "support", adapters, if asleep { &[] } else { answers });
        made.spec.autoscaling = autoscaled.then(|| object(json!({"minReplicas": 0, "maxReplicas": 3})));
        made
    };
    let services = [
        service("team-a", &["tone", "late"], &["support", "tone"], of_a),
        service("team-b", &[], &["support"], of_b),
    ];
    Arc::new(Table::build(replica::port(), &services, &slices(of_a, of_b)))
}

/// The replicas of `team-a/support` and of `team-b/support`.
fn slices(of_a: &[SocketAddr], of_b: &[SocketAddr]) -> Vec<EndpointSlice> {
    let slice = |namespace: &str, replica: &SocketAddr| -> EndpointSlice {
        let mut slice = slice_at(namespace, "support", replica.port());
        slice["endpoints"] =
            json!([{"addresses": [replica.ip().to_string()], "conditions": {"ready": true}}]);
        object(slice)
    };
    let of_a = of_a.iter().map(|replica| slice("team-a", replica));
    of_a.chain(of_b.iter().map(|replica| slice("team-b", replica))).collect()
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
    let mut entries = BTreeMap::new();
    for (number, (name, fields)) in (1..).zip([("k", setup.key)].into_iter().chain(setup.more_keys)) {
        let mut entry = json!({"hash": new_key([number; 32]).1, "namespace": "team-a"});
        for (field, value) in fields.as_object().unwrap() {
            entry[field] = value.clone();
        }
        entries.insert(name.to_owned(), entry.to_string().into_bytes());
    }
    let keyring = Keyring::read(&entries);
    assert!(keyring.broken.is_empty());
    let auth = if setup.open { Auth::Open } else { Auth::Keys(watch::channel(Arc::new(keyring)).1) };
    let (metrics, quotas) = (Arc::new(Metrics::default()), Arc::new(Quotas::default()));
    let books = Arc::new(Books {
        balances: Balances::default(),
        quotas,
        flows: Flows::default(),
        metrics: Arc::clone(&metrics),
        usage_log: setup.usage_log,
    });
    let places = Places::new(setup.max_in_flight, setup.per_key);
    let table = match &setup.services[..] {
        [] => table(setup.autoscaled, replicas, &[]),
        services => Arc::new(Table::build(replica::port(), services, &slices(replicas, &[]))),
    };
    let table = watch::Sender::new(Some(table));
    let cluster = Cluster::of(table.subscribe(), &setup.services, &setup.jobs);
    let mut tasks = Tasks::new();
    let holds = Holds::new(setup.holds, table.subscribe(), Arc::clone(&metrics));
    hold::follow(&mut tasks, Arc::clone(&holds));
    flow::follow(&mut tasks, Arc::clone(&books), Arc::clone(&holds), table.subscribe());
    let operator = Verifier::from_pem(&Signer::from_seed(&[4; 32]).public_pem().unwrap()).unwrap();
    let operator = Arc::new(OperatorKey::of(operator));
    let probes = flow::poll::router(Arc::clone(&books), Arc::clone(&holds), Arc::clone(&operator))
        .merge(jobs::handed::router(cluster.jobs.clone(), operator));
    let forwarder = Forwarder::new(Upstream::default(), Arc::new(Tokens::new(Signer::from_seed(&[3; 32]))));
    let gateway = Gateway::new(
        auth,
        cluster.clone(),
        Asker::new(forwarder, Arc::clone(&holds)),
        Arc::clone(&books),
        Arc::clone(&places),
        setup.tracer,
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let bounds = Bounds { connections: 1024, idle: PATIENCE };
    let ended = tokio::spawn(serve_by(
        listener,
        http::service(gateway, CancellationToken::new()),
        bounds,
        stop.clone(),
    ));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let admin = format!("http://{}", listener.local_addr().unwrap());
    tasks.spawn(async move {
        serve(listener, probes, bounds, CancellationToken::new()).await;
        "probes"
    });
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let autoscaled = setup.autoscaled;
    Rig {
        url,
        cluster,
        client,
        metrics,
        books,
        places,
        holds,
        admin,
        autoscaled,
        table,
        stop,
        ended,
        _tasks: tasks,
    }
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
        self.post_to("/v1/completions", body)
    }

    pub fn post_to(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        let request = self.client.post(format!("{}{path}", self.url));
        request.bearer_auth(new_key([1; 32]).0).json(body)
    }

    /// From here on `team-a/support` has these replicas, and `team-b/support` those.
    pub fn scale(&self, of_a: &[SocketAddr], of_b: &[SocketAddr]) {
        self.table.send_replace(Some(table(self.autoscaled, of_a, of_b)));
    }

    /// From here on `team-a/support` has these replicas of its stable revision, and those of a candidate, which answers so many
    /// percent of its users.
    pub fn try_out(&self, stable: &[SocketAddr], candidate: &[SocketAddr], percent: u64) {
        let mut made = service("team-a", "support", &[], &["support"]);
        made.status = Some(object(json!({
            "modelIds": ["support"], "revisions": {"stable": "old", "candidate": "new"},
            "rollout": {
                "revision": "new", "rules": "r", "phase": "Testing", "step": 1, "percent": percent, "since": 1, "counted": 1,
            },
        })));
        let mut tried = slices(candidate, &[]);
        let endpoints = tried.iter_mut().flat_map(|slice| &mut slice.endpoints);
        endpoints.for_each(|endpoint| endpoint.hostname = Some("candidate".to_owned()));
        let slices = [slices(stable, &[]), tried].concat();
        self.table.send_replace(Some(Arc::new(Table::build(replica::port(), &[made], &slices))));
    }

    /// There is no service any more.
    pub fn delete(&self) {
        self.table.send_replace(Some(Arc::default()));
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

    /// Waits until no replica is charged with anything.
    pub async fn until_uncharged(&self) {
        let asking = async {
            while !self.books.balances.are_idle() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, asking).await.expect("it comes");
    }

    /// Waits until nothing of any request is here.
    pub async fn until_free(&self) {
        let asking = async {
            while !(self.places.are_free() && self.holds.are_empty()) {
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
