//! How a controller runs: watches with stores, bounded concurrency, a pause that grows with each failure, broken objects
//! that block nobody.
//!
//! Every watch feeds its store before it triggers, so a reconcile sees at least what woke it.
use std::{fmt::Debug, future::Future, sync::Arc, time::Duration};

use futures::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;
use kube::{
    Api, Client, Resource, ResourceExt as _,
    core::{DeserializeGuard, NamespaceResourceScope},
    runtime::{
        WatchStreamExt as _,
        controller::{
            Action, Config, Error as Ended, ReconcileReason, ReconcileRequest, applier, trigger_with,
        },
        reflector::{ObjectRef, Store, store},
        watcher,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;
use tracing::{Instrument as _, Span, field::Empty};

use crate::{
    apply::Happened,
    context::{Context, Scope},
    distress,
    error::Error,
    memory::Memory,
};

/// Reconciles of one controller at a time.
const CONCURRENCY: u16 = 16;
/// Many events of one object become one reconcile.
const DEBOUNCE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// A round that fails once more after so many failures is told in the status.
const TOLD: u32 = 2;

/// An object that may be broken (a stored object that an older or newer schema let through).
pub type Guard<K> = DeserializeGuard<K>;

/// Turns true when the process is to stop.
pub type Stop = watch::Receiver<bool>;

/// Resolves when the process is to stop.
pub async fn stopped(mut stop: Stop) {
    // An error means that the sender is gone: the process is ending.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Kinds that a controller looks after.
pub trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}
impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

/// Brings the world closer to what one object asks for.
pub trait Reconcile: Send + Sync + 'static {
    /// The kind that is looked after.
    type Object: Kind;
    /// Its label in logs and metrics.
    const NAME: &'static str;
    /// The condition that sums the others up.
    const SUMMARY: &'static str;

    /// What is shared.
    fn context(&self) -> &Context;

    /// One round; tells when to look again where nothing changes before.
    fn reconcile(&self, object: &Self::Object) -> impl Future<Output = Result<Action, Error>> + Send;

    /// The object of this name is gone, and what is remembered of it goes too.
    fn forget(&self, _namespace: &str, _name: &str) {}
}

/// Watches of a controller, collected before it runs.
pub struct Watches<K: Kind> {
    /// Of the readiness.
    part: String,
    objects: Store<Guard<K>>,
    queue: Vec<BoxStream<'static, Result<ReconcileRequest<Guard<K>>, watcher::Error>>>,
    ready: Vec<BoxFuture<'static, ()>>,
}

impl<K: Kind> Watches<K> {
    /// Watches the objects themselves.
    pub fn new(scope: &Scope, client: &Client) -> Self {
        let (objects, writer) = store::<Guard<K>>();
        let events = watcher(scope.api::<Guard<K>>(client), watcher::Config::default())
            .modify(forget_managed_fields)
            .default_backoff()
            .reflect(writer);
        let (events, filled) = until_filled(events);
        // One that is gone wakes its controller too, which forgets it then.
        let own = trigger_with(events.touched_objects(), |object: Guard<K>| {
            Some(ReconcileRequest {
                obj_ref: ObjectRef::from_obj(&object),
                reason: ReconcileReason::ObjectUpdated,
            })
        });
        let part = match scope {
            Scope::All => format!("watches for {}", K::plural(&())),
            Scope::Namespace(namespace) => format!("watches for {} of {namespace}", K::plural(&())),
        };
        let ready = vec![filled];
        Self { part, objects, queue: vec![own.boxed()], ready }
    }

    /// Objects of the controller's own kind.
    pub fn objects(&self) -> Store<Guard<K>> {
        self.objects.clone()
    }

    /// Watches another kind too; `wakes` names (namespace, name) of the objects that look at one.
    pub fn also<C>(
        &mut self,
        api: Api<C>,
        config: watcher::Config,
        wakes: impl Fn(&C, &Store<Guard<K>>) -> Vec<(String, String)> + Send + Sync + 'static,
    ) -> Store<C>
    where
        C: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let (reader, writer) = store::<C>();
        let events = watcher(api, config).modify(forget_managed_fields).default_backoff().reflect(writer);
        let (events, filled) = until_filled(events);
        let objects = self.objects.clone();
        let triggers = trigger_with(events.touched_objects(), move |object: C| {
            let woken = wakes(&object, &objects).into_iter();
            woken.map(|(namespace, name)| ReconcileRequest {
                obj_ref: ObjectRef::new(&name).within(&namespace),
                reason: ReconcileReason::Unknown,
            })
        });
        self.queue.push(triggers.boxed());
        self.ready.push(filled);
        reader
    }

    /// Resolves once every store of the watches so far is filled.
    pub fn filled(&mut self) -> BoxFuture<'static, ()> {
        let ready = std::mem::take(&mut self.ready);
        let filled = futures::future::join_all(ready).map(drop).boxed().shared();
        self.ready.push(filled.clone().boxed());
        filled.boxed()
    }

    /// Reconciles until `stop`; then finishes what is under way.
    pub async fn run<R: Reconcile<Object = K>>(self, reconciler: R, stop: Stop) {
        let Self { part, objects, queue, ready } = self;
        let health = reconciler.context().health.clone();
        health.lacks(&part, "not filled yet");
        let filled = futures::future::join_all(ready).map(move |_| health.has(&part));
        // Filled caches are a sign of readiness even where there is nothing to reconcile.
        let all_ready = filled.boxed().shared();
        tokio::spawn(all_ready.clone());
        let pauses = Arc::new(Pauses::default());
        let reconciler = Arc::new(reconciler);
        let triggers = futures::stream::select_all(queue).take_until(stopped(stop.clone()).boxed());
        let caches = all_ready.clone();
        // Without triggers nobody fills the caches any more, and every round waits for them: nothing is under way.
        let stopped_early = async move {
            stopped(stop).await;
            if caches.peek().is_none() {
                return;
            }
            futures::future::pending().await
        };
        let (growing, forgetting) = (pauses.clone(), pauses.clone());
        let results = applier(
            move |object: Arc<Guard<K>>, reconciler: Arc<R>| {
                let (ready, pauses) = (all_ready.clone(), pauses.clone());
                let round = async move {
                    ready.await;
                    once(&*reconciler, &object, &pauses).await
                };
                tokio::spawn(round)
                    .map(|joined| joined.unwrap_or_else(|panic| Err(Failed::from(panic))))
                    .boxed()
            },
            move |object, failed: &Failed, reconciler: Arc<R>| {
                reconciler.context().health.metrics.failed(R::NAME, failed.category);
                Action::requeue(growing.next(&*object))
            },
            reconciler.clone(),
            objects,
            triggers,
            Config::default().debounce(DEBOUNCE).concurrency(CONCURRENCY),
        );
        let rounds = results.for_each(|result| async {
            if let Err(error) = result {
                settle(&*reconciler, &forgetting, &error);
            }
        });
        tokio::select! {
            () = rounds => {}
            () = stopped_early => {}
        }
    }
}

