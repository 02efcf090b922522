//! What is held at a time, in all and of one key: requests, and memory for their bodies. No key can take everybody's.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::ApiError;

/// Bodies that are held at a time, in KiB.
const BODIES: Bound = Bound { all: 256 << 10, key: 64 << 10 };

/// The gateway's places.
#[derive(Debug)]
pub struct Places {
    requests: Bound,
    bodies: Bound,
    held: Mutex<Held>,
}

#[derive(Clone, Copy, Debug)]
struct Bound {
    all: usize,
    key: usize,
}

#[derive(Debug, Default)]
struct Held {
    all: Amount,
    /// Of the keys that hold anything.
    keys: HashMap<Arc<str>, Amount>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Amount {
    requests: usize,
    kib: usize,
}

/// A request's right to be answered; given back when it is dropped.
#[derive(Debug)]
pub struct Place(Share);

/// A body's memory; given back when it is dropped.
#[derive(Debug)]
pub struct Room {
    share: Share,
    kib: usize,
}

#[derive(Clone, Debug)]
struct Share {
    places: Arc<Places>,
    /// `None`: of everybody, who has no share of its own.
    key: Option<Arc<str>>,
}

impl Places {
    /// For `requests` at a time, `per_key` of one key.
    pub fn new(requests: usize, per_key: usize) -> Arc<Self> {
        let requests = Bound { all: requests, key: per_key };
        Arc::new(Self { requests, bodies: BODIES, held: Mutex::default() })
    }

    /// A request's place, and room for its body, which is none yet. Without a `key` only what all hold is bounded.
    ///
    /// # Errors
    /// 429 that says which bound is reached.
    pub fn enter(self: &Arc<Self>, key: Option<&Arc<str>>) -> Result<(Place, Room), ApiError> {
        let share = Share { places: Arc::clone(self), key: key.cloned() };
        share
            .change(|amount| amount.requests += 1, |amount| amount.requests, self.requests)
            .map_err(|of| of.error(&format!("{} requests at a time", of.limit(self.requests))))?;
        Ok((Place(share.clone()), Room { share, kib: 0 }))
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn held_kib(&self) -> usize {
        self.lock().all.kib
    }

    #[cfg(test)]
    pub fn are_free(&self) -> bool {
        let held = self.lock();
        held.all == Amount::default() && held.keys.is_empty()
    }
}

impl Room {
    /// Makes it as large as `bytes`, more or less than it was.
    ///
    /// # Errors
    /// 429 that says which bound is reached; it stays as it was.
    pub fn hold(&mut self, bytes: usize) -> Result<(), ApiError> {
        let (before, kib, bound) = (self.kib, bytes.div_ceil(1 << 10), self.share.places.bodies);
        if kib <= before {
            self.share.give_back(|amount| amount.kib -= before - kib);
        } else {
            self.share.change(|amount| amount.kib += kib - before, |amount| amount.kib, bound).map_err(
                |of| of.error(&format!("{} MiB of request bodies at a time", of.limit(bound) >> 10)),
            )?;
        }
        self.kib = kib;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.give_back(|amount| amount.requests -= 1);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let kib = self.kib;
        self.share.give_back(|amount| amount.kib -= kib);
    }
}

/// Whose bound is reached.
#[derive(Clone, Copy)]
enum Whose {
    All,
    Key,
}

impl Whose {
    fn limit(self, bound: Bound) -> usize {
        match self {
            Whose::All => bound.all,
            Whose::Key => bound.key,
        }
    }

    fn error(self, what: &str) -> ApiError {
        match self {
            Whose::All => ApiError::overloaded(what),
            Whose::Key => ApiError::share_used(what),
        }
    }
}

impl Share {
    fn change(
        &self,
        takes: impl Fn(&mut Amount),
        counted: impl Fn(&Amount) -> usize,
        bound: Bound,
    ) -> Result<(), Whose> {
        let mut held = self.places.lock();
        let taken = |before: Amount| {
            let mut after = before;
            takes(&mut after);
            after
        };
        let own = self.key.as_ref().map(|key| taken(held.keys.get(key).copied().unwrap_or_default()));
        if own.is_some_and(|own| counted(&own) > bound.key) {
            return Err(Whose::Key);
        }
        let all = taken(held.all);
        if counted(&all) > bound.all {
            return Err(Whose::All);
        }
        held.all = all;
        if let (Some(key), Some(own)) = (&self.key, own) {
            held.keys.insert(Arc::clone(key), own);
        }
        Ok(())
    }

    fn give_back(&self, gives: impl Fn(&mut Amount)) {
        let mut held = self.places.lock();
        gives(&mut held.all);
        let Some(key) = &self.key else { return };
        if let Some(own) = held.keys.get_mut(key) {
            gives(own);
            if *own == Amount::default() {
                held.keys.remove(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code<T>(taken: Result<T, ApiError>) -> &'static str {
        taken.err().map_or("", |error| error.code)
    }

    #[test]
    fn a_key_takes_its_share_and_leaves_the_others_theirs() {
        let (places, [a, b]) = (Places::new(3, 2), ["a", "b"].map(Arc::<str>::from));
        let held = [places.enter(Some(&a)).unwrap(), places.enter(Some(&a)).unwrap()];
        let refused = places.enter(Some(&a)).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code), (429, "rate_limit_exceeded"));
        assert!(refused.message.contains("its share: 2 requests at a time"), "{}", refused.message);
        let other = places.enter(Some(&b)).unwrap();
        assert_eq!(code(places.enter(Some(&b))), "overloaded");
        drop(held);
        places.enter(Some(&a)).unwrap();
        drop(other);
        assert!(places.are_free());
        // Without keys there is nobody to share with.
        let all = [(); 3].map(|()| places.enter(None).unwrap());
        assert_eq!(code(places.enter(None)), "overloaded");
        drop(all);
        assert!(places.are_free());
    }

    #[test]
    fn a_body_holds_what_it_is_long_and_one_key_a_quarter_of_all() {
        let (places, keys) = (Places::new(100, 100), ["a", "b", "c", "d", "e"].map(Arc::<str>::from));
        let mut held = Vec::new();
        for key in &keys[..4] {
            let (place, mut room) = places.enter(Some(key)).unwrap();
            room.hold(64 << 20).unwrap();
            let (_, mut more) = places.enter(Some(key)).unwrap();
            let refused = more.hold(1).unwrap_err();
            assert!(refused.message.contains("64 MiB of request bodies"), "{}", refused.message);
            held.push((place, room));
        }
        let (_place, mut room) = places.enter(Some(&keys[4])).unwrap();
        assert_eq!(code(room.hold(1)), "overloaded");
        // What a body turned out not to need is another's.
        held[0].1.hold(10).unwrap();
        room.hold(63 << 20).unwrap();
        drop((held, room, _place));
        assert!(places.are_free());
    }
}
