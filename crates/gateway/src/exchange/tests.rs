use kube::client::Body;
use serde_json::{Value, json};

use super::*;
use crate::discovery::tests::Server;
use crate::limits::Limits;

/// A key of 1000 tokens a month.
const LIMITS: Limits = Limits { requests: None, tokens: None, month: Some(1000) };

/// One ConfigMap as an API server keeps it, and what goes wrong with the next writes.
#[derive(Default)]
pub struct Store {
    state: std::sync::Mutex<Stored>,
}

#[derive(Default)]
struct Stored {
    map: Option<Value>,
    faults: Vec<Fault>,
    /// Method and path of every write.
    writes: Vec<String>,
    replicas: usize,
    /// Happens during each write.
    meanwhile: Option<Box<dyn Fn() + Send>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Somebody else writes before.
    Overtaken,
    /// The write is done, and its answer lost.
    AnswerLost,
    /// Nothing may be read or written.
    Forbidden,
}

impl Store {
    fn with(data: Value) -> Arc<Self> {
        let store = Arc::<Self>::default();
        store.put(data);
        store
    }

    fn put(&self, data: Value) {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": CONFIG_MAP, "resourceVersion": "1", "annotations": {"somebodys": "own"}}, "data": data});
        self.state.lock().unwrap().map = Some(map);
    }

    fn fails(&self, faults: &[Fault]) {
        faults.clone_into(&mut self.state.lock().unwrap().faults);
    }

    fn meanwhile(&self, happens: impl Fn() + Send + 'static) {
        self.state.lock().unwrap().meanwhile = Some(Box::new(happens));
    }

    fn writes(&self) -> Vec<String> {
        self.state.lock().unwrap().writes.clone()
    }

    fn map(&self) -> Value {
        self.state.lock().unwrap().map.clone().unwrap_or_default()
    }

    /// What the key has used.
    pub fn tokens(&self, key: &str) -> Option<u64> {
        let map = self.map();
        let months: Value = serde_json::from_str(map["data"][key].as_str()?).unwrap();
        Some(months.as_object().unwrap().values().filter_map(|counts| counts["tokens"].as_u64()).sum())
    }

    /// The gateway's own replicas.
    pub fn slices(&self) -> Value {
        let ready = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": true}});
        let endpoints = vec![ready; self.state.lock().unwrap().replicas];
        json!([{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "lathe-gateway-1"}, "endpoints": endpoints}])
    }

    pub async fn answer(&self, request: http::Request<Body>) -> (u16, Value) {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await.unwrap();
        let status = |code: u16, reason: &str| {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason, "message": reason, "code": code});
            (code, status)
        };
        let state = &mut *self.state.lock().unwrap();
        if state.faults.first() == Some(&Fault::Forbidden) {
            state.faults.remove(0);
            return status(403, "Forbidden");
        }
        if parts.method == http::Method::GET {
            return state.map.clone().map_or_else(|| status(404, "NotFound"), |map| (200, map));
        }
        state.writes.push(format!("{} {}", parts.method, parts.uri.path()));
        if let Some(happens) = &state.meanwhile {
            happens();
        }
        let mut sent: Value = serde_json::from_slice(&body).unwrap();
        let version =
            |map: &Value| map["metadata"]["resourceVersion"].as_str().map_or(0, |v| v.parse().unwrap());
        let fault = (!state.faults.is_empty()).then(|| state.faults.remove(0));
        if let (Some(Fault::Overtaken), Some(map)) = (fault, &mut state.map) {
            map["metadata"]["resourceVersion"] = json!((version(map) + 1).to_string());
        }
        let now: u64 = state.map.as_ref().map_or(0, version);
        if version(&sent) != now || (parts.method == http::Method::POST && state.map.is_some()) {
            return status(409, "Conflict");
        }
        sent["metadata"]["resourceVersion"] = json!((now + 1).to_string());
        state.map = Some(sent.clone());
        if fault == Some(Fault::AnswerLost) { status(504, "Timeout") } else { (200, sent) }
    }
}

/// A replica of the gateway.
struct Replica {
    exchange: Exchange,
    quotas: Arc<Quotas>,
    metrics: Arc<Metrics>,
}

