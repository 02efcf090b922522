use std::sync::Mutex;
use std::time::Duration;

use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::balance::Balances;
use crate::exchange::tests::Store;
use crate::flow::Flows;
use crate::limits::Quotas;
use crate::metrics::Metrics;
use crate::testing::{job, service, slice};

/// An API server that lists what it holds and passes on what a test says of each watch.
pub struct Server {
    pub client: Client,
    services: mpsc::UnboundedSender<Value>,
    slices: mpsc::UnboundedSender<Value>,
    jobs: mpsc::UnboundedSender<Value>,
    /// Path and query of every call.
    calls: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(services: Vec<Value>, slices: Vec<Value>) -> Self {
        Self::start_with(services, slices, Arc::default())
    }

    /// One that keeps the ConfigMap of counts in this `store`.
    pub fn start_with(services: Vec<Value>, slices: Vec<Value>, store: Arc<Store>) -> Self {
        let (mock, mut handle) = tower_test::mock::pair::<Request<Body>, Response<axum::body::Body>>();
        let (service_sender, service_events) = mpsc::unbounded_channel();
        let (slice_sender, slice_events) = mpsc::unbounded_channel();
        let (job_sender, job_events) = mpsc::unbounded_channel();
        let jobs = Vec::new();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&calls);
        tokio::spawn(async move {
            let (mut service_events, mut slice_events) = (Some(service_events), Some(slice_events));
            let mut job_events = Some(job_events);
            while let Some((request, reply)) = handle.next_request().await {
                let call = request.uri().to_string();
                if call.contains("/configmaps") {
                    let (status, body) = store.answer(request).await;
                    let mut answer = Response::new(axum::body::Body::from(body.to_string()));
                    *answer.status_mut() = status.try_into().unwrap();
                    reply.send_response(answer);
                    continue;
                }
                if call.contains("service-name%3Dlathe-gateway") {
                    let list =
                        json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": store.slices()});
                    reply.send_response(Response::new(axum::body::Body::from(list.to_string())));
                    continue;
                }
                let (items, events) = if call.contains("/inferenceservices") {
                    (&services, &mut service_events)
                } else if call.contains("/endpointslices") {
                    (&slices, &mut slice_events)
                } else {
                    (&jobs, &mut job_events)
                };
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
        Self { client, services: service_sender, slices: slice_sender, jobs: job_sender, calls }
    }
}

fn books() -> Arc<Books> {
    let metrics = Arc::new(Metrics::default());
    Arc::new(Books {
        balances: Balances::default(),
        quotas: Arc::new(Quotas::default()),
        flows: Flows::default(),
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
    let Cluster { mut table, services, jobs } =
        follow(&mut tasks, &server.client, &[], 8080, health.clone(), books);
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
    let known = |namespace: &str, name: &str| services.look(namespace, name, |_| ()).is_some();
    assert!(known("b", "s") && !known("a", "broken"));
    server.services.send(json!({"type": "DELETED", "object": service("a", "s", &[], &["s"])})).unwrap();
    until(&mut table, |table| table.get("a", "s").is_none()).await;
    assert!(!known("a", "s"));
    server.jobs.send(json!({"type": "ADDED", "object": job("b", "tune", json!({}))})).unwrap();
    tokio::time::timeout(Duration::from_secs(60), async {
        while jobs.get("b", "tune").is_none() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .expect("it comes");

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
    let mut table = follow(&mut tasks, &server.client, &[], 8080, health, books).table;
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
        follow(&mut tasks, &server.client, &["a".to_owned(), "b".to_owned()], 8080, health, books).table;
    until(&mut table, |_| true).await;
    let calls = server.calls.lock().unwrap().clone();
    assert!(calls.iter().all(|c| c.contains("/namespaces/a/") || c.contains("/namespaces/b/")), "{calls:?}");
}
