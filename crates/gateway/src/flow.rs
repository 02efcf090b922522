//! What flows to each service through this replica of the gateway, second by second, for the operator's leader.
//!
//! Requests count where they are ([`counts`], an addition each); once a second what was counted becomes that second's line
//! ([`seconds`]), beside how many requests stand where, which [`crate::balance`] knows with what replicas say of themselves ([`load`]).
//! [`poll`] tells it. A service without traffic has nothing here.
mod counts;
mod load;
pub mod poll;
mod seconds;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lathe_contract::{
    MAX_REVISIONS, MAX_TRAFFIC_BYTES, ReplicaCapacity, ServiceTraffic, TRAFFIC_SECONDS, Traffic,
};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval_at};

use crate::account::Books;
use crate::hold::Holds;
use crate::table::Table;
use crate::tasks::Tasks;
pub use counts::{Counts, Share};
pub use load::ReplicaLoad;
use seconds::{Seconds, Standing};

const SECOND: Duration = Duration::from_secs(1);
/// Seconds in which what a replica said of itself is told.
const FRESH: u64 = 5;
/// Between two looks for numbers of services that are gone.
const TIDY: Duration = Duration::from_secs(60);
/// Longest JSON of one second, and of a service beside its seconds.
const LINE_BYTES: usize = 192;
const SERVICE_BYTES: usize = 512;
/// Of [`LINE_BYTES`], as many are as long as one second of one revision.
const OUTCOME_LINES: usize = 2;

/// The services that something flows to.
#[derive(Debug)]
pub struct Flows {
    instance: String,
    start: Instant,
    services: Mutex<HashMap<String, Service>>,
    /// The newest second that is over.
    second: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Service {
    counts: Arc<Counts>,
    seconds: Seconds,
    /// What a replica can do, and the second in which one said so.
    capacity: Option<(ReplicaCapacity, u64)>,
}

impl Flows {
    /// From `start` on; no other process has had the name `instance`.
    pub fn new(instance: String, start: Instant) -> Self {
        Self { instance, start, services: Mutex::default(), second: watch::Sender::new(0) }
    }

    /// Where requests to this service count.
    pub fn of(&self, uid: &str) -> Arc<Counts> {
        let mut services = self.lock();
        match services.get(uid) {
            Some(service) => Arc::clone(&service.counts),
            None => Arc::clone(&services.entry(uid.to_owned()).or_default().counts),
        }
    }

    /// Closes the seconds that are over at `now`. How many requests stand where is asked for each service that has any.
    fn close(&self, now: Instant, standing: impl Fn(&str) -> Standing) {
        let second = now.saturating_duration_since(self.start).as_secs();
        let before = *self.second.borrow();
        if second <= before {
            return;
        }
        self.lock().retain(|uid, Service { counts, seconds, capacity }| {
            *capacity = counts.take_capacity().map(|said| (said, second)).or(*capacity);
            seconds.close(before + 1..=second, counts.take(), standing(uid));
            seconds.end(second, counts.take_ended());
            // Requests that are open hold it.
            !seconds.are_silent_after(0) || Arc::strong_count(counts) > 1
        });
        self.second.send_replace(second);
    }

    /// Forgets the services that are not `known`.
    pub fn keep(&self, known: impl Fn(&str) -> bool) {
        self.lock().retain(|uid, _| known(uid));
    }

    /// What happened after the second `after`, beside how many requests are held at this moment, by their services.
    ///
    /// Where that would be longer than a report may be, the oldest seconds are left out, of all services alike.
    fn since(&self, after: u64, held: &HashMap<String, u64>) -> Traffic {
        let services = self.lock();
        let second = *self.second.borrow();
        let compared = services.values().filter(|service| service.seconds.have_outcomes()).count();
        let fits = MAX_TRAFFIC_BYTES / (services.len() + compared * OUTCOME_LINES * MAX_REVISIONS).max(1);
        let fits = (fits.saturating_sub(SERVICE_BYTES) / LINE_BYTES).max(1) as u64;
        let after = after.max(second.saturating_sub(TRAFFIC_SECONDS.min(fits)));
        let told = services.iter().filter_map(|(uid, service)| {
            let held = held.get(uid).copied().unwrap_or_default();
            let silent = service.seconds.are_silent_after(after);
            (held > 0 || !silent).then(|| ServiceTraffic {
                uid: uid.clone(),
                seconds: service.seconds.after(after, second),
                held,
                capacity: service.capacity.filter(|(_, said)| said + FRESH > second).map(|(said, _)| said),
                outcomes: service.seconds.outcomes(after, second),
            })
        });
        Traffic { instance: self.instance.clone(), second, services: told.collect() }
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Service>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Flows {
    /// From now on, under a name of its own.
    fn default() -> Self {
        Self::new(format!("{:032x}", rand::random::<u128>()), tokio::time::Instant::now().into_std())
    }
}

/// Closes every second as soon as it is over.
pub fn follow(
    tasks: &mut Tasks,
    books: Arc<Books>,
    holds: Arc<Holds>,
    table: watch::Receiver<Option<Arc<Table>>>,
) {
    tasks.spawn(async move {
        let mut seconds = interval_at((books.flows.start + SECOND).into(), SECOND);
        seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut tidied = books.flows.start;
        loop {
            let now = seconds.tick().await.max(tokio::time::Instant::now()).into_std();
            let (table, held) = (table.borrow().clone(), holds.held());
            books.flows.close(now, |uid| {
                let slots = table.as_ref().and_then(|t| t.service(uid)).map_or(u32::MAX, |s| s.slots);
                let (running, waiting) = books.balances.of(uid).with(|balance| balance.in_flight(slots, now));
                Standing { running, waiting, held: held.get(uid).copied().unwrap_or_default() }
            });
            if let Some(table) = table.filter(|_| now.saturating_duration_since(tidied) >= TIDY) {
                tidied = now;
                // A request that ends after its service has counted it once more.
                books.metrics.keep(|series| table.get(series.namespace, series.model).is_some());
            }
        }
    });
}

#[cfg(test)]
mod tests;