impl Replica {
    fn start(store: &Arc<Store>) -> Self {
        let client = Server::start_with(vec![], vec![], Arc::clone(store)).client;
        let (quotas, metrics) = (Arc::new(Quotas::default()), Arc::new(Metrics::default()));
        let exchange = Exchange::new(client, Arc::clone(&quotas), Arc::clone(&metrics));
        Self { exchange, quotas, metrics }
    }

    /// Takes tokens of one month; else what the client is told.
    fn take(&self, key: &str, tokens: u64) -> Result<(), String> {
        take(&self.quotas, key, tokens)
    }

    async fn round(&self) {
        self.exchange.round().await;
    }

    async fn is_failing(&self) -> bool {
        self.exchange.state.lock().await.failing
    }
}

fn take(quotas: &Quotas, key: &str, tokens: u64) -> Result<(), String> {
    let (key, time) = (key.into(), "2026-11-27T12:00:00Z".parse().unwrap());
    let now = Now { instant: std::time::Instant::now(), time };
    let taken = quotas.take(&key, LIMITS, Month::of(now.time), tokens, now);
    taken.map(drop).map_err(|refusal| refusal.message)
}

#[tokio::test]
async fn a_restarted_gateway_knows_what_was_used_before() {
    let store = Arc::<Store>::default();
    let first = Replica::start(&store);
    first.round().await;
    assert_eq!(store.writes(), [""; 0]);
    first.take("k", 700).unwrap();
    first.round().await;
    // Nothing new, nothing written.
    first.round().await;
    assert_eq!(store.writes(), ["POST /api/v1/namespaces/default/configmaps"]);
    assert_eq!(store.map()["metadata"]["labels"]["app.kubernetes.io/part-of"], "lathe");
    first.take("k", 1).unwrap();
    first.round().await;
    assert_eq!(store.writes()[1..], ["PUT /api/v1/namespaces/default/configmaps/lathe-gateway-usage"]);
    drop(first);
    let second = Replica::start(&store);
    second.round().await;
    let refused = second.take("k", 300).unwrap_err();
    assert!(refused.contains("701 are used"), "{refused}");
    second.take("k", 299).unwrap();
    second.take("other", 1000).unwrap();
}

#[tokio::test]
async fn two_replicas_write_at_once_and_know_of_each_other() {
    let store = Store::with(json!({}));
    let [a, b] = [Replica::start(&store), Replica::start(&store)];
    a.take("k", 300).unwrap();
    b.take("k", 400).unwrap();
    store.fails(&[Fault::Overtaken, Fault::Overtaken]);
    tokio::join!(a.round(), b.round());
    assert_eq!(store.tokens("k"), Some(700));
    tokio::join!(a.round(), b.round());
    for replica in [&a, &b] {
        let refused = replica.take("k", 301).unwrap_err();
        assert!(refused.contains("700 are used"), "{refused}");
        assert!(!replica.is_failing().await && replica.metrics.counts_exchanged.get() > 0);
    }
    // What others wrote beside the counts stays.
    assert_eq!(store.map()["metadata"]["annotations"]["somebodys"], "own");
}

#[tokio::test]
async fn a_write_whose_answer_was_lost_is_not_counted_twice() {
    let store = Store::with(json!({}));
    let replica = Replica::start(&store);
    replica.take("k", 300).unwrap();
    store.fails(&[Fault::AnswerLost]);
    replica.round().await;
    assert!(replica.is_failing().await);
    replica.take("k", 50).unwrap();
    replica.round().await;
    assert_eq!((store.tokens("k"), replica.is_failing().await), (Some(350), false));
}

#[tokio::test]
async fn a_gateway_that_may_not_write_counts_by_itself_and_tells_all_later() {
    let store = Store::with(json!({}));
    let replica = Replica::start(&store);
    store.fails(&[Fault::Forbidden, Fault::Forbidden]);
    replica.take("k", 600).unwrap();
    replica.round().await;
    replica.round().await;
    assert!(replica.is_failing().await);
    assert!(replica.take("k", 401).unwrap_err().contains("600 are used"));
    replica.take("k", 400).unwrap();
    replica.round().await;
    assert_eq!((store.tokens("k"), replica.is_failing().await), (Some(1000), false));
}