/// Resolves once the first list of reflected `events` has gone by. A store's own `wait_until_ready` wakes only whoever asked
/// last (kube-runtime 5.0), and the applier asks too: where nothing else happened, the other would wait for ever.
fn until_filled<K: Send + 'static>(
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send + 'static,
) -> (impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send + 'static, BoxFuture<'static, ()>)
{
    let (sender, mut receiver) = watch::channel(false);
    let events = events.inspect(move |event| {
        if matches!(event, Ok(watcher::Event::InitDone)) {
            sender.send_replace(true);
        }
    });
    // An error means that the watch is gone: the controller has ended.
    let filled = async move { drop(receiver.wait_for(|filled| *filled).await) };
    (events, filled.boxed())
}

/// One round of one object, as a span.
async fn once<R: Reconcile>(
    reconciler: &R,
    object: &Guard<R::Object>,
    pauses: &Pauses,
) -> Result<Action, Failed> {
    let span = span(R::NAME, object.namespace().as_deref(), &object.name_any());
    let done = round(reconciler, object, pauses).instrument(span.clone()).await;
    span.record("outcome", done.as_ref().map_or_else(|failed| failed.category, |_| "Done"));
    done
}

/// The span of a round; its outcome is recorded at its end.
pub fn span(kind: &'static str, namespace: Option<&str>, name: &str) -> Span {
    tracing::info_span!("reconcile", kind, namespace, name, outcome = Empty)
}

