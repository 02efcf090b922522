//! How many replicas a service should have.
//!
//! **Load** is counted in replicas: 1.0 is what keeps one replica fully busy. Prompt tokens are cheaper than generated ones, and
//! both are done by the same device, so a replica's utilisation is the sum of two shares of what it measured for itself:
//! `prompt tokens/s / capacity.prompt + generated tokens/s / capacity.generation`. A saturated replica shows no more than its
//! capacity, so what arrives is counted too: requests a second times the work of a mean request ([`Memory`]), and requests that
//! wait are work that has to be caught up with. `load.rs` has the formulas.
//!
//! **Up** at once, by a bounded factor, to `load / target`. The number is absolute and not a multiple of what runs, so replicas
//! that were asked for and are not ready yet count as capacity on its way, however long they take. **Down** to the most that was
//! wanted at any second of a whole quiet window; every second of it must have been reported. **To zero** after idle time, and
//! **from zero** by one request that is held.
//!
//! **Restarts.** A decision needs two things: reports of the last two minutes, which every gateway replica keeps and repeats to a
//! leader that asks for them, and [`Memory`], a few numbers that are written to the status with each decision, and at least once
//! in [`REPLAY`] seconds. What happened since they were written is folded in again from the reports, second by second, so that
//! a restarted operator decides as if it had not restarted; where more is missing than reports tell, the quiet window begins anew.
mod load;
mod memory;
mod reason;
mod window;

use serde::{Deserialize, Serialize};

use load::Load;
pub use memory::{MAX_PEAKS, Memory, Peak, REPLAY};
pub use reason::Reason;
pub use window::{Report, Window};

/// Seconds since the Unix epoch by the leader's clock, which may jump.
pub type Seconds = i64;

/// No more than so many times as many replicas are asked for within [`RAISE_SECONDS`].
const RAISE_FACTOR: u32 = 10;
const RAISE_SECONDS: Seconds = 10;
/// A report that is older is late: what happens is not known.
const LATE_AFTER: Seconds = 5;

/// What the user asks for: `spec.autoscaling`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// At least so many; 0: sleep when idle.
    pub min_replicas: u32,
    /// At most so many; where it is below `min_replicas`, that counts.
    pub max_replicas: u32,
    /// Of what one replica measured for itself, 1 to 100.
    pub target_throughput_percent: u32,
    /// Seconds of less load before replicas are given back.
    pub scale_down_after: Seconds,
    /// Idle seconds before the last replica is given back; `None`: never.
    pub scale_to_zero_after: Option<Seconds>,
}

/// The replicas that there are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Replicas {
    /// As many as the Deployment asks for, ready or not.
    pub asked: u32,
    /// Of these, so many take requests.
    pub ready: u32,
    /// Beside these, so many take nothing new and finish what they have.
    pub draining: u32,
    /// Seconds that one took lately from being asked for to its first request; 0: not known.
    pub start_up: Seconds,
    /// What one of them can do; `None`: none was ever measured.
    pub capacity: Option<Capacity>,
}

/// What a replica measured for itself, at saturation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// Prompt tokens a second while it reads prompts alone.
    pub prompt: f64,
    /// Generated tokens a second with as many sequences as it takes.
    pub generation: f64,
    /// Sequences that it decodes at the same time.
    pub sequences: u32,
}

/// What is to be, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Replicas to ask for.
    pub replicas: u32,
    /// For programs.
    pub reason: Reason,
    /// For people, with the numbers.
    pub message: String,
    /// Replicas' worth of work that there is; 0 where no capacity was measured.
    pub load: f64,
    /// To be handed to the next decision.
    pub memory: Memory,
}

/// Decides how many replicas a service should have at `now`, from the reports of its gateways and what is remembered.
///
/// Total: any numbers give a decision within the bounds. Meant to be asked each second or two.
#[must_use]
pub fn decide(
    policy: &Policy,
    window: &Window,
    memory: &Memory,
    replicas: &Replicas,
    now: Seconds,
) -> Decision {
    let mut memory = memory.clone();
    memory.advance(policy, window, replicas, now);
    let load = load::at(window, &memory, replicas, now);
    let (wanted, reason) = choose(policy, &mut memory, replicas, &load, now);
    let times = (now, policy.quiet_window(replicas));
    let message = reason.sentence(policy, &memory, &load, wanted, times);
    Decision { replicas: wanted, reason, message, load: load.total(), memory }
}

fn choose(
    policy: &Policy,
    memory: &mut Memory,
    replicas: &Replicas,
    load: &Load,
    now: Seconds,
) -> (u32, Reason) {
    let &Replicas { asked, draining, .. } = replicas;
    let (min, max) = policy.bounds();
    if asked < policy.min_replicas {
        return (policy.min_replicas, Reason::MinReplicas);
    }
    if asked > max {
        return (max, Reason::MaxReplicas);
    }
    if load.is_late(now) {
        return (asked, Reason::ReportsLate);
    }
    if asked == 0 {
        if !load.is_awake() {
            return (0, Reason::ScaledToZero);
        }
        // What is held is load, and waking is raising: those that come next are bounded by where it began.
        let most = memory.raise(asked, now).min(max);
        return (load.wanted(policy).unwrap_or(1).clamp(1, most), Reason::RequestHeld);
    }
    let Some(wanted) = load.wanted(policy) else {
        return match memory.is_idle(policy, now) {
            _ if load.missing => (asked, Reason::ReportsMissing),
            true if draining > 0 => (asked, Reason::ReplicasDraining),
            true => (0, Reason::ScaledToZero),
            false => (asked, Reason::CapacityUnknown),
        };
    };
    if wanted > asked {
        let most = memory.raise(asked, now).min(max);
        let reason = if wanted > max { Reason::MaxReplicas } else { load.why(policy) };
        return (wanted.min(most).max(asked), reason);
    }
    if load.missing {
        return (asked, Reason::ReportsMissing);
    }
    let quiet = memory.most_wanted().max(load.least(replicas)).max(min);
    if memory.is_idle(policy, now) && draining == 0 {
        return (0, Reason::ScaledToZero);
    }
    if quiet >= asked {
        let starting = replicas.ready < asked;
        return (asked, if starting { Reason::ReplicasStarting } else { Reason::OnTarget });
    }
    if !memory.reported_for(policy.quiet_window(replicas), now) {
        return (asked, Reason::QuietWindow);
    }
    if draining > 0 {
        return (asked, Reason::ReplicasDraining);
    }
    (quiet, Reason::ThroughputBelowTarget)
}

impl Policy {
    /// The least and the most replicas of a service that does not sleep.
    fn bounds(&self) -> (u32, u32) {
        let min = self.min_replicas.max(1);
        (min, self.max_replicas.max(min))
    }

    /// Seconds of less load before replicas are given back: no fewer than it takes to get one.
    fn quiet_window(&self, replicas: &Replicas) -> Seconds {
        self.scale_down_after.max(replicas.start_up).max(1)
    }

    /// The target as a share.
    fn target(&self) -> f64 {
        f64::from(self.target_throughput_percent.clamp(1, 100)) / 100.0
    }
}

#[cfg(test)]
mod tests;
