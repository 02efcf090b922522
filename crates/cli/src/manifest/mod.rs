//! Manifests as `kubectl apply -f` takes them: files and folders of YAML documents, of which ours are checked as the API
//! server would check them.
mod schema;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lathe_api::{AcceleratorProfile, FineTuneJob, GROUP, InferenceService, Model, VERSION};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::failure::{Done, Problem};

/// Longest file that is read.
const MAX_BYTES: u64 = 16 << 20;

/// Everything of ours that a set of files describes.
#[derive(Debug, Default)]
pub struct Manifests {
    pub models: Vec<Model>,
    pub jobs: Vec<FineTuneJob>,
    pub services: Vec<InferenceService>,
    pub profiles: Vec<AcceleratorProfile>,
    /// Kinds and names of objects that are not ours.
    pub foreign: Vec<String>,
    /// Folder of the first file: what is given relative to the manifests is below it.
    pub folder: PathBuf,
}

/// Reads the files, and the YAML files of the folders (not of folders below them).
///
/// # Errors
/// A file cannot be read, is no YAML, or holds an object of ours that the API server would refuse: with file, document
/// and field.
pub fn read(paths: &[PathBuf]) -> Done<Manifests> {
    let mut all = Manifests::default();
    let mut seen = BTreeSet::new();
    let files = paths.iter().map(|path| files(path)).collect::<Done<Vec<_>>>()?.concat();
    for file in &files {
        let text = text(file)?;
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text)
            .map_err(|error| Problem::user("InvalidManifest", format!("{}: {error}", file.display())))?;
        // A document that is empty, or a comment alone, is no object.
        for (number, object) in documents.into_iter().filter(|object| !object.is_null()).enumerate() {
            let place = format!("{}, object {}", file.display(), number + 1);
            all.add(object, &mut seen).map_err(|problem| problem.of(place))?;
        }
    }
    if all.models.is_empty() && all.jobs.is_empty() && all.services.is_empty() {
        let message = format!(
            "no Model, FineTuneJob or InferenceService in {}. Next: name files with objects of {GROUP}/{VERSION}, as in examples/quickstart/.",
            shown(paths)
        );
        return Err(Problem::user("NothingToRun", message));
    }
    all.folder = files.first().and_then(|file| file.parent()).unwrap_or(Path::new(".")).to_owned();
    Ok(all)
}

impl Manifests {
    fn add(&mut self, object: Value, seen: &mut BTreeSet<String>) -> Done<()> {
        let field = |name: &str| object[name].as_str().unwrap_or_default().to_owned();
        let (api_version, kind) = (field("apiVersion"), field("kind"));
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if kind.is_empty() || api_version.is_empty() {
            let message = "`apiVersion` and `kind` must be set. Next: is this a Kubernetes manifest?";
            return Err(Problem::user("InvalidManifest", message));
        }
        if (api_version.as_str(), kind.as_str()) == ("v1", "List") {
            // What `kubectl get -o yaml` writes, and `kubectl apply` takes apart.
            let Value::Array(items) = &object["items"] else {
                let message = "`items` must be a list. Next: correct it, or write the objects one by one.";
                return Err(Problem::user("InvalidManifest", message).of("List"));
            };
            return items.iter().enumerate().try_for_each(|(number, item)| {
                self.add(item.clone(), seen).map_err(|problem| problem.of(format!("items[{number}]")))
            });
        }
        if api_version.split('/').next() != Some(GROUP) {
            self.foreign.push(format!("{kind} {name}"));
            return Ok(());
        }
        let what = format!("{kind} {name}");
        schema::check(&api_version, &kind, &object).map_err(|problem| problem.of(&what))?;
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        if !seen.insert(format!("{namespace}/{what}")) {
            let message = format!("{what} is there twice. Next: remove one, or rename it.");
            return Err(Problem::user("InvalidManifest", message));
        }
        match kind.as_str() {
            "Model" => self.models.push(typed(object)?),
            "FineTuneJob" => self.jobs.push(typed(object)?),
            "InferenceService" => self.services.push(typed(object)?),
            _ => self.profiles.push(typed(object)?),
        }
        Ok(())
    }
}

/// What the schema lets through fits the type; the text says so where it does not.
fn typed<K: DeserializeOwned>(object: Value) -> Done<K> {
    serde_json::from_value(object).map_err(|error| Problem::user("InvalidManifest", error.to_string()))
}

fn files(path: &Path) -> Done<Vec<PathBuf>> {
    let missing = |error: std::io::Error| {
        let message = format!(
            "cannot read {}: {error}. Next: name a file or folder with manifests by -f.",
            path.display()
        );
        Problem::user("NotFound", message)
    };
    if std::fs::metadata(path).map_err(missing)?.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .map_err(missing)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|file| {
            file.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json")
                && file.is_file()
        })
        .collect();
    files.sort();
    if files.is_empty() {
        let message =
            format!("{} holds no .yaml, .yml or .json file. Next: name another folder.", path.display());
        return Err(Problem::user("NotFound", message));
    }
    Ok(files)
}

fn text(file: &Path) -> Done<String> {
    let length = std::fs::metadata(file).map_err(|error| Problem::io("read", file, &error))?.len();
    if length > MAX_BYTES {
        let message =
            format!("{}: a manifest must be at most {MAX_BYTES} bytes (found {length})", file.display());
        return Err(Problem::user("InvalidManifest", message));
    }
    std::fs::read_to_string(file).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => {
            Problem::user("InvalidManifest", format!("{} is not UTF-8", file.display()))
        }
        _ => Problem::io("read", file, &error),
    })
}

fn shown(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
