//! Objects as they are after rounds of the operator, held against the rules by which others wait for them (kstatus).
use std::collections::BTreeSet;

use lathe_api::kstatus::{Kstatus, kstatus};
use serde_json::{Value, json};

/// Recorded objects of one kind.
pub struct Recorded {
    /// The condition that sums the others up.
    summary: &'static str,
    objects: Vec<(String, Value)>,
}

impl Recorded {
    pub fn new(summary: &'static str) -> Self {
        Self { summary, objects: Vec::new() }
    }

    /// Remembers the object of a moment, also as it is once its spec changed and once it is being deleted.
    pub fn add(&mut self, moment: &str, object: impl serde::Serialize) {
        let object = serde_json::to_value(object).expect("JSON");
        let mut changed = object.clone();
        let generation = object["metadata"]["generation"].as_i64().unwrap_or(1);
        changed["metadata"]["generation"] = json!(generation + 1);
        let mut going = object.clone();
        going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(kstatus(&changed), Kstatus::InProgress, "{moment}, and its spec changed");
        assert_eq!(kstatus(&going), Kstatus::Terminating, "{moment}, and it is being deleted");
        self.objects.push((moment.to_owned(), object));
    }

    /// What kstatus says at each moment must be `expected` there, Current only where the summary is True, and Failed only
    /// where the operator says that a person must act.
    pub fn hold(&self, expected: &[(&str, Kstatus)]) {
        let found: Vec<_> = self.objects.iter().map(|(m, object)| (m.as_str(), kstatus(object))).collect();
        assert_eq!(found, expected);
        for (moment, object) in &self.objects {
            let condition = |type_: &str| {
                let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
                all.into_iter().find(|c| c["type"] == type_).map(|c| c["status"].clone())
            };
            let is_true = |type_: &str| condition(type_) == Some(json!("True"));
            match kstatus(object) {
                Kstatus::Current => assert!(is_true(self.summary), "{moment}: {object:#}"),
                Kstatus::Failed => assert!(is_true("Stalled"), "{moment}: {object:#}"),
                Kstatus::InProgress | Kstatus::Terminating => {}
            }
        }
        // Twice the same would be one recording.
        let distinct: BTreeSet<String> = self.objects.iter().map(|(_, object)| object.to_string()).collect();
        assert!(distinct.len() >= 20, "{} distinct objects", distinct.len());
    }
}
