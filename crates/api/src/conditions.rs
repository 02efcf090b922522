//! Conditions: how they are set, and their schema.
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::{Schema, SchemaGenerator, json_schema};

/// The summary of a service or a model.
pub const READY: &str = "Ready";
/// The summary of a job.
pub const SUCCEEDED: &str = "Succeeded";
/// kstatus: work goes on.
pub const RECONCILING: &str = "Reconciling";
/// kstatus: nothing more will happen without a change by a person.
pub const STALLED: &str = "Stalled";

/// Value of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Not known (yet).
    Unknown,
}

impl State {
    /// As Kubernetes writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            State::True => "True",
            State::False => "False",
            State::Unknown => "Unknown",
        }
    }
}

impl From<bool> for State {
    fn from(holds: bool) -> Self {
        if holds { State::True } else { State::False }
    }
}

/// Sets one condition; the time of its last transition moves only when its status does.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    state: State,
    reason: &str,
    message: &str,
    generation: i64,
    now: Timestamp,
) {
    let fresh = Condition {
        type_: type_.to_owned(),
        status: state.as_str().to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: Some(generation),
        last_transition_time: Time(now),
    };
    match conditions.iter_mut().find(|c| c.type_ == type_) {
        Some(old) if old.status == fresh.status => {
            *old = Condition { last_transition_time: old.last_transition_time.clone(), ..fresh }
        }
        Some(old) => *old = fresh,
        None => conditions.push(fresh),
    }
}

/// The condition of this type, if it is there.
#[must_use]
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// True where the condition is there and `True`.
#[must_use]
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == "True")
}

/// `observedGeneration` of an object that nobody has visited: no generation equals it, so that
/// kstatus calls the object InProgress.
#[must_use]
pub fn unobserved() -> i64 {
    -1
}

/// metav1.Condition with the bounds that its Go type states.
pub(crate) fn schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "description": "One observation.",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": {
                    "type": "string", "maxLength": 316, "description": "What is observed.",
                    "pattern": "^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$"
                },
                "status": {"type": "string", "enum": ["True", "False", "Unknown"], "description": "Whether it holds."},
                "reason": {
                    "type": "string", "minLength": 1, "maxLength": 1024, "description": "One word for programs: why.",
                    "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"
                },
                "message": {"type": "string", "maxLength": 32768, "description": "A sentence for people: the cause and the next step."},
                "lastTransitionTime": {"type": "string", "format": "date-time", "description": "When the status last changed."},
                "observedGeneration": {
                    "type": "integer", "format": "int64", "minimum": 0, "maximum": 9007199254740991_i64,
                    "description": "Generation of the spec that was observed."
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_moves_only_when_the_status_does() {
        let early = Timestamp::from_second(1_000).expect("time");
        let late = Timestamp::from_second(2_000).expect("time");
        let mut conditions = Vec::new();
        set(&mut conditions, READY, State::False, "Waiting", "a", 1, early);
        set(&mut conditions, READY, State::False, "StillWaiting", "b", 2, late);
        let ready = find(&conditions, READY).expect("set");
        assert_eq!((ready.reason.as_str(), ready.message.as_str()), ("StillWaiting", "b"));
        assert_eq!((ready.last_transition_time.0, ready.observed_generation), (early, Some(2)));
        set(&mut conditions, READY, State::True, "Done", "c", 2, late);
        assert_eq!(find(&conditions, READY).expect("set").last_transition_time.0, late);
        assert_eq!(conditions.len(), 1);
    }
}
