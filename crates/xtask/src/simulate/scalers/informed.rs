//! A reference and no scaler: it knows at every second what is expected to come in that second, which nobody can, but not what
//! will come. What waits it counts as the others do.
use super::{CATCH_UP, Means, Scaler, Seen};

/// Asks at once for what the load needs, and gives back what was not needed for a whole window.
#[derive(Debug)]
pub struct Informed {
    target: f64,
    loads: Means,
}

impl Informed {
    /// With this share of the capacity as its target, and seconds before it goes down.
    pub fn new(target: f64, window: usize) -> Self {
        Self { target, loads: Means::new(window) }
    }
}

impl Scaler for Informed {
    fn second(&mut self, seen: &Seen<'_>) -> u32 {
        let waits = seen.report.waiting + seen.report.held;
        self.loads.push(seen.load + waits * seen.work / CATCH_UP);
        (self.loads.most() / self.target - 1e-9).ceil() as u32
    }
}
