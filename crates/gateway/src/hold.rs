//! Requests that wait here since no replica is ready: while a service wakes from zero, and while its last replica is swapped.
//!
//! **Who is held.** With `spec.autoscaling`, whoever asks a service that has no ready replica: that is what wakes it. Without it, only
//! where a replica was ready within the time that a request may be held, as this gateway saw it: then one is being swapped or
//! restarted, or its node drained. A service that was never ready, has been gone for longer, or was stopped by its user
//! (`replicas: 0`), is refused at once.
//!
//! **How.** [`answer`] asks for a request and takes it here where nobody is there; [`queue`] says whose turn it is, once the table
//! has a ready replica again. Requests, their bodies' bytes and their time are bounded, of one service, of one namespace and in all.
//! Who has left is forgotten at once.
pub mod answer;
mod queue;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::table::{Model, Scale, Service, Table};
use crate::tasks::Tasks;
use queue::{Queue, Turn};

/// What is held of one service, as many times of one namespace, and in all: no tenant takes everybody's room.
const NAMESPACE: usize = 2;
const ALL: usize = 8;
const SECOND: Duration = Duration::from_secs(1);

/// What is held of one service.
#[derive(Clone, Copy, Debug)]
pub struct HoldBounds {
    /// Requests at a time.
    pub requests: usize,
    /// Bytes of their bodies at a time.
    pub bytes: usize,
    /// How long one is held, all in all.
    pub time: Duration,
}

/// Everything that is held.
#[derive(Debug)]
pub struct Holds {
    bounds: HoldBounds,
    metrics: Arc<Metrics>,
    table: watch::Receiver<Option<Arc<Table>>>,
    state: Mutex<State>,
    /// How often a service began to have held requests.
    begun: watch::Sender<u64>,
    closing: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    /// By UID; of those alone that have somebody.
    lines: HashMap<String, Line>,
    namespaces: HashMap<String, Amount>,
    all: Amount,
    next: u64,
    /// When services began to have held requests, within the last second.
    begun: HashMap<String, Instant>,
    /// When the last ready replica was lost, by the service's UID; `None`: there is one.
    lost: HashMap<String, Option<Instant>>,
}

#[derive(Debug, Default)]
struct Line {
    queue: Queue,
    held: Amount,
    changed: Arc<Notify>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Amount {
    requests: usize,
    bytes: usize,
}

impl Holds {
    /// With nobody yet.
    pub fn new(
        bounds: HoldBounds,
        table: watch::Receiver<Option<Arc<Table>>>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let holds = Self {
            bounds,
            metrics,
            table,
            state: Mutex::default(),
            begun: watch::Sender::new(0),
            closing: CancellationToken::new(),
        };
        holds.see(Instant::now());
        Arc::new(holds)
    }

    /// Whether a request for this service may wait while no replica is ready.
    pub fn may_wait(&self, service: &Service, now: Instant) -> bool {
        match service.scale {
            Scale::Automatic => true,
            Scale::Stopped => false,
            Scale::Fixed => match self.lock().lost.get(&service.uid) {
                Some(Some(lost)) => now.saturating_duration_since(*lost) < self.bounds.time,
                Some(None) => true,
                None => false,
            },
        }
    }

    /// Takes a request whose body has so many bytes.
    ///
    /// # Errors
    /// 429: as many are held as may be. 413: its body is too long to be held. 503: it may not wait.
    pub fn enter(self: &Arc<Self>, model: &Model, bytes: usize) -> Result<Held, ApiError> {
        let (service, now) = (&model.service, Instant::now());
        if self.closing.is_cancelled() {
            return Err(ApiError::shutting_down());
        }
        if !self.may_wait(service, now) {
            return Err(ApiError::no_replica(&model.id()));
        }
        if bytes > self.bounds.bytes {
            return Err(ApiError::too_long_to_hold(&model.id(), self.bounds.bytes));
        }
        let mut locked = self.lock();
        let state = &mut *locked;
        if let Err(what) = state.take(service, bytes, self.bounds) {
            self.metrics.hold.refused.inc();
            return Err(ApiError::hold_full(&model.id(), &what));
        }
        let number = state.number();
        let line = state.lines.entry(service.uid.clone()).or_default();
        if line.queue.joins(number) && is_news(&mut state.begun, &service.uid, now) {
            self.begun.send_modify(|begun| *begun += 1);
        }
        // Whoever changes the table looks for lines behind it: either we see the change here, or it sees us there.
        // Whichever sees it first wakes the others.
        if line.queue.sees(self.ready(&service.uid)) {
            line.changed.notify_waiters();
        }
        let changed = Arc::clone(&line.changed);
        drop(locked);
        self.metrics.hold.begins();
        Ok(Held {
            holds: Arc::clone(self),
            id: model.id(),
            uid: service.uid.clone(),
            namespace: service.namespace.clone(),
            bytes,
            number,
            changed,
            since: now,
            waits: true,
            waited: Duration::ZERO,
        })
    }

