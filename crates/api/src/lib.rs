//! Custom resource types of `lathe.dev/v1alpha1`, their CEL rules, condition helpers and names.
//!
//! The schema is the first line of defence and the documentation: every field has a description,
//! every string, list and number has bounds, defaults are stated there and nowhere else.
#![deny(missing_docs)]
// Columns of one kind share values; clippy takes them for repeated attributes.
#![allow(clippy::duplicated_attributes)]

mod accelerator;
pub mod conditions;
pub mod crds;
mod finetune;
mod inference;
pub mod kstatus;
mod model;
pub mod names;
mod pod;
mod scalar;
mod text;
mod wording;

pub use accelerator::{
    AcceleratorProfile, AcceleratorProfileSpec, NodeSelectorOperator, NodeSelectorRequirement,
    NodeSelectorTerm, Price, Runtime,
};
pub use finetune::{
    AcceleratorRequest, AcceleratorStrategy, BasePrecision, Budget, CapacityType, CheckpointSpec,
    CheckpointStatus, DatasetSpec, EvaluationSpec, FineTuneJob, FineTuneJobSpec, FineTuneJobStatus,
    FullTrainable, LoraTrainable, Objective, OutputSpec, ProgressStatus, RestartStatus, Supervised,
    Trainable, TrainingSpec,
};
pub use inference::{
    Access, Autoscaling, CapacityStatus, CountedStatus, DecisionStatus, EndedStatus, InferenceService,
    InferenceServiceSpec, InferenceServiceStatus, MAX_COUNTED, MAX_DECISION_MESSAGE, MAX_DECISIONS,
    MAX_REPLICAS, MAX_ROLLOUT_MESSAGE, MAX_SCALING_MESSAGE, RevisionsStatus, Rollout, RolloutGate,
    RolloutMetric, RolloutPhase, RolloutStatus, RolloutStep, RolloutStrategy, ScalingBlock, ScalingMemory,
    ScalingPeak, ScalingStatus, ServeAccelerator, ServingSpec, ThroughputStatus, WeightPrecision,
};
pub use model::{
    DerivedFrom, LicenseSpec, Model, ModelSpec, ModelStatus, ReclaimPolicy, ScoreStatus, ShapeStatus,
    WeightStatus,
};
pub use pod::{EnvVar, PodOverrides, Toleration, TolerationEffect, TolerationOperator};
pub use scalar::{
    DatasetFormat, Decimal, Duration, Gate, Location, Metric, NameRef, PlanLine, PlanStatus, Quantity,
    Schedule,
};

pub use text::cut;

/// API group of every kind.
pub const GROUP: &str = "lathe.dev";
/// API version of every kind.
pub const VERSION: &str = "v1alpha1";
