//! Lathe itself: the function that the operator calls, asked each second.
use lathe_scaling::{self as scaling, Decision, Memory, Policy, Replicas, Window};

use super::{Scaler, Seen};

/// [`scaling::decide`] and what it remembers.
#[derive(Debug)]
pub struct Lathe {
    policy: Policy,
    window: Window,
    memory: Memory,
}

impl Lathe {
    /// With this policy.
    pub fn new(policy: Policy) -> Self {
        Self { policy, window: Window::default(), memory: Memory::default() }
    }
}

/// What a spec has that says nothing: 0 to 100 replicas, 70 %, 5 and 15 minutes.
pub const DEFAULTS: Policy = Policy {
    min_replicas: 0,
    max_replicas: 100,
    target_throughput_percent: 70,
    scale_down_after: 300,
    scale_to_zero_after: Some(900),
};

impl Scaler for Lathe {
    fn second(&mut self, seen: &Seen<'_>) -> u32 {
        self.window.push(seen.report);
        let replicas = Replicas {
            asked: seen.asked,
            ready: seen.ready.len() as u32,
            draining: seen.draining,
            start_up: seen.start_up,
            capacity: Some(seen.capacity),
        };
        let decision = scaling::decide(&self.policy, &self.window, &self.memory, &replicas, seen.now);
        let Decision { replicas, memory, .. } = decision;
        self.memory = memory;
        replicas
    }
}
