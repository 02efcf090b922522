//! What flows through the gateways, for whoever decides: one ledger for all scopes, and the leader's clock.
use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use lathe_contract::Traffic as Answer;
use lathe_scaling::Seconds;
use tokio::{sync::watch, time::Instant};

use super::{gateway::Millis, ledger::Ledger};

/// A leader waits for the first words of its gateways and of workers for no longer.
pub const SETTLES: Seconds = 5;

/// What flows through the gateways.
pub struct Traffic {
    ledger: Mutex<Ledger>,
    /// Counts when a request begins to be held.
    held: watch::Sender<u64>,
    clock: Clock,
}

/// The time of day as it was at the start, and what went by since then: nobody sets it.
#[derive(Clone, Copy, Debug)]
struct Clock {
    millis: Millis,
    since: Instant,
}

impl Default for Traffic {
    fn default() -> Self {
        let clock = Clock { millis: Timestamp::now().as_millisecond(), since: Instant::now() };
        Self { ledger: Mutex::default(), held: watch::Sender::new(0), clock }
    }
}

impl Traffic {
    /// Takes a gateway's answer that came now.
    pub fn hear(&self, pod: &str, answer: Answer) {
        if self.ledger().hear(pod, answer, self.millis()) {
            self.held.send_modify(|times| *times = times.wrapping_add(1));
        }
    }

    /// Whether it is known what flowed before this leader came, or who does not tell it is not waited for any longer: a decision before
    /// that would take what is not told yet for what nobody knows.
    pub fn is_settled(&self) -> bool {
        self.clock.since.elapsed().as_secs() >= SETTLES.unsigned_abs() || self.ledger().is_heard()
    }

    /// Turns when a request begins to be held for a service that had none.
    pub fn holds(&self) -> watch::Receiver<u64> {
        self.held.subscribe()
    }

    /// Services for which a request is held.
    pub fn held(&self) -> HashSet<String> {
        self.ledger().held()
    }

    /// What the gateways told.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The second of now, by the leader's clock.
    pub fn now(&self) -> Seconds {
        self.millis().div_euclid(1000)
    }

    fn millis(&self) -> Millis {
        let since = i64::try_from(self.clock.since.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.clock.millis.saturating_add(since)
    }
}
