//! Names of the objects that Lathe makes, and its labels.

/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "lathe-operator";
/// Field manager of the embedded profile catalogue.
pub const CATALOGUE_MANAGER: &str = "lathe-catalogue";
/// Name of the gateway's Deployment and Service in the release's namespace, and its pods' `app.kubernetes.io/name`.
pub const GATEWAY: &str = "lathe-gateway";
/// Label: kind of the owner (`finetunejob`, `inferenceservice`, `model`).
pub const LABEL_KIND: &str = "lathe.dev/kind";
/// Label: name of the owner.
pub const LABEL_NAME: &str = "lathe.dev/name";
/// Label: what a pod does (`train`, `serve`, `inspect`, `check-data`).
pub const LABEL_TASK: &str = "lathe.dev/task";
/// Label of a pod beside those of its service: [`CANDIDATE`] where its revision is tried and may not stay.
pub const LABEL_TRACK: &str = "lathe.dev/track";
/// Value of [`LABEL_TRACK`], and the hostname of such pods, which an EndpointSlice tells with each endpoint.
pub const CANDIDATE: &str = "candidate";
/// PersistentVolumeClaim for results and checkpoints where no destination is named.
pub const ARTIFACTS_CLAIM: &str = "lathe-artifacts";

/// Job of a FineTuneJob's attempt (counts from 1).
#[must_use]
pub fn train_job(job: &str, attempt: i32) -> String {
    format!("{job}-{attempt}")
}

/// Job that checks a FineTuneJob's dataset.
#[must_use]
pub fn check_job(job: &str) -> String {
    format!("{job}-check-data")
}

/// Job that repeats the last words of a FineTuneJob's pod that is gone.
#[must_use]
pub fn summary_job(job: &str) -> String {
    format!("{job}-summary")
}

/// Job that inspects a Model's source.
#[must_use]
pub fn inspect_job(model: &str) -> String {
    bounded(model, "-inspect")
}

/// ConfigMap with the contract of the pods of `owner`, a Job's or Deployment's name.
#[must_use]
pub fn contract(owner: &str) -> String {
    bounded(owner, "-contract")
}

/// Objects of an InferenceService share its name with a suffix, so that a user's own Service cannot be taken over.
#[must_use]
pub fn serve(service: &str) -> String {
    format!("{service}-serve")
}

/// Deployment of an InferenceService's candidate, beside that of its stable revision.
#[must_use]
pub fn candidate(service: &str) -> String {
    format!("{service}-{CANDIDATE}")
}

/// A revision's short name: the beginning of its checksum, as in the name of its ConfigMap.
#[must_use]
pub fn revision(checksum: &str) -> String {
    checksum.chars().take(10).collect()
}

/// ConfigMap with the contract of an InferenceService's pods of one revision, which `checksum` tells from all others: a roll-out
/// changes nothing under the pods that run.
#[must_use]
pub fn serve_contract(service: &str, checksum: &str) -> String {
    format!("{}-{}", contract(&serve(service)), revision(checksum))
}

/// `base` + `suffix` in at most 63 characters: a longer base is cut and told apart by a hash of the whole.
#[must_use]
pub fn bounded(base: &str, suffix: &str) -> String {
    if base.len() + suffix.len() <= 63 {
        return format!("{base}{suffix}");
    }
    // FNV-1a: stable for ever, and no secret depends on it.
    let hash = base
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let keep = 63 - suffix.len() - 9;
    let head: String = base.chars().take(keep).collect();
    format!("{head}-{:08x}{suffix}", hash as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut_and_stay_apart() {
        let (a, b) = ("m".repeat(63), format!("{}n", "m".repeat(62)));
        assert_eq!(inspect_job("small"), "small-inspect");
        assert!(inspect_job(&a).len() <= 63 && inspect_job(&b).len() <= 63);
        assert_ne!(inspect_job(&a), inspect_job(&b));
    }
}
