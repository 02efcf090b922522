//! The embedded catalogue of AcceleratorProfiles, applied when the operator starts to lead.
//!
//! It has a field manager of its own and never forces: where a user (or a GitOps tool) changed a field, the API server names
//! the conflict and the catalogue leaves that field out. An upgrade brings new figures to every field that nobody changed.
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    core::Status,
};
use lathe_api::{AcceleratorProfile, GROUP, VERSION, names::CATALOGUE_MANAGER};
use lathe_resolve::catalogue;
use serde_json::{Value, json};

use crate::runtime::{Stop, pause, stopped};

/// Applies the catalogue; what fails is tried again, with pauses that grow, until all is applied or `stop` says so. It is
/// logged and keeps nothing else from working: profiles may also come from elsewhere.
pub async fn apply(client: &Client, stop: Stop) {
    let mut left = match catalogue() {
        Ok(entries) => {
            entries.into_iter().map(|entry| (entry.profile.name_any(), entry.spec)).collect::<Vec<_>>()
        }
        Err(error) => return tracing::error!(%error, "the embedded catalogue cannot be read"),
    };
    let api = Api::all(client.clone());
    let all = async {
        for failures in 0.. {
            left = apply_all(&api, left).await;
            if left.is_empty() {
                return tracing::info!("the catalogue of profiles is applied");
            }
            let pause = pause(failures);
            let names: Vec<&str> = left.iter().map(|(name, _)| name.as_str()).collect();
            tracing::warn!(
                profiles = ?names, seconds = pause.as_secs(),
                "profiles of the catalogue are not applied. Next: let the operator patch acceleratorprofiles; it is tried again"
            );
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = all => {}
        () = stopped(stop) => {}
    }
}

/// Applies these profiles once, and gives back those that could not be.
async fn apply_all(api: &Api<AcceleratorProfile>, profiles: Vec<(String, Value)>) -> Vec<(String, Value)> {
    let mut left = Vec::new();
    for (name, spec) in profiles {
        match apply_one(api, &name, spec.clone()).await {
            Ok(kept) if kept.is_empty() => tracing::debug!(profile = name, "applied"),
            Ok(kept) => {
                tracing::info!(profile = name, fields = ?kept, "fields that others changed are theirs")
            }
            Err(error) => {
                tracing::warn!(profile = name, %error, "a profile of the catalogue cannot be applied");
                left.push((name, spec));
            }
        }
    }
    left
}

/// Applies one profile without the fields that others own, and names those.
async fn apply_one(
    api: &Api<AcceleratorProfile>,
    name: &str,
    spec: Value,
) -> Result<Vec<String>, kube::Error> {
    let mut body = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": "AcceleratorProfile",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "lathe"}},
        "spec": spec,
    });
    let params = PatchParams::apply(CATALOGUE_MANAGER);
    match api.patch(name, &params, &Patch::Apply(&body)).await {
        Ok(_) => Ok(Vec::new()),
        Err(kube::Error::Api(status)) if status.is_conflict() => {
            let theirs = conflicts(&status);
            theirs.iter().for_each(|field| remove(&mut body, field));
            api.patch(name, &params, &Patch::Apply(&body)).await?;
            Ok(theirs)
        }
        Err(error) => Err(error),
    }
}

/// Paths of the fields that others own, e.g. `.spec.price.perHour`.
fn conflicts(status: &Status) -> Vec<String> {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.filter(|cause| cause.reason == "FieldManagerConflict").map(|cause| cause.field.clone()).collect()
}

fn remove(body: &mut Value, path: &str) {
    let mut parts: Vec<&str> = path.split('.').filter(|part| !part.is_empty()).collect();
    let Some(last) = parts.pop() else { return };
    let parent = parts.iter().try_fold(body, |value, part| value.get_mut(*part));
    if let Some(Value::Object(fields)) = parent {
        fields.remove(last);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use lathe_api::kstatus::{Kstatus, kstatus};

    use super::*;
    use crate::testing::{Server, failure, sent};

    #[test]
    fn a_field_of_somebody_else_is_left_out_and_nothing_beside_it() {
        let mut body = json!({"spec": {"price": {"perHour": "1", "currency": "USD"}, "memory": "1Gi"}});
        remove(&mut body, ".spec.price.perHour");
        remove(&mut body, ".spec.none.there");
        assert_eq!(body, json!({"spec": {"price": {"currency": "USD"}, "memory": "1Gi"}}));
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_applied_is_tried_again_ever_less_often() {
        let call = |name: &str| {
            format!("PATCH /apis/lathe.dev/v1alpha1/acceleratorprofiles/{name} {CATALOGUE_MANAGER}")
        };
        let refused = call("cpu");
        let (client, server) = Server::start(&[(&refused, 403, failure(403, "Forbidden"))]);
        let (sender, stop) = tokio::sync::watch::channel(false);
        let applying = tokio::spawn(async move { apply(&client, stop).await });
        // At 0, 1, 3, 7, 15 and 31 seconds; the next one would be at 63.
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        sender.send(true).unwrap();
        applying.await.unwrap();
        let calls = server.calls().await;
        let count = |call: &str| calls.iter().filter(|(made, _)| made == call).count();
        assert_eq!(count(&refused), 6, "{calls:?}");
        for entry in catalogue().unwrap().iter().map(|entry| entry.profile.name_any()) {
            assert!(entry == "cpu" || count(&call(&entry)) == 1, "{entry}");
        }
    }

    #[tokio::test]
    async fn a_catalogue_that_is_applied_is_left_alone() {
        let (client, server) = Server::start(&[]);
        let (_sender, stop) = tokio::sync::watch::channel(false);
        apply(&client, stop).await;
        drop(client);
        assert_eq!(server.calls().await.len(), catalogue().unwrap().len());
    }

    /// It has no status and no summary: nothing is done for it, so whoever waits for one need not wait.
    #[tokio::test]
    async fn a_profile_is_current_at_once_whatever_the_user_changed() {
        let theirs =
            [".spec.price", ".spec.bandwidth", ".spec.computeBF16", ".spec.devicesPerNode", ".spec.runtime"];
        let mut recorded = BTreeSet::new();
        for entry in catalogue().unwrap() {
            let name = entry.profile.name_any();
            let call =
                format!("PATCH /apis/lathe.dev/v1alpha1/acceleratorprofiles/{name} {CATALOGUE_MANAGER}");
            for field in theirs {
                let mut conflict = failure(409, "Conflict");
                conflict["details"] =
                    json!({"causes": [{"reason": "FieldManagerConflict", "field": field, "message": "m"}]});
                let (client, server) = Server::start(&[(&call, 409, conflict)]);
                // The second try without the field gets the same answer here: what was sent is what counts.
                assert!(apply_one(&Api::all(client), &name, entry.spec.clone()).await.is_err());
                let mut object: Value = sent(&server.calls().await, &call);
                assert_eq!(object.pointer(&field.replace('.', "/")), None);
                object["metadata"]["generation"] = json!(1);
                assert_eq!(kstatus(&object), Kstatus::Current);
                recorded.insert(object.to_string());
                object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
                assert_eq!(kstatus(&object), Kstatus::Terminating);
                recorded.insert(object.to_string());
            }
        }
        assert!(recorded.len() >= 20, "{}", recorded.len());
    }
}
