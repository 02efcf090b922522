use std::sync::Mutex;
use std::time::Duration;

use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::balance::Balances;
use crate::limits::Quotas;
use crate::metrics::Metrics;
use crate::testing::{service, slice};

/// An API server that lists what it holds and passes on what a test says of each watch.
pub struct Server {
    pub client: Client,
    services: mpsc::UnboundedSender<Value>,
    slices: mpsc::UnboundedSender<Value>,
    /// Path and query of every call.
    calls: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(services: Vec<Value>, slices: Vec<Value>) -> Self {
        let (mock, mut handle) = tower_test::mock::pair::<Request<Body>, Response<axum::body::Body>>();
        let (service_sender, service_events) = mpsc::unbounded_channel();
        let (slice_sender, slice_events) = mpsc::unbounded_channel();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&calls);
        tokio::spawn(async move {
            let (mut service_events, mut slice_events) = (Some(service_events), Some(slice_events));
            while let Some((request, reply)) = handle.next_request().await {
                let call = request.uri().to_string();
                let ours = call.contains("/inferenceservices");
                let (items, events) =
                    if ours { (&services, &mut service_events) } else { (&slices, &mut slice_events) };
                let body = match call.contains("watch=true") {
                    false => {
                        let list = json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items});
                        axum::body::Body::from(list.to_string())
                    }
                    true => {
                        // A second watch of a kind hears nothing.
                        let events = events.take().unwrap_or_else(|| mpsc::unbounded_channel().1);
                        let lines = futures::stream::unfold(
                            events,
                            async |mut events: mpsc::UnboundedReceiver<Value>| {
                                let event = events.recv().await?;
                                Some((Ok::<_, std::io::Error>(format!("{event}\n")), events))
                            },
                        );
                        axum::body::Body::from_stream(lines)
                    }
                };
                seen.lock().unwrap().push(call);
                reply.send_response(Response::new(body));
            }
        });
        let client = Client::new(mock, "default");
        Self { client, services: service_sender, slices: slice_sender, calls }
    }
}

fn books() -> Arc<Books> {
    let metrics = Arc::new(Metrics::default());
    Arc::new(Books {
        balances: Balances::default(),
        quotas: Arc::new(Quotas::default()),
        metrics,
        usage_log: false,
    })
}

fn json_of<T: serde::Serialize>(object: T) -> Value {
    serde_json::to_value(object).unwrap()
}

async fn until(table: &mut watch::Receiver<Option<Arc<Table>>>, what: impl Fn(&Table) -> bool) {
    let waiting = table.wait_for(|table| table.as_ref().is_some_and(|table| what(table)));
    drop(tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("it comes").unwrap());
}

#[tokio::test]
async fn the_table_follows_what_the_api_server_says() {
    let broken = json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"namespace": "a", "name": "broken", "resourceVersion": "1"}, "spec": 7});
    let pod = ("10.0.0.1", json!({"ready": true}));
    let server = Server::start(
        vec![json_of(service("a", "s", &[], &["s"])), broken],
        vec![json_of(slice("a", "s", std::slice::from_ref(&pod)))],
    );
    let books = books();
    let health = Health::new(Arc::clone(&books.metrics));
    let mut tasks = Tasks::default();
    let mut table = follow(&mut tasks, &server.client, &[], 8080, health.clone(), books);
    assert!(health.missing().unwrap().starts_with("watches: "));
    assert!(table.borrow().is_none());
    until(&mut table, |table| table.get("a", "s").is_some_and(|m| m.service.ready().count() == 1)).await;
    while health.missing().is_some() {
        tokio::task::yield_now().await;
    }

    let not_ready = slice("a", "s", &[("10.0.0.1", json!({"ready": false}))]);
    server.slices.send(json!({"type": "MODIFIED", "object": not_ready})).unwrap();
    until(&mut table, |table| table.get("a", "s").is_some_and(|m| m.service.ready().count() == 0)).await;
    server.services.send(json!({"type": "ADDED", "object": service("b", "s", &["t"], &[])})).unwrap();
    until(&mut table, |table| table.get("b", "t").is_some_and(|m| m.adapter && !m.answers)).await;
    server.services.send(json!({"type": "DELETED", "object": service("a", "s", &[], &["s"])})).unwrap();
    until(&mut table, |table| table.get("a", "s").is_none()).await;

    let calls = server.calls.lock().unwrap().clone();
    let slices: Vec<_> = calls.iter().filter(|call| call.contains("/endpointslices")).collect();
    let selector = "labelSelector=kubernetes.io%2Fservice-name%2Clathe.dev%2Fkind%3Dinferenceservice";
    assert!(slices.iter().all(|call| call.contains(selector)), "{slices:?}");
    assert!(calls.iter().all(|call| !call.contains("/namespaces/")), "{calls:?}");
}

#[tokio::test]
async fn a_watch_that_fails_is_told_of_until_it_works_again_and_the_table_stays() {
    let pod = ("10.0.0.1", json!({"ready": true}));
    let server = Server::start(
        vec![json_of(service("a", "s", &[], &["s"]))],
        vec![json_of(slice("a", "s", std::slice::from_ref(&pod)))],
    );
    let books = books();
    let (health, metrics) = (Health::new(Arc::clone(&books.metrics)), Arc::clone(&books.metrics));
    let mut tasks = Tasks::default();
    let mut table = follow(&mut tasks, &server.client, &[], 8080, health, books);
    until(&mut table, |table| table.get("a", "s").is_some_and(|m| m.service.ready().count() == 1)).await;
    let failing = async |wanted| {
        let waiting = async {
            while metrics.watches_failing.get() != wanted {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("it comes");
    };
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "no", "reason": "InternalError", "code": 500});
    server.slices.send(json!({"type": "ERROR", "object": status})).unwrap();
    failing(1).await;
    // What another watch says is no news of this one.
    server.services.send(json!({"type": "ADDED", "object": service("b", "s", &[], &[])})).unwrap();
    until(&mut table, |table| table.get("b", "s").is_some()).await;
    assert_eq!(metrics.watches_failing.get(), 1);
    assert_eq!(table.borrow().as_ref().unwrap().get("a", "s").unwrap().service.ready().count(), 1);
    server.slices.send(json!({"type": "MODIFIED", "object": slice("a", "s", &[pod])})).unwrap();
    failing(0).await;
}

#[tokio::test]
async fn with_namespaces_nothing_else_is_read() {
    let server = Server::start(vec![], vec![]);
    let books = books();
    let health = Health::new(Arc::clone(&books.metrics));
    let mut tasks = Tasks::default();
    let mut table =
        follow(&mut tasks, &server.client, &["a".to_owned(), "b".to_owned()], 8080, health, books);
    until(&mut table, |_| true).await;
    let calls = server.calls.lock().unwrap().clone();
    assert!(calls.iter().all(|c| c.contains("/namespaces/a/") || c.contains("/namespaces/b/")), "{calls:?}");
}
