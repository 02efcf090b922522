//! Which job comes first: one that makes a Model goes before those that start from it.
use lathe_api::{FineTuneJob, Model};

use crate::failure::{Done, Problem};

/// The jobs in an order in which each finds its base, otherwise as they are written.
///
/// # Errors
/// Jobs wait for each other in a circle, two make the same Model, or one makes a Model that is there.
pub fn order(mut jobs: Vec<FineTuneJob>, there: &[Model]) -> Done<Vec<FineTuneJob>> {
    for (index, job) in jobs.iter().enumerate() {
        let makes = &job.spec.output.model_name;
        if there.iter().any(|model| model.metadata.name.as_ref() == Some(makes)) {
            let message = format!(
                "FineTuneJob {}: Model {makes} is in the manifests already. Next: remove it, or choose another `output.modelName`.",
                name(job)
            );
            return Err(Problem::user("OutputExists", message));
        }
        if let Some(other) = jobs.iter().take(index).find(|other| other.spec.output.model_name == *makes) {
            let message = format!(
                "FineTuneJobs {} and {} both make Model {makes}. Next: give one another `output.modelName`.",
                name(other),
                name(job)
            );
            return Err(Problem::user("OutputExists", message));
        }
    }
    let mut ordered = Vec::with_capacity(jobs.len());
    while !jobs.is_empty() {
        let waits = |job: &FineTuneJob| {
            jobs.iter().any(|other| other.spec.output.model_name == job.spec.base_model_ref.name)
        };
        let Some(next) = jobs.iter().position(|job| !waits(job)) else {
            let names: Vec<&str> = jobs.iter().map(name).collect();
            let message = format!(
                "FineTuneJobs {} wait for each other's models. Next: start one of them from a Model that is there.",
                names.join(", ")
            );
            return Err(Problem::user("ModelNotFound", message));
        };
        ordered.push(jobs.remove(next));
    }
    Ok(ordered)
}

fn name(job: &FineTuneJob) -> &str {
    job.metadata.name.as_deref().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn job(text: &str) -> FineTuneJob {
        let (base, made) = text.split_once('>').unwrap();
        serde_json::from_value(json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": format!("makes-{made}")},
            "spec": {"baseModelRef": {"name": base}, "dataset": {"train": {"uri": "pvc://d/t"}}, "output": {"modelName": made}},
        }))
        .unwrap()
    }

    #[rstest]
    #[case::as_written(&["a>b", "a>c"], Ok("makes-b makes-c"))]
    #[case::the_maker_first(&["b>c", "a>b"], Ok("makes-b makes-c"))]
    #[case::a_chain(&["c>d", "b>c", "a>b"], Ok("makes-b makes-c makes-d"))]
    #[case::a_circle(&["a>b", "b>a"], Err("ModelNotFound"))]
    #[case::of_itself(&["a>a"], Err("ModelNotFound"))]
    #[case::twice(&["a>b", "c>b"], Err("OutputExists"))]
    #[case::there_already(&["a>there"], Err("OutputExists"))]
    #[case::its_own_base(&["there>there"], Err("OutputExists"))]
    fn jobs_find_their_base(#[case] jobs: &[&str], #[case] expected: Result<&str, &str>) {
        let there = json!({"apiVersion": "lathe.dev/v1alpha1", "kind": "Model", "metadata": {"name": "there"}, "spec": {"source": {"uri": "pvc://d/m"}}});
        let there = [serde_json::from_value(there).unwrap()];
        let ordered = order(jobs.iter().map(|text| job(text)).collect(), &there);
        let names = ordered.map(|jobs| jobs.iter().map(name).collect::<Vec<_>>().join(" "));
        let found = names.as_deref().map_err(|problem| problem.reason.as_str());
        assert_eq!(found, expected);
    }
}
