//! The watches of InferenceServices and EndpointSlices, which become a [`Table`] after every change.
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{BoxStream, select_all};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::{DeserializeGuard, NamespaceResourceScope};
use kube::runtime::reflector::{Store, store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use lathe_api::InferenceService;
use lathe_api::names::LABEL_KIND;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::account::Books;
use crate::health::Health;
use crate::table::{SERVICE_NAME, Table};
use crate::tasks::Tasks;

/// Of the readiness.
const PART: &str = "watches";
/// Changes that become one table.
const BATCH: usize = 1024;

/// Between two tables: what changes meanwhile is in the next one.
const PAUSE: Duration = Duration::from_millis(100);

/// Of the watch of this number.
type Change = (usize, Result<(), watcher::Error>);

/// Follows the services of `namespaces` (none: all), whose workers listen at `port`, until nobody listens. The table is `None` until all of them were seen.
pub fn follow(
    tasks: &mut Tasks,
    client: &Client,
    namespaces: &[String],
    port: u16,
    health: Health,
    books: Arc<Books>,
) -> watch::Receiver<Option<Arc<Table>>> {
    health.lacks(PART, "InferenceServices and EndpointSlices were not listed yet");
    let scopes: Vec<Option<&str>> = match namespaces {
        [] => vec![None],
        some => some.iter().map(|namespace| Some(namespace.as_str())).collect(),
    };
    // The EndpointSlice of a Service has its labels: the slices of ours are few among a cluster's.
    let ours = watcher::Config::default().labels(&format!("{SERVICE_NAME},{LABEL_KIND}=inferenceservice"));
    let mut changes = Vec::new();
    let (mut services, mut slices) = (Vec::new(), Vec::new());
    for scope in scopes {
        services.push(watched::<DeserializeGuard<InferenceService>>(
            client,
            scope,
            watcher::Config::default(),
            &mut changes,
        ));
        slices.push(watched::<EndpointSlice>(client, scope, ours.clone(), &mut changes));
    }
    let (sender, receiver) = watch::channel(None);
    tasks.spawn(async move {
        let mut changes = select_all(changes).ready_chunks(BATCH);
        let mut failing = BTreeSet::new();
        while let Some(batch) = changes.next().await {
            for (watch, change) in batch {
                match change {
                    Ok(()) => drop(failing.remove(&watch)),
                    Err(error) if failing.insert(watch) => {
                        tracing::warn!(%error, "a watch failed and is tried again; the table stays as it is");
                    }
                    Err(_) => {}
                }
            }
            books.metrics.watches_failing.set(failing.len() as i64);
            if !filled(&services) || !filled(&slices) {
                continue;
            }
            let table = build(port, &services, &slices);
            books.balances.keep(&table.replicas());
            books.metrics.keep(|series| table.get(series.namespace, series.model).is_some());
            books.metrics.table_updated.set(jiff::Timestamp::now().as_second());
            sender.send_replace(Some(Arc::new(table)));
            health.has(PART);
            if sender.is_closed() {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        "the watches"
    });
    receiver
}

fn watched<K>(
    client: &Client,
    namespace: Option<&str>,
    config: watcher::Config,
    changes: &mut Vec<BoxStream<'static, Change>>,
) -> Store<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let api: Api<K> = match namespace {
        None => Api::all(client.clone()),
        Some(namespace) => Api::namespaced(client.clone(), namespace),
    };
    let (reader, writer) = store::<K>();
    let events = watcher(api, config).modify(|object: &mut K| object.managed_fields_mut().clear());
    // The store has a change before we are told of it.
    let number = changes.len();
    changes
        .push(events.default_backoff().reflect(writer).map(move |event| (number, event.map(drop))).boxed());
    reader
}

/// Whether every store was listed once.
fn filled<K>(stores: &[Store<K>]) -> bool
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    stores.iter().all(|store| futures::FutureExt::now_or_never(store.wait_until_ready()).is_some())
}

/// A stored object that cannot be read is passed over; it is one service less, and no reason to stop.
fn build(
    port: u16,
    services: &[Store<DeserializeGuard<InferenceService>>],
    slices: &[Store<EndpointSlice>],
) -> Table {
    let services: Vec<_> = services.iter().flat_map(Store::state).collect();
    let slices: Vec<_> = slices.iter().flat_map(Store::state).collect();
    let readable = services.iter().filter_map(|object| object.0.as_ref().ok());
    Table::build(port, readable, slices.iter().map(Arc::as_ref))
}

#[cfg(test)]
pub mod tests;
