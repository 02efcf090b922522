//! The watches of InferenceServices and EndpointSlices, which become a [`Table`] after every change, and of what the page shows.
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{BoxStream, select_all};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::{DeserializeGuard, NamespaceResourceScope};
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use lathe_api::InferenceService;
use lathe_api::names::LABEL_KIND;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::account::Books;
use crate::health::Health;
use crate::jobs::{self, Jobs};
use crate::metrics::Metrics;
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

/// What the cluster has, as it is now.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// `None` until the watches have seen everything.
    pub table: watch::Receiver<Option<Arc<Table>>>,
    /// The services of the table, as they are stored.
    pub services: Services,
    /// The jobs.
    pub jobs: Jobs,
}

/// The services as the API server has them.
#[derive(Clone, Debug)]
pub struct Services(Vec<Store<DeserializeGuard<InferenceService>>>);

impl Services {
    /// What `read` finds in the one of this name; nothing where it cannot be read.
    pub fn look<T>(
        &self,
        namespace: &str,
        name: &str,
        read: impl FnOnce(&InferenceService) -> T,
    ) -> Option<T> {
        let place = ObjectRef::new(name).within(namespace);
        let found = self.0.iter().find_map(|store| store.get(&place))?;
        found.0.as_ref().ok().map(read)
    }
}

/// Which watches fail: each is told of once, until it works again.
#[derive(Debug, Default)]
pub struct Failing(BTreeSet<usize>);

impl Failing {
    /// What came of a watch last.
    pub fn saw(&mut self, metrics: &Metrics, watch: usize, error: Option<&watcher::Error>) {
        match error {
            None if self.0.remove(&watch) => drop(metrics.watches_failing.dec()),
            Some(error) if self.0.insert(watch) => {
                metrics.watches_failing.inc();
                tracing::warn!(%error, "a watch failed and is tried again; what was seen stays as it is");
            }
            None | Some(_) => {}
        }
    }
}

/// Follows the services of `namespaces` (none: all), whose workers listen at `port`, and the jobs beside them, until nobody
/// listens.
pub fn follow(
    tasks: &mut Tasks,
    client: &Client,
    namespaces: &[String],
    port: u16,
    health: Health,
    books: Arc<Books>,
) -> Cluster {
    health.lacks(PART, "InferenceServices and EndpointSlices were not listed yet");
    let scopes: Vec<Option<&str>> = match namespaces {
        [] => vec![None],
        some => some.iter().map(|namespace| Some(namespace.as_str())).collect(),
    };
    // The EndpointSlice of a Service has its labels: the slices of ours are few among a cluster's.
    let ours = watcher::Config::default().labels(&format!("{SERVICE_NAME},{LABEL_KIND}=inferenceservice"));
    let mut changes = Vec::new();
    let (mut services, mut slices) = (Vec::new(), Vec::new());
    for scope in scopes.iter().copied() {
        services.push(watched::<DeserializeGuard<InferenceService>>(
            client,
            scope,
            watcher::Config::default(),
            &mut changes,
        ));
        slices.push(watched::<EndpointSlice>(client, scope, ours.clone(), &mut changes));
    }
    let (sender, table) = watch::channel(None);
    let jobs = jobs::follow(tasks, client, &scopes, Arc::clone(&books.metrics));
    let cluster = Cluster { table, services: Services(services.clone()), jobs };
    tasks.spawn(async move {
        let mut changes = select_all(changes).ready_chunks(BATCH);
        let mut failing = Failing::default();
        while let Some(batch) = changes.next().await {
            for (watch, change) in batch {
                failing.saw(&books.metrics, watch, change.as_ref().err());
            }
            if !filled(&services) || !filled(&slices) {
                continue;
            }
            let table = build(port, &services, &slices);
            books.balances.keep(&table.replicas());
            books.flows.keep(|uid| table.service(uid).is_some());
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
    cluster
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
impl Cluster {
    /// One whose services and jobs stay as they are.
    pub fn of(
        table: watch::Receiver<Option<Arc<Table>>>,
        services: &[InferenceService],
        jobs: &[lathe_api::FineTuneJob],
    ) -> Self {
        let (reader, mut writer) = store();
        for service in services {
            writer.apply_watcher_event(&watcher::Event::Apply(DeserializeGuard(Ok(service.clone()))));
        }
        Self { table, services: Services(vec![reader]), jobs: Jobs::of(jobs) }
    }
}

#[cfg(test)]
pub mod tests;
