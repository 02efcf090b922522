//! Adapters added to and removed from a running service (`PUT /v1/adapters` on the control port).
use serde::{Deserialize, Serialize};

use crate::ServedAdapter;

/// The whole set that a replica should hold; what is missing is loaded, what is surplus drains and goes.
///
/// A newer operator says it to workers of earlier releases, who pass over a field that they do not know: here and in all that it
/// holds, a new field must be one that may be passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DesiredAdapters {
    /// At most 64.
    pub adapters: Vec<ServedAdapter>,
}

/// What a replica says of each adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AdapterStatus {
    /// One entry an adapter.
    pub adapters: Vec<AdapterEntry>,
}

/// One adapter on one replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdapterEntry {
    /// Model id.
    pub model_id: String,
    /// Whether it answers.
    pub state: AdapterState,
    /// Why not, where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Where an adapter stands on a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdapterState {
    /// Being read.
    Loading,
    /// Answers.
    Ready,
    /// Could not be loaded; the message says why.
    Failed,
    /// Answers those who are waiting and takes nothing new.
    Draining,
}
