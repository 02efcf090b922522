//! Pure: when a write that the API server refused is tried again.
use lathe_scaling::Seconds;

/// Before it is tried a second time.
const SHORTEST: Seconds = 2;
const LONGEST: Seconds = 60;

/// Until a write that was refused is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    length: Seconds,
    until: Seconds,
}

impl Pause {
    /// Once more: with each time it doubles.
    pub fn again(before: Option<Self>, now: Seconds) -> Self {
        let length = before.map_or(SHORTEST, |before| (before.length * 2).min(LONGEST));
        Self { length, until: now.saturating_add(length) }
    }

    /// Whether it lasts.
    pub fn lasts(&self, now: Seconds) -> bool {
        now < self.until
    }
}

/// A number of replicas that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// So many there were to be, where there were so many.
    replicas: i32,
    from: i32,
    /// Before it is tried again.
    pub pause: Pause,
}

impl Refused {
    /// Once more.
    pub fn again(before: Option<Self>, (from, replicas): (i32, i32), now: Seconds) -> Self {
        Self { replicas, from, pause: Pause::again(before.map(|before| before.pause), now) }
    }

    /// Whether so many are not to be tried yet. What refuses many may let fewer through, and what keeps some may let more be added.
    pub fn waits_with(&self, replicas: i32, now: Seconds) -> bool {
        let goes_as_far = match self.replicas >= self.from {
            true => replicas >= self.replicas,
            false => replicas <= self.replicas,
        };
        goes_as_far && self.pause.lasts(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_what_goes_less_far_is_tried_at_once() {
        let mut refused = Refused::again(None, (2, 5), 100);
        let (mut now, mut pauses) = (100, Vec::new());
        for _ in 0..8 {
            let since = now;
            while refused.waits_with(5, now) {
                assert!(refused.waits_with(6, now) && !refused.waits_with(4, now));
                now += 1;
            }
            pauses.push(now - since);
            refused = Refused::again(Some(refused), (2, 5), now);
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60, 60]);
        // Who may not sleep may still be raised.
        let refused = Refused::again(None, (1, 0), 100);
        assert!(refused.waits_with(0, 101) && !refused.waits_with(1, 101) && !refused.waits_with(3, 101));
    }
}
