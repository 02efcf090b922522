//! The embedded catalogue of AcceleratorProfiles, applied when the operator starts.
//!
//! It has a field manager of its own and never forces: where a user (or a GitOps tool) changed a field, the API server names
//! the conflict and the catalogue leaves that field out. An upgrade brings new figures to every field that nobody changed.
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::Status,
};
use lathe_api::{AcceleratorProfile, AcceleratorProfileSpec, GROUP, VERSION, names::CATALOGUE_MANAGER};
use serde::Deserialize;
use serde_json::{Value, json};

const CATALOGUE: &str = include_str!("catalogue.yaml");

/// One profile of the catalogue.
#[derive(Deserialize)]
struct Entry {
    metadata: Named,
    spec: Value,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// Applies the catalogue. What goes wrong is logged: profiles may also come from elsewhere.
pub async fn apply(client: &Client) {
    let entries = match entries() {
        Ok(entries) => entries,
        Err(error) => return tracing::error!(%error, "the embedded catalogue cannot be read"),
    };
    let api = Api::all(client.clone());
    for entry in entries {
        let name = entry.metadata.name.clone();
        match apply_one(&api, entry).await {
            Ok(kept) if kept.is_empty() => tracing::debug!(profile = name, "applied"),
            Ok(kept) => {
                tracing::info!(profile = name, fields = ?kept, "fields that others changed are theirs")
            }
            Err(error) => {
                tracing::warn!(profile = name, %error, "a profile of the catalogue cannot be applied")
            }
        }
    }
}

/// Applies one profile without the fields that others own, and names those.
async fn apply_one(api: &Api<AcceleratorProfile>, entry: Entry) -> Result<Vec<String>, kube::Error> {
    let Entry { metadata: Named { name }, spec } = entry;
    let mut body = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": "AcceleratorProfile",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "lathe"}},
        "spec": spec,
    });
    let params = PatchParams::apply(CATALOGUE_MANAGER);
    match api.patch(&name, &params, &Patch::Apply(&body)).await {
        Ok(_) => Ok(Vec::new()),
        Err(kube::Error::Api(status)) if status.is_conflict() => {
            let theirs = conflicts(&status);
            theirs.iter().for_each(|field| remove(&mut body, field));
            api.patch(&name, &params, &Patch::Apply(&body)).await?;
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

fn entries() -> Result<Vec<Entry>, String> {
    let all: Vec<Entry> = serde_saphyr::from_multiple(CATALOGUE).map_err(|error| error.to_string())?;
    for entry in &all {
        let name = &entry.metadata.name;
        let _: AcceleratorProfileSpec =
            serde_json::from_value(entry.spec.clone()).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_reads_and_its_numbers_are_numbers() {
        let all = entries().unwrap();
        let names: Vec<&str> = all.iter().map(|entry| entry.metadata.name.as_str()).collect();
        assert_eq!(names, ["cpu", "nvidia-l4", "nvidia-l40s", "nvidia-h100-80gb"]);
        for entry in all {
            let spec: AcceleratorProfileSpec = serde_json::from_value(entry.spec.clone()).unwrap();
            // Nothing is dropped, so nothing is misspelled.
            let back = serde_json::to_value(&spec).unwrap();
            for field in entry.spec.as_object().unwrap().keys() {
                assert!(back.get(field).is_some(), "{}: {field}", entry.metadata.name);
            }
            assert!(spec.bandwidth.unwrap().value().unwrap() > 0.0);
            assert!(spec.compute_bf16.unwrap().value().unwrap() > 0.0);
            assert!(spec.memory.is_none_or(|memory| memory.value().unwrap() > 20 << 30));
        }
    }

    #[test]
    fn a_field_of_somebody_else_is_left_out_and_nothing_beside_it() {
        let mut body = json!({"spec": {"price": {"perHour": "1", "currency": "USD"}, "memory": "1Gi"}});
        remove(&mut body, ".spec.price.perHour");
        remove(&mut body, ".spec.none.there");
        assert_eq!(body, json!({"spec": {"price": {"currency": "USD"}, "memory": "1Gi"}}));
    }
}
