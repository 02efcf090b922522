//! Where the repository lies and where things are kept between runs.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The root of the checkout that cargo runs this program for, or that it was built from: checkouts that share a target
/// folder share the program too.
pub fn repository() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR");
    let package = package.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.ancestors().nth(2).unwrap_or(&package).to_path_buf()
}

/// What the quick-start's claim holds: the demo model in `model`, rows in `data`.
pub fn quickstart_volume() -> PathBuf {
    repository().join("examples/quickstart/volumes/quickstart")
}

/// `$XDG_CACHE_HOME/lathe`, or `~/.cache/lathe`.
pub fn cache() -> Result<PathBuf> {
    if let Some(base) = env::var_os("XDG_CACHE_HOME").filter(|base| !base.is_empty()) {
        return Ok(PathBuf::from(base).join("lathe"));
    }
    let home = env::home_dir().context("neither XDG_CACHE_HOME nor HOME is set: set one")?;
    Ok(home.join(".cache/lathe"))
}

/// Finds a program on `PATH`, and in the system folders that a plain `su` leaves out of it.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}
