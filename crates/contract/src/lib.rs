//! What operator, gateway and worker say to each other, and the signed tokens they say it with.
//!
//! The operator (or `lathe run`) writes a [`Contract`] and the worker carries it out; the worker
//! answers with a [`Report`] while it lives and a [`Summary`] as its last words. What a worker
//! says is untrusted: read it only through [`Report::parse`] and [`Summary::parse`].
#![deny(missing_docs)]

mod adapters;
mod curves;
mod identity;
mod keys;
mod report;
mod task;
mod token;
mod traffic;
mod usage;

pub use adapters::{AdapterEntry, AdapterState, AdapterStatus, DesiredAdapters};
pub use curves::{CURVES_PATH, JobCurve, JobCurves, MAX_CURVES, MAX_CURVES_BYTES, MAX_POINTS, thinned};
pub use identity::Identity;
pub use keys::{KeyEntry, KeyEntryError, KeyHash, new_key};
pub use report::{
    CheckDataReport, EvaluateReport, Failure, InspectReport, Load, MAX_REPORT_BYTES, MAX_SUMMARY_BYTES,
    Measured, ModelShapeReport, Outcome, Phase, ReplicaCapacity, Report, ReportError, Score, Summary, Totals,
    TrainProgress, WeightBytes,
};
pub use task::{
    AdapterRoom, CONTRACT_VERSION, CheckDataTask, CheckpointPolicy, Contract, DatasetFormat, DatasetInput,
    EvaluateTask, EvaluationPolicy, Gate, InspectTask, Inspected, LoraSettings, Metric, ModelInput, Mounts,
    ObjectRef, OptimizerState, OutputTarget, Precision, Schedule, ServeTask, ServedAdapter, SourceRef, Task,
    TrainMethod, TrainTask, TrainingSettings, Trust,
};
pub use token::{Claims, Scope, Signer, TOKEN_LIFETIME, TokenError, Verifier};
pub use traffic::{
    Ended, Flow, MAX_REVISION_BYTES, MAX_REVISIONS, MAX_TRAFFIC_BYTES, RevisionOutcome, ServiceTraffic,
    TRAFFIC_AUDIENCE, TRAFFIC_PATH, TRAFFIC_SECONDS, Traffic, TrafficQuery,
};
pub use usage::{USAGE_HEADER, Usage};

/// Where the contract lies in a pod (a ConfigMap mount).
pub const CONTRACT_PATH: &str = "/etc/lathe/contract.json";
/// Kubernetes reads a container's last words from here.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Port on which a worker serves users.
pub const SERVE_PORT: u16 = 8080;
/// Port on which a worker serves probes, metrics and the control channel.
pub const CONTROL_PORT: u16 = 8081;
/// Seconds between SIGTERM and SIGKILL of a pod that trains: room for a checkpoint.
pub const TRAIN_GRACE_SECONDS: u32 = 120;

/// Exit codes of the worker, which the Job's podFailurePolicy tells apart.
pub mod exit {
    /// The task is done.
    pub const SUCCESS: i32 = 0;
    /// Something failed that another try may cure (network, a lost node).
    pub const TRANSIENT: i32 = 1;
    /// The user's input is wrong: trying again cannot help.
    pub const USER: i32 = 64;
    /// Stopped by SIGTERM; the next pod resumes from the last checkpoint.
    pub const STOPPED: i32 = 75;
}
