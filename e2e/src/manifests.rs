//! Manifests of the repository.
use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::Value;

/// Root of the checkout.
#[must_use]
pub fn repository() -> PathBuf {
    // As it runs: a target folder that another checkout uses too would bring that one's folder along.
    let package = env::var_os("CARGO_MANIFEST_DIR");
    let package = package.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map_or_else(|| package.clone(), Path::to_path_buf)
}

/// The documents of a YAML file.
///
/// # Errors
/// The file cannot be read or is no YAML.
pub fn documents(path: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_multiple(&text).with_context(|| format!("{} is no YAML", path.display()))
}

/// The quick-start's objects, in the order in which they are applied.
///
/// # Errors
/// As [`documents`].
pub fn quickstart() -> Result<Vec<Value>> {
    let folder = repository().join("examples/quickstart");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    Ok(files.iter().map(|file| documents(file)).collect::<Result<Vec<_>>>()?.concat())
}
