//! How often what the page shows may be asked for with one key. Pure, clock as argument.
//!
//! It takes none of the key's minute, which is for models: a page that stands open would use it up. But the answer is made anew each
//! time, of all that the key may see, so no key may ask for it as fast as it can.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Looks of one key in a minute: a page looks thirty times.
pub const A_MINUTE: u32 = 600;
/// So many may come at once.
const BURST: u32 = 60;
/// Keys that are remembered although they may have asked for nothing lately.
const KEPT: usize = 1000;

/// When the looks of each key are all paid for.
#[derive(Debug, Default)]
pub struct Looks(Mutex<HashMap<Arc<str>, Instant>>);

impl Looks {
    /// One more at `now`.
    ///
    /// # Errors
    /// How long it is too early.
    pub fn look(&self, key: &Arc<str>, now: Instant) -> Result<(), Duration> {
        let each = Duration::from_secs(60) / A_MINUTE;
        let mut paid = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if paid.len() >= KEPT {
            paid.retain(|_, at| *at > now);
        }
        let at = paid.get(key).map_or(now, |at| (*at).max(now)) + each;
        let early = at.saturating_duration_since(now + each * BURST);
        if !early.is_zero() {
            return Err(early);
        }
        paid.insert(Arc::clone(key), at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_its_own_looks_and_they_come_back() {
        let (looks, now) = (Looks::default(), Instant::now());
        let (key, other) = (Arc::from("k"), Arc::from("other"));
        let taken = |at: Instant| (0..1000).take_while(|_| looks.look(&key, at).is_ok()).count();
        assert_eq!(taken(now), 60);
        assert_eq!(looks.look(&key, now), Err(Duration::from_millis(100)));
        assert_eq!(looks.look(&other, now), Ok(()));
        // Ten a second, however often more is asked for.
        assert_eq!(taken(now + Duration::from_secs(3)), 30);
        assert_eq!(taken(now + Duration::from_secs(3600)), 60);
    }

    #[test]
    fn keys_that_rest_take_no_room() {
        let (looks, now) = (Looks::default(), Instant::now());
        for key in 0..5000 {
            let later = now + Duration::from_secs(key);
            assert_eq!(looks.look(&Arc::from(key.to_string()), later), Ok(()));
        }
        assert!(looks.0.lock().unwrap().len() <= KEPT);
    }
}