    /// How many are held at this moment, by their services' UIDs.
    pub fn held(&self) -> HashMap<String, u64> {
        let state = self.lock();
        let held = state.lines.iter().map(|(uid, line)| (uid.clone(), line.queue.held() as u64));
        held.filter(|(_, held)| *held > 0).collect()
    }

    /// Changes each time that a service begins to have held requests.
    pub fn begun(&self) -> watch::Receiver<u64> {
        self.begun.subscribe()
    }

    /// Nobody is held any more.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// Takes what the table says now.
    fn see(&self, now: Instant) {
        let table = self.table.borrow().clone();
        let Some(table) = table else { return };
        let mut state = self.lock();
        let known = |uid: &String, lost: &mut Option<Instant>| {
            let recent = lost.is_none_or(|lost| now.saturating_duration_since(lost) < self.bounds.time);
            recent && table.service(uid).is_some()
        };
        state.lost.retain(known);
        for service in table.services() {
            match (service.ready().next().is_some(), state.lost.get_mut(&service.uid)) {
                (true, Some(lost)) => *lost = None,
                (true, None) => _ = state.lost.insert(service.uid.clone(), None),
                (false, Some(lost)) => _ = lost.get_or_insert(now),
                (false, None) => {}
            }
        }
        for (uid, line) in &mut state.lines {
            if line.queue.sees(self.ready(uid)) {
                line.changed.notify_waiters();
            }
        }
    }

    /// The service's ready replicas, and how many requests each of them decodes at a time; nothing where nobody will come.
    fn ready(&self, uid: &str) -> Option<(Vec<SocketAddr>, u32)> {
        let table = self.table.borrow();
        let service = table.as_ref()?.service(uid)?;
        let ready: Vec<_> = service.ready().collect();
        let stopped = service.scale == Scale::Stopped && ready.is_empty();
        (!stopped).then_some((ready, service.slots))
    }

    fn with<T>(&self, held: &Held, change: impl FnOnce(&mut Queue) -> T) -> Option<T> {
        Some(change(&mut self.lock().lines.get_mut(&held.uid)?.queue))
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody is held, and nothing of anybody's.
    #[cfg(test)]
    pub fn are_empty(&self) -> bool {
        let state = self.lock();
        state.lines.is_empty() && state.namespaces.is_empty() && state.all == Amount::default()
    }
}

impl State {
    /// One that nobody has.
    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// Room for one more; the text of an error says which bound is reached.
    fn take(&mut self, service: &Service, bytes: usize, bounds: HoldBounds) -> Result<(), String> {
        let of_service = self.lines.get(&service.uid).map_or(Amount::default(), |line| line.held);
        let of_namespace = self.namespaces.get(&service.namespace).copied().unwrap_or_default();
        let parts =
            [(of_service, 1, ""), (of_namespace, NAMESPACE, " of its namespace"), (self.all, ALL, " of all")];
        for (held, times, whose) in parts {
            if held.requests >= times * bounds.requests {
                return Err(format!("{} requests{whose}", held.requests));
            }
            if held.bytes + bytes > times * bounds.bytes {
                return Err(format!("requests{whose} of {} KiB", held.bytes.div_ceil(1 << 10)));
            }
        }
        let line = &mut self.lines.entry(service.uid.clone()).or_default().held;
        let namespace = self.namespaces.entry(service.namespace.clone()).or_default();
        for amount in [line, namespace, &mut self.all] {
            amount.requests += 1;
            amount.bytes += bytes;
        }
        Ok(())
    }

