//! Programs of this workspace that tests start on this machine.
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// Where cargo builds them: beside the folder of the tests.
///
/// # Errors
/// This is no program that cargo built.
pub fn folder() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(|deps| deps.parent()).context("a test without a folder")?;
    Ok(folder.to_owned())
}

/// A program of the package of the same name, or `lathe` of `lathe-cli`.
///
/// # Errors
/// It is not built.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = folder()?.join(name);
    ensure!(path.is_file(), "{} is not built: run `cargo build --workspace --bins --tests`", path.display());
    Ok(path)
}
