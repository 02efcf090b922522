//! The objects: models, jobs and services of several tenants, as users write them.

use serde_json::{Value, json};

/// Namespaces that they are spread over.
pub const TENANTS: usize = 10;

/// How many of each kind.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// In the order of [`KINDS`].
    pub each: [usize; 3],
}

/// Plural and kind.
pub const KINDS: [(&str, &str); 3] =
    [("models", "Model"), ("finetunejobs", "FineTuneJob"), ("inferenceservices", "InferenceService")];

impl Counts {
    /// Two models in five objects, and as many jobs as services.
    pub fn of(total: usize) -> Self {
        let models = total * 2 / 5;
        let jobs = (total - models) / 2;
        Self { each: [models, jobs, total - models - jobs] }
    }

    /// All of them.
    pub fn total(&self) -> usize {
        self.each.iter().sum()
    }
}

/// The namespace of object `number`.
pub fn tenant(number: usize) -> String {
    format!("tenant-{}", number % TENANTS)
}

/// Object `number` of a kind; it lies in `tenant(number)`.
pub fn object(kind: usize, number: usize, counts: &Counts) -> Value {
    let (_, name) = KINDS[kind];
    // A model of the same tenant.
    let models = counts.each[0] / TENANTS;
    let base = format!("model-{}", number % TENANTS + number / TENANTS % models.max(1) * TENANTS);
    let (own, spec) = match kind {
        0 => (format!("model-{number}"), json!({"source": {"uri": format!("pvc://models/{number}")}})),
        1 => (
            format!("job-{number}"),
            json!({
                "baseModelRef": {"name": base},
                "dataset": {"train": {"uri": "pvc://data/train.jsonl"}, "holdout": "0.05"},
                "accelerator": {"profiles": ["cpu"]},
                "output": {"modelName": format!("tuned-{number}")},
            }),
        ),
        _ => (
            format!("service-{number}"),
            json!({
                "modelRef": {"name": base},
                "serving": {"contextLength": 512},
                "accelerator": {"profiles": ["cpu"]},
                "access": "Direct",
            }),
        ),
    };
    json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": name,
        "metadata": {"name": own, "namespace": tenant(number)}, "spec": spec,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_is_to_a_model_of_the_same_tenant() {
        let counts = Counts::of(500);
        assert_eq!(counts.each, [200, 150, 150]);
        let models: Vec<Value> = (0..200).map(|n| object(0, n, &counts)["metadata"].take()).collect();
        for number in 0..150 {
            for (kind, field) in [(1, "baseModelRef"), (2, "modelRef")] {
                let mut made = object(kind, number, &counts);
                let base = json!({"name": made["spec"][field]["name"].take(), "namespace": made["metadata"]["namespace"].take()});
                assert!(models.contains(&base), "{base}");
            }
        }
    }
}
