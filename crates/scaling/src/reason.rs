//! Why a number of replicas was decided, for programs and for people.
use super::{Load, Memory, Policy, Seconds};

/// Why there are to be as many replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// As many as the load needs.
    OnTarget,
    /// More tokens than the target.
    ThroughputAboveTarget,
    /// Requests wait that the replicas would take too long to catch up with.
    RequestsWaiting,
    /// A request is held at zero.
    RequestHeld,
    /// What the load needs was asked for and is not ready yet.
    ReplicasStarting,
    /// Fewer would do; the quiet window is not over.
    QuietWindow,
    /// Fewer would do; those of the last step down still finish their answers.
    ReplicasDraining,
    /// Fewer did for a whole quiet window.
    ThroughputBelowTarget,
    /// Nothing to do for long enough.
    ScaledToZero,
    /// `minReplicas` asks for more.
    MinReplicas,
    /// `maxReplicas` allows no more.
    MaxReplicas,
    /// Nothing was heard lately.
    ReportsLate,
    /// A gateway did not report.
    ReportsMissing,
    /// No replica has measured itself yet.
    CapacityUnknown,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::OnTarget,
        Self::ThroughputAboveTarget,
        Self::RequestsWaiting,
        Self::RequestHeld,
        Self::ReplicasStarting,
        Self::QuietWindow,
        Self::ReplicasDraining,
        Self::ThroughputBelowTarget,
        Self::ScaledToZero,
        Self::MinReplicas,
        Self::MaxReplicas,
        Self::ReportsLate,
        Self::ReportsMissing,
        Self::CapacityUnknown,
    ];

    /// CamelCase, as status has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OnTarget => "OnTarget",
            Self::ThroughputAboveTarget => "ThroughputAboveTarget",
            Self::RequestsWaiting => "RequestsWaiting",
            Self::RequestHeld => "RequestHeld",
            Self::ReplicasStarting => "ReplicasStarting",
            Self::QuietWindow => "QuietWindow",
            Self::ReplicasDraining => "ReplicasDraining",
            Self::ThroughputBelowTarget => "ThroughputBelowTarget",
            Self::ScaledToZero => "ScaledToZero",
            Self::MinReplicas => "MinReplicas",
            Self::MaxReplicas => "MaxReplicas",
            Self::ReportsLate => "ReportsLate",
            Self::ReportsMissing => "ReportsMissing",
            Self::CapacityUnknown => "CapacityUnknown",
        }
    }

    /// One sentence with the numbers.
    pub(super) fn sentence(
        self,
        policy: &Policy,
        memory: &Memory,
        load: &Load,
        replicas: u32,
        (now, quiet): (Seconds, Seconds),
    ) -> String {
        let newest = load.newest.unwrap_or_default();
        let load_words = format!(
            "the load is {:.2} replicas' worth ({:.1} requests/s come, {:.0} prompt and {:.0} generated tokens/s flow, {:.0} wait)",
            load.total(),
            load.arriving,
            newest.prompt,
            newest.generation,
            newest.waiting + newest.held,
        );
        let percent = policy.target_throughput_percent;
        let least = memory.most_wanted();
        let idle = now.saturating_sub(memory.busy);
        let wanted = some(replicas, "replica");
        match self {
            Self::OnTarget => format!("{load_words}: {wanted} for {percent} % or less"),
            Self::ThroughputAboveTarget => format!("{load_words}: {wanted} for {percent} %"),
            Self::RequestsWaiting => format!("{load_words}: {wanted} to catch up with what waits"),
            Self::RequestHeld => {
                let held = some(load.in_flight().round() as u32, "request");
                format!("{held} held while no replica runs: {wanted} asked for")
            }
            Self::ReplicasStarting => format!("{load_words}: {wanted} asked for, of which some start"),
            Self::QuietWindow => {
                format!("{load_words}: {wanted} until fewer have done for {quiet} s")
            },
            Self::ReplicasDraining => {
                format!("{load_words}: {wanted} until those that were given back have drained")
            }
            Self::ThroughputBelowTarget => {
                format!("{load_words}: no second of the last {quiet} s needed more than {least}")
            },
            Self::ScaledToZero => format!("nothing to do for {idle} s: the next request wakes a replica"),
            Self::MinReplicas => format!("`minReplicas` asks for {replicas}"),
            Self::MaxReplicas => format!("{load_words}: `maxReplicas` allows no more than {replicas}"),
            Self::ReportsLate => match load.newest {
                Some(newest) => format!(
                    "no gateway has reported for {} s: the replicas stay as they are. Next: look at the gateways' pods",
                    now.saturating_sub(newest.at)
                ),
                None => "no gateway has reported yet: the replicas stay as they are. Next: look at the gateways' pods"
                    .to_owned(),
            },
            Self::ReportsMissing => format!(
                "{} did not report: no replica is given back. Next: look at the gateways' pods",
                some(newest.missing, "gateway")
            ),
            Self::CapacityUnknown => {
                "no replica has measured its throughput yet: the replicas stay as they are".to_owned()
            }
        }
    }
}

fn some(number: u32, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    }
}
