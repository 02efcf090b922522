//! What is counted of one service since its last second was closed: additions alone, by whoever answers a request.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use lathe_contract::{Ended, MAX_REVISIONS, ReplicaCapacity, Usage};

use super::seconds::Counted;

/// One service's.
#[derive(Debug, Default)]
pub struct Counts {
    arrived: AtomicU64,
    finished: AtomicU64,
    /// Less than nothing where an estimate was too high.
    prompt: AtomicI64,
    generation: AtomicI64,
    capacity: Mutex<Option<ReplicaCapacity>>,
    /// How requests ended, by revision: empty unless two are compared.
    ended: Mutex<BTreeMap<String, Ended>>,
}

impl Counts {
    /// What was counted; from here on it is counted anew.
    pub fn take(&self) -> Counted {
        Counted {
            arrived: self.arrived.swap(0, Relaxed),
            finished: self.finished.swap(0, Relaxed),
            prompt: self.prompt.swap(0, Relaxed),
            generation: self.generation.swap(0, Relaxed),
        }
    }

    /// How requests ended since this was asked last, by revision.
    pub fn take_ended(&self) -> BTreeMap<String, Ended> {
        std::mem::take(&mut self.ended.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What a replica said that it can do, since this was asked last.
    pub fn take_capacity(&self) -> Option<ReplicaCapacity> {
        self.capacity.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What a replica said that it can do.
    pub fn can(&self, capacity: ReplicaCapacity) {
        *self.capacity.lock().unwrap_or_else(PoisonError::into_inner) = Some(capacity);
    }
}

/// One request's share: it arrived when this was made, and has finished when it is dropped.
#[derive(Debug)]
pub struct Share {
    counts: Arc<Counts>,
    told: Usage,
}

impl Share {
    /// A request is here.
    pub fn of(counts: Arc<Counts>) -> Self {
        counts.arrived.fetch_add(1, Relaxed);
        Self { counts, told: Usage::default() }
    }

    /// It has taken so many tokens until now, more or fewer than was thought before.
    pub fn took(&mut self, usage: Usage) {
        let more = |now: u64, before: u64| now as i64 - before as i64;
        self.counts.prompt.fetch_add(more(usage.read(), self.told.read()), Relaxed);
        self.counts.generation.fetch_add(more(usage.completion, self.told.completion), Relaxed);
        self.told = usage;
    }

    /// It has ended at a replica of this revision, perhaps to go on at another.
    pub fn ended(&self, revision: &str, ended: Ended) {
        let mut all = self.counts.ended.lock().unwrap_or_else(PoisonError::into_inner);
        // More of them there are only where the candidate changes again and again within one second.
        if all.len() < MAX_REVISIONS || all.contains_key(revision) {
            let sum = all.entry(revision.to_owned()).or_default();
            *sum = sum.and(ended);
        }
    }

    /// A replica said what it can do.
    pub fn hears(&self, capacity: ReplicaCapacity) {
        self.counts.can(capacity);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.told != Usage::default() {
            self.counts.finished.fetch_add(1, Relaxed);
        }
    }
}