/// What is broken or going is left alone, failures are told.
async fn round<R: Reconcile>(
    reconciler: &R,
    object: &Guard<R::Object>,
    pauses: &Pauses,
) -> Result<Action, Failed> {
    let context = reconciler.context();
    let _timer = context.health.metrics.reconcile(R::NAME);
    let object = match &object.0 {
        Ok(object) => object,
        Err(invalid) => {
            let (meta, now) = (&invalid.metadata, Timestamp::now());
            let told = distress::tell::<R::Object>(&context.client, meta, R::SUMMARY, now).await;
            let message = match told {
                // It can be read by now: the watch brings it again.
                Ok(None) => return Ok(Action::await_change()),
                Ok(Some(message)) => message,
                Err(error) => {
                    tracing::warn!(kind = R::NAME, name = ?meta.name, namespace = ?meta.namespace, %error, "the status of an unreadable object could not be written");
                    invalid.error.clone()
                }
            };
            tracing::warn!(kind = R::NAME, name = ?meta.name, namespace = ?meta.namespace, message);
            context.health.metrics.failed(R::NAME, distress::REASON);
            let happened =
                Happened { good: false, reason: distress::REASON, action: "Read", message: &message };
            context.writer.event(object, &happened).await;
            return Ok(Action::await_change());
        }
    };
    if object.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    match reconciler.reconcile(object).await {
        Ok(action) => {
            pauses.clear(object);
            Ok(action)
        }
        Err(error) if error.is_gone() => Ok(Action::await_change()),
        Err(error) => {
            let message = error.to_string();
            let category = error.category();
            let happened = Happened { good: false, reason: category, action: "Reconcile", message: &message };
            context.writer.event(object, &happened).await;
            // What the status says already stays; a first failure is often over with the next round.
            if !error.is_told() && pauses.failed(object) >= TOLD {
                let (meta, why) = (object.meta(), (category, message.as_str()));
                let told =
                    distress::failing::<R::Object>(&context.client, meta, R::SUMMARY, why, Timestamp::now());
                if let Err(error) = told.await {
                    tracing::debug!(kind = R::NAME, %error, "a failing round could not be told");
                }
            }
            Err(Failed { category, message })
        }
    }
}

/// A round that failed, as it is logged and counted.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Failed {
    category: &'static str,
    message: String,
}

impl From<tokio::task::JoinError> for Failed {
    fn from(error: tokio::task::JoinError) -> Self {
        Self { category: "Panicked", message: format!("a reconcile ended in a bug: {error}") }
    }
}

/// What follows a failure after `failures` others in a row: 1 s, 2 s, 4 s, ... up to five minutes.
pub fn pause(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.min(9)).min(LONGEST_PAUSE)
}

/// How often each object failed in a row.
#[derive(Default)]
struct Pauses(Memory<u32>);

impl Pauses {
    /// The pause after one more failure.
    fn next<K: Resource>(&self, object: &K) -> Duration {
        self.0.with(object, |failures| {
            let pause = pause(*failures);
            *failures = failures.saturating_add(1);
            pause
        })
    }

    /// Failures in a row so far.
    fn failed<K: Resource>(&self, object: &K) -> u32 {
        self.0.with(object, |failures| *failures)
    }

