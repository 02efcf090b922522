//! Who of a service's held requests goes when: first come, first served, and never more at a time than the replicas take.
use std::collections::BTreeSet;
use std::net::SocketAddr;

use tokio::time::Instant;

/// One service's held requests, by their numbers, which grow.
#[derive(Debug, Default)]
pub struct Queue {
    /// Replicas that take requests.
    ready: Vec<SocketAddr>,
    /// Requests that each of them decodes at a time.
    slots: usize,
    waiting: BTreeSet<u64>,
    /// Requests that went and have no answer yet.
    asking: usize,
    /// Until then nobody goes: the last one who did found no room, or nobody.
    paused: Option<Instant>,
    /// The service is no more, or its user wants no replica of it.
    gone: bool,
}

/// What one of them does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It asks one of these.
    Go(Vec<SocketAddr>),
    /// It waits until it is woken, or until then.
    Wait(Option<Instant>),
    /// There is nothing to wait for.
    Gone,
}

impl Queue {
    /// What the cluster says of the service; true: that is news. A replica that comes or goes ends a pause.
    pub fn sees(&mut self, service: Option<(Vec<SocketAddr>, u32)>) -> bool {
        let gone = service.is_none();
        let (ready, slots) = service.unwrap_or_default();
        let slots = slots as usize;
        if (gone, &ready, slots) == (self.gone, &self.ready, self.slots) {
            return false;
        }
        (self.gone, self.ready, self.slots, self.paused) = (gone, ready, slots, None);
        true
    }

    /// One more waits; true: there was none before.
    pub fn joins(&mut self, number: u64) -> bool {
        self.waiting.insert(number) && self.waiting.len() == 1
    }

    /// Whether it is this one's turn. Where it is, it waits no longer.
    pub fn turn(&mut self, number: u64, now: Instant) -> Turn {
        if self.gone {
            return Turn::Gone;
        }
        let free = (self.slots * self.ready.len()).saturating_sub(self.asking);
        if !self.waiting.iter().take(free).any(|first| *first == number) {
            return Turn::Wait(None);
        }
        if let Some(until) = self.paused.filter(|until| now < *until) {
            return Turn::Wait(Some(until));
        }
        self.waiting.remove(&number);
        self.asking += 1;
        Turn::Go(self.ready.clone())
    }

    /// One that went comes back to its place, and nobody goes until then, or until the end of a longer pause.
    pub fn back(&mut self, number: u64, until: Instant) {
        self.asking = self.asking.saturating_sub(1);
        self.paused = self.paused.max(Some(until));
        self.waiting.insert(number);
    }

    /// One that went waits elsewhere: there is room.
    pub fn passes(&mut self) {
        self.asking = self.asking.saturating_sub(1);
    }

    /// One that went has an answer: there is room.
    pub fn answered(&mut self) {
        self.asking = self.asking.saturating_sub(1);
        self.paused = None;
    }

    /// One that waits does so no longer.
    pub fn leaves(&mut self, number: u64) {
        self.waiting.remove(&number);
    }

    /// How many wait.
    pub fn held(&self) -> usize {
        self.waiting.len()
    }
}
