//! What a training has made, as a Model.
use lathe_api::{
    DerivedFrom, FineTuneJob, LicenseSpec, Location, Model, ModelSpec, NameRef, PodOverrides, ReclaimPolicy,
};

use super::output_folder;

/// Characters of a failed gate's words that a Model keeps.
const MOST_WORDS: usize = 256;

/// What a worker made, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// Where the artefact is, below the job's destination.
    pub uri: String,
    /// Its digest.
    pub digest: String,
    /// Of the dataset.
    pub dataset_digest: String,
    /// Of everything that decided the result.
    pub inputs_hash: Option<String>,
    /// True for an adapter.
    pub adapter: bool,
    /// What was accepted for the base holds for what was made of it.
    pub license: Option<LicenseSpec>,
    /// Gates that it did not pass.
    pub failed_gates: Vec<String>,
}

/// The Model of the result, pinned to its digest. Deleting the job keeps it: no owner.
#[must_use]
pub fn model(job: &FineTuneJob, trained: &Trained) -> Model {
    let destination = output_folder(&job.spec);
    let base = job.spec.base_model_ref.clone();
    // What lets the job's pods start lets the one start that reads the result; their size is the training's.
    let pod = job.spec.pod.clone().map(|pod| PodOverrides { cpu: None, memory: None, ..pod });
    let pod = pod.filter(|pod| *pod != PodOverrides::default());
    let spec = ModelSpec {
        source: Location {
            uri: trained.uri.clone(),
            digest: Some(trained.digest.clone()),
            revision: None,
            secret_ref: destination.secret_ref,
        },
        license: trained.license.clone(),
        adapter_of: trained.adapter.then(|| NameRef { name: base.name.clone() }),
        derived_from: Some(DerivedFrom {
            job: job.metadata.name.clone().unwrap_or_default(),
            base: base.name,
            dataset_digest: (trained.dataset_digest.len() == 71).then(|| trained.dataset_digest.clone()),
            inputs_hash: trained.inputs_hash.clone(),
            failed_gates: trained
                .failed_gates
                .iter()
                .map(|words| words.chars().take(MOST_WORDS).collect())
                .collect(),
        }),
        reclaim_policy: ReclaimPolicy::Retain,
        pod,
    };
    let mut model = Model::new(&job.spec.output.model_name, spec);
    model.metadata.namespace.clone_from(&job.metadata.namespace);
    model
}