#[tokio::test]
async fn under_traffic_a_round_is_one_write_and_its_replica_in_touch() {
    let store = Store::with(json!({}));
    let replica = Replica::start(&store);
    let quotas = Arc::clone(&replica.quotas);
    store.meanwhile(move || take(&quotas, "k", 1).unwrap());
    replica.take("k", 5).unwrap();
    replica.round().await;
    assert_eq!((store.writes().len(), store.tokens("k")), (1, Some(5)));
    assert!(!replica.is_failing().await && replica.metrics.counts_exchanged.get() > 0);
    // One that was refused is repeated, and then what came meanwhile is told as well.
    store.fails(&[Fault::Overtaken]);
    replica.round().await;
    assert_eq!((store.writes().len(), store.tokens("k")), (4, Some(8)));
}

#[tokio::test]
async fn a_month_is_over_when_the_api_server_says_so_too() {
    let months = r#"{"2001-01": {"tokens": 3}, "2001-04": {"tokens": 4}}"#;
    let store = Store::with(json!({"old": months}));
    let stamped = |time: &str| json!([{"manager": MANAGER, "operation": "Update", "time": time}]);
    let replica = Replica::start(&store);
    for (time, tokens) in [("2001-02-01T00:00:00Z", 7), ("2001-04-01T00:00:00Z", 4)] {
        store.state.lock().unwrap().map.as_mut().unwrap()["metadata"]["managedFields"] = stamped(time);
        replica.take("k", 1).unwrap();
        replica.round().await;
        assert_eq!(store.tokens("old"), Some(tokens), "{time}");
    }
}

#[tokio::test]
async fn who_never_read_the_counts_keeps_to_its_share() {
    let store = Store::with(json!({}));
    store.state.lock().unwrap().replicas = 3;
    store.fails(&[Fault::Forbidden]);
    let replica = Replica::start(&store);
    replica.round().await;
    assert!(replica.is_failing().await);
    let (key, now) = ("k".into(), Now::read());
    let limits = Limits { requests: Some(30), tokens: None, month: None };
    let entered = (0..30).filter(|_| replica.quotas.enter(&key, limits, now).is_ok()).count();
    assert_eq!(entered, 10);
}

#[tokio::test]
async fn a_broken_configmap_stops_nobody() {
    let good = r#"{"2026-11": {"requests": 3, "tokens": 900}}"#;
    let store = Store::with(json!({"bad": "{", ".writers": "?", "k": good}));
    let replica = Replica::start(&store);
    replica.take("bad", 10).unwrap();
    replica.round().await;
    assert_eq!((store.tokens("bad"), store.tokens("k")), (Some(10), Some(900)));
    assert!(replica.take("k", 101).is_err() && replica.take("k", 100).is_ok());
    // Mended by its own write.
    replica.round().await;
    assert_eq!((replica.metrics.counts_broken.get(), replica.is_failing().await), (0, false));
    store.put(json!({"bad": "[]"}));
    replica.round().await;
    assert_eq!(replica.metrics.counts_broken.get(), 1);
    assert!(replica.take("bad", 991).is_err() && replica.take("bad", 990).is_ok());
    // A key whose entry somebody removed has its month anew.
    store.put(json!({}));
    replica.round().await;
    replica.take("k", 900).unwrap();
}

#[test]
fn replicas_are_the_ready_endpoints_of_one_family() {
    let slice = |family: &str, ready: &[Value]| -> EndpointSlice {
        let endpoints: Vec<Value> =
            ready.iter().map(|ready| json!({"addresses": ["a"], "conditions": {"ready": ready}})).collect();
        crate::testing::object(json!({"addressType": family, "metadata": {}, "endpoints": endpoints}))
    };
    assert_eq!(replicas(&[]), 1);
    let six = slice("IPv6", &[json!(true), json!(true)]);
    let four = slice("IPv4", &[json!(true), json!(false), json!(null)]);
    assert_eq!(replicas(&[four.clone(), six.clone()]), 2);
    assert_eq!(replicas(&[four, six, slice("IPv4", &[json!(true)])]), 3);
}
