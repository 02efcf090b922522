//! Who is let in: a bounded number of requests, judged before anything is read of them.
use std::sync::Arc;

use tokio::sync::watch;

use super::error::ApiError;
use super::load::LoadMeter;

/// Counts the requests that are in the engine or on their way to it.
#[derive(Debug)]
pub struct Door {
    slots: usize,
    limit: usize,
    inside: watch::Sender<usize>,
    closed: std::sync::atomic::AtomicBool,
    load: Arc<LoadMeter>,
}

/// A request's right to be in the engine; given back when it is dropped.
#[derive(Debug)]
pub struct Place(Arc<Door>);

impl Door {
    /// Lets `slots` requests in to be decoded and `waiting` more to wait.
    pub fn new(slots: usize, waiting: usize, load: Arc<LoadMeter>) -> Arc<Self> {
        let (inside, _) = watch::channel(0);
        Arc::new(Door { slots, limit: slots + waiting, inside, closed: false.into(), load })
    }

    /// Whether a request would be let in now: to refuse it before its body is read. One that is refused for want of room
    /// is counted in the load, here or by [`Door::enter`], as every other one is between its place and that place's end.
    ///
    /// # Errors
    /// 429 where all places are taken, 503 where the replica shuts down.
    pub fn check(&self) -> Result<(), ApiError> {
        self.refuse_where(*self.inside.borrow() >= self.limit)
    }

    /// Takes a place.
    ///
    /// # Errors
    /// As [`Door::check`].
    pub fn enter(self: &Arc<Self>) -> Result<Place, ApiError> {
        let entered = self.inside.send_if_modified(|inside| {
            let free = *inside < self.limit;
            *inside += usize::from(free);
            free
        });
        // From here on the place is given back, also where the door has closed meanwhile.
        let place = entered.then(|| {
            self.load.arrived();
            Place(Arc::clone(self))
        });
        self.refuse_where(place.is_none())?;
        place.ok_or_else(ApiError::internal)
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        self.closed.store(true, std::sync::atomic::Ordering::Release);
    }

    /// Waits until nobody is inside.
    pub async fn empty(&self) {
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.inside.subscribe().wait_for(|inside| *inside == 0).await;
    }

    fn refuse_where(&self, full: bool) -> Result<(), ApiError> {
        if self.closed.load(std::sync::atomic::Ordering::Acquire) {
            return Err(ApiError::unavailable("shutting_down", "This replica is shutting down; ask again."));
        }
        if full {
            self.load.arrived();
            let inside = *self.inside.borrow();
            let after = self.load.retry_after(inside, self.slots);
            return Err(ApiError::queue_full(inside, self.limit, after));
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.load.finished();
        self.0.inside.send_modify(|inside| *inside -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn door(slots: usize, waiting: usize) -> Arc<Door> {
        Door::new(slots, waiting, Arc::new(LoadMeter::new(Instant::now())))
    }

    #[test]
    fn one_more_than_the_limit_is_sent_away_and_a_freed_place_is_taken() {
        let door = door(1, 1);
        let first = door.enter().expect("free");
        let _second = door.enter().expect("free");
        let refused = door.enter().expect_err("full");
        assert_eq!((refused.status.as_u16(), refused.retry_after), (429, Some(2)));
        assert_eq!(door.check(), Err(refused));
        let totals = || door.load.read(Instant::now()).totals;
        assert_eq!((totals().arrived, totals().finished), (4, 0));
        drop(first);
        assert!(door.check().is_ok());
        assert!(door.enter().is_ok());
        assert_eq!((totals().arrived, totals().finished), (5, 2));
    }

    #[tokio::test]
    async fn a_closed_door_lets_out_alone() {
        let door = door(2, 0);
        let place = door.enter().expect("free");
        door.close();
        assert_eq!(door.enter().expect_err("closed").status.as_u16(), 503);
        let waiting = tokio::spawn({
            let door = Arc::clone(&door);
            async move { door.empty().await }
        });
        drop(place);
        waiting.await.expect("no panic");
    }
}