    fn give_back(&mut self, uid: &str, namespace: &str, bytes: usize) {
        let less = |amount: &mut Amount| {
            amount.requests -= 1;
            amount.bytes -= bytes;
        };
        less(&mut self.all);
        if let Some(amount) = self.namespaces.get_mut(namespace) {
            less(amount);
        }
        if let Some(line) = self.lines.get_mut(uid) {
            less(&mut line.held);
        }
        self.namespaces.retain(|_, amount| amount.requests > 0);
        self.lines.retain(|_, line| line.held.requests > 0);
    }
}

/// Whether the service has not begun within the last second: clients that come and leave shall not drive the operator's poll, which
/// hears of this second when it is over.
fn is_news(begun: &mut HashMap<String, Instant>, uid: &str, now: Instant) -> bool {
    begun.retain(|_, at| now.saturating_duration_since(*at) < SECOND);
    let is_news = !begun.contains_key(uid);
    if is_news {
        begun.insert(uid.to_owned(), now);
    }
    is_news
}

/// A request that is held, or that was and is asked for. When this is dropped it is forgotten.
#[derive(Debug)]
pub struct Held {
    holds: Arc<Holds>,
    /// The model's.
    id: String,
    uid: String,
    namespace: String,
    bytes: usize,
    number: u64,
    changed: Arc<Notify>,
    since: Instant,
    /// It is in the queue.
    waits: bool,
    /// As long as it waited until its last turn.
    waited: Duration,
}

impl Held {
    /// Waits for its turn: whom it may ask.
    ///
    /// # Errors
    /// 503: there is nobody, its time is over, or the gateway goes.
    pub async fn turn(&mut self) -> Result<Vec<SocketAddr>, ApiError> {
        let end = self.end();
        loop {
            let changed = Arc::clone(&self.changed);
            let mut changed = pin!(changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            let now = Instant::now();
            if now >= end {
                return Err(ApiError::not_woken(&self.id, self.holds.bounds.time.as_secs()));
            }
            let turn = self.holds.with(self, |queue| queue.turn(self.number, now)).unwrap_or(Turn::Gone);
            let until = match turn {
                Turn::Go(ready) => {
                    self.waits = false;
                    self.waited = now.saturating_duration_since(self.since);
                    self.holds.metrics.hold.now.dec();
                    return Ok(ready);
                }
                Turn::Gone => return Err(ApiError::no_replica(&self.id)),
                Turn::Wait(until) => until.map_or(end, |until| until.min(end)),
            };
            tokio::select! {
                () = self.holds.closing.cancelled() => return Err(ApiError::shutting_down()),
                () = changed => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// A replica is there and has not loaded yet what this one asks for: others go on, and after so long it waits again, behind
    /// them.
    pub async fn again(&mut self, pause: Duration) {
        if std::mem::replace(&mut self.waits, true) {
            return;
        }
        self.holds.with(self, Queue::passes);
        self.changed.notify_waiters();
        self.holds.metrics.hold.now.inc();
        tokio::select! {
            () = self.holds.closing.cancelled() => {}
            () = tokio::time::sleep_until(self.end().min(Instant::now() + pause)) => {}
        }
        self.number = self.holds.lock().number();
        self.holds.with(self, |queue| queue.joins(self.number));
    }

    /// Whether it may be held no longer.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.end()
    }

    fn end(&self) -> Instant {
        self.since + self.holds.bounds.time
    }

    /// Nobody did anything with it: it goes back to its place, and nobody goes for so long unless something changes.
    pub fn back(&mut self, pause: Duration) {
        if std::mem::replace(&mut self.waits, true) {
            return;
        }
        self.holds.with(self, |queue| queue.back(self.number, Instant::now() + pause));
        // Its turn is free, perhaps for one that came back before it.
        self.changed.notify_waiters();
        self.holds.metrics.hold.now.inc();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let waited = if self.waits { self.since.elapsed() } else { self.waited };
        self.holds.metrics.hold.ends(waited, self.waits);
        self.holds.with(self, |queue| match self.waits {
            true => queue.leaves(self.number),
            false => queue.answered(),
        });
        self.changed.notify_waiters();
        self.holds.lock().give_back(&self.uid, &self.namespace, self.bytes);
    }
}

/// Wakes who is held as the table changes.
pub fn follow(tasks: &mut Tasks, holds: Arc<Holds>) {
    let mut table = holds.table.clone();
    tasks.spawn(async move {
        while table.changed().await.is_ok() {
            holds.see(Instant::now());
        }
        "who is held"
    });
}

#[cfg(test)]
mod tests;
