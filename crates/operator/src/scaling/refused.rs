//! Pure: when a write that the API server refused is tried again.
use lathe_scaling::Seconds;

/// Before it is tried a second time.
const SHORTEST: Seconds = 2;
const LONGEST: Seconds = 60;

/// A write that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// It would have set so many replicas, where there were so many.
    replicas: i32,
    from: i32,
    pause: Seconds,
    /// Then it is tried again.
    until: Seconds,
}

impl Refused {
    /// Once more: with each time the pause doubles.
    pub fn again(before: Option<Self>, (from, replicas): (i32, i32), now: Seconds) -> Self {
        let pause = before.map_or(SHORTEST, |before| (before.pause * 2).min(LONGEST));
        Self { replicas, from, pause, until: now.saturating_add(pause) }
    }

    /// Whether so many are not to be tried yet. What refuses many may let fewer through, and what keeps some may let more be added.
    pub fn waits_with(&self, replicas: i32, now: Seconds) -> bool {
        let goes_as_far = match self.replicas >= self.from {
            true => replicas >= self.replicas,
            false => replicas <= self.replicas,
        };
        goes_as_far && self.waits(now)
    }

    /// Whether its pause lasts.
    pub fn waits(&self, now: Seconds) -> bool {
        now < self.until
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
