//! The kinds of accelerator that Lathe knows by itself.
use lathe_api::{AcceleratorProfile, AcceleratorProfileSpec};
use serde::Deserialize;
use serde_json::Value;

const CATALOGUE: &str = include_str!("catalogue/catalogue.yaml");

/// One profile of the catalogue.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The object.
    pub profile: AcceleratorProfile,
    /// Its spec as it is written, without defaults: what the catalogue has an opinion on.
    pub spec: Value,
}

#[derive(Deserialize)]
struct Document {
    metadata: Named,
    spec: Value,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// The catalogue: processors, and three NVIDIA devices.
///
/// # Errors
/// The embedded text cannot be read, which a test rules out.
pub fn catalogue() -> Result<Vec<Entry>, String> {
    let documents: Vec<Document> =
        serde_saphyr::from_multiple(CATALOGUE).map_err(|error| error.to_string())?;
    let entry = |Document { metadata: Named { name }, spec }| {
        let typed: AcceleratorProfileSpec =
            serde_json::from_value(Value::clone(&spec)).map_err(|error| format!("{name}: {error}"))?;
        Ok(Entry { profile: AcceleratorProfile::new(&name, typed), spec })
    };
    documents.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_reads_and_its_numbers_are_numbers() {
        let all = catalogue().expect("reads");
        let names: Vec<_> = all.iter().filter_map(|entry| entry.profile.metadata.name.as_deref()).collect();
        assert_eq!(names, ["cpu", "nvidia-l4", "nvidia-l40s", "nvidia-h100-80gb"]);
        for Entry { profile, spec } in all {
            // Nothing is dropped, so nothing is misspelled.
            let back = serde_json::to_value(&profile.spec).expect("json");
            let fields = spec.as_object().expect("an object");
            assert!(fields.keys().all(|field| back.get(field).is_some()), "{spec}");
            let number = |own: &Option<lathe_api::Decimal>| own.as_ref().and_then(lathe_api::Decimal::value);
            assert!(
                number(&profile.spec.bandwidth) > Some(0.0) && number(&profile.spec.compute_bf16) > Some(0.0)
            );
            let memory = profile.spec.memory.as_ref().map(|memory| memory.value());
            assert!(memory.is_none_or(|memory| memory > Some(20 << 30)), "{memory:?}");
        }
    }
}
