//! Pure: when a write that the API server refused is tried again.
use lathe_scaling::Seconds;

/// Before it is tried a second time.
const SHORTEST: Seconds = 2;
const LONGEST: Seconds = 60;

/// A write that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// It would have set so many replicas.
    replicas: i32,
    pause: Seconds,
    /// Then it is tried again.
    until: Seconds,
}

impl Refused {
    /// Once more: with each time the pause doubles.
    pub fn again(before: Option<Self>, replicas: i32, now: Seconds) -> Self {
        let pause = before.map_or(SHORTEST, |before| (before.pause * 2).min(LONGEST));
        Self { replicas, pause, until: now.saturating_add(pause) }
    }

    /// Whether so many are not to be tried yet. What refuses many may let fewer through.
    pub fn waits(&self, replicas: i32, now: Seconds) -> bool {
        replicas >= self.replicas && now < self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_fewer_are_tried_at_once() {
        let mut refused = Refused::again(None, 5, 100);
        let (mut now, mut pauses) = (100, Vec::new());
        for _ in 0..8 {
            let since = now;
            while refused.waits(5, now) {
                assert!(refused.waits(6, now) && !refused.waits(4, now));
                now += 1;
            }
            pauses.push(now - since);
            refused = Refused::again(Some(refused), 5, now);
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60, 60]);
    }
}