    fn clear<K: Resource>(&self, object: &K) {
        self.0.with(object, |failures| *failures = 0);
    }
}

/// What became of a round. One of an object that is not there means that it is gone, and what is remembered of it goes too.
/// Children of objects that are gone end here as well.
fn settle<R: Reconcile>(reconciler: &R, pauses: &Pauses, error: &Ended<Failed, watcher::Error>) {
    match error {
        Ended::ObjectNotFound(gone) => {
            let namespace = gone.namespace.as_deref().unwrap_or_default();
            pauses.0.forget(namespace, &gone.name);
            reconciler.forget(namespace, &gone.name);
        }
        error => tracing::warn!(kind = R::NAME, %error, "a reconcile failed"),
    }
}

/// Half of an object's bytes, and nobody reads them.
fn forget_managed_fields<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

/// The object that a child's labels name, as (namespace, name): it is woken when the child changes.
pub fn labelled_owner<K: Resource>(child: &K) -> Vec<(String, String)> {
    let name = child.labels().get(lathe_api::names::LABEL_NAME).cloned();
    child.namespace().zip(name).into_iter().collect()
}

/// The readable ones of a store.
pub fn readable<K: Clone + Resource<DynamicType = ()> + 'static>(store: &Store<Guard<K>>) -> Vec<K> {
    store.state().iter().filter_map(|guard| guard.0.as_ref().ok().cloned()).collect()
}

/// One object of a store, where it is there and readable.
pub fn lookup<K>(store: &Store<Guard<K>>, namespace: &str, name: &str) -> Option<K>
where
    K: Clone + Resource<DynamicType = (), Scope = NamespaceResourceScope> + 'static,
{
    let found = store.get(&ObjectRef::new(name).within(namespace))?;
    found.0.as_ref().ok().cloned()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use lathe_api::Model;
    use serde_json::json;

    use super::*;
    use crate::testing::{Server, context, object};

    #[test]
    fn the_pause_of_one_object_doubles_up_to_five_minutes_and_ends_with_success() {
        let pauses = Pauses::default();
        let (a, b) = (model("a"), model("b"));
        let seconds: Vec<u64> = (0..11).map(|_| pauses.next(&a).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!((pauses.failed(&a), pauses.failed(&b)), (11, 0));
        assert_eq!(pauses.next(&b).as_secs(), 1);
        pauses.clear(&a);
        assert_eq!(pauses.next(&a).as_secs(), 1);
    }

    fn model(name: &str) -> Model {
        let meta = json!({"name": name, "namespace": "ns", "uid": format!("uid-{name}")});
        object(
            json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": meta, "spec": {"source": {"uri": "pvc://a/b"}}}),
        )
    }

    struct Forgetting(Arc<Context>, Mutex<Vec<String>>);

    impl Reconcile for Forgetting {
        type Object = Model;
        const NAME: &'static str = "Model";
        const SUMMARY: &'static str = "Ready";

        fn context(&self) -> &Context {
            &self.0
        }

        async fn reconcile(&self, _: &Model) -> Result<Action, Error> {
            Ok(Action::await_change())
        }

        fn forget(&self, namespace: &str, name: &str) {
            self.1.lock().unwrap().push(format!("{namespace}/{name}"));
        }
    }

    #[tokio::test]
    async fn an_object_that_is_gone_is_forgotten() {
        let (client, _server) = Server::start(&[]);
        let (forgetting, pauses) = (Forgetting(context(client), Mutex::default()), Pauses::default());
        pauses.next(&model("a"));
        let gone = ObjectRef::<Model>::new("a").within("ns").erase();
        settle(&forgetting, &pauses, &Ended::ObjectNotFound(Box::new(gone)));
        assert_eq!(pauses.failed(&model("a")), 0);
        assert_eq!(*forgetting.1.lock().unwrap(), ["ns/a"]);
    }
}
