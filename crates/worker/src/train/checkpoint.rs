//! Training state on a volume, written so that it is there whole or not at all.
//!
//! `<destination>/run-<settings>/step-<n>/` holds `state` and, written last, `manifest` with the state's size and sha256
//! and a checksum of itself. The folder's name holds the hash of everything that decides the result, so that jobs with
//! other settings never meet, and a job that is made again goes on where it was.
mod disk;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use super::curve::Curve;
use crate::failure::{Done, Halt};
use disk::{Hashing, at, list, read_checked, remove, sync_dir, write_checked};

const STATE: &str = "state";
const MANIFEST: &str = "manifest";
const PARTIAL: &str = ".partial";

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    settings: String,
    keep: usize,
}

/// What stands in a checkpoint beside the trainer's state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Position {
    /// Optimizer steps done, which is the sampler's position too.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// Losses so far.
    pub curve: Curve,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Manifest {
    settings: String,
    position: Position,
    bytes: u64,
    sha256: String,
}

/// A checkpoint that was verified.
#[derive(Debug)]
pub struct Found {
    /// Where training stood.
    pub position: Position,
    /// `sha256:<hex>` of the state.
    pub digest: String,
    state: PathBuf,
}

impl Store {
    /// Opens the folder of a run below `destination`, and removes what a killed process left half-written.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(destination: &Path, settings: &str, keep: usize) -> Done<Self> {
        let name = format!("run-{}", settings.get(..16).unwrap_or(settings));
        let dir = destination.join(&name);
        fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        for entry in list(destination)? {
            if entry.starts_with("run-") && entry != name {
                tracing::info!(folder = entry, "checkpoints of other settings are left alone");
            }
        }
        let store = Store { dir, settings: settings.to_owned(), keep: keep.max(1) };
        for entry in list(&store.dir)?.iter().filter(|entry| entry.ends_with(PARTIAL)) {
            remove(&store.dir.join(entry))?;
        }
        Ok(store)
    }

    /// Writes a checkpoint and lets the oldest ones go. Returns its digest.
    ///
    /// # Errors
    /// `DiskFull` and other failed writes; the checkpoints before are still there then.
    pub fn write(
        &self,
        position: &Position,
        fill: impl FnOnce(&mut dyn Write) -> lathe_engine::Result<()>,
    ) -> Done<String> {
        let name = format!("step-{}", position.step);
        let partial = self.dir.join(format!(".{name}{PARTIAL}"));
        let written = self.write_partial(&partial, position, fill);
        if written.is_err() {
            // Best effort: the error that is returned says more.
            let _ = fs::remove_dir_all(&partial);
        }
        let digest = written?;
        let place = self.dir.join(&name);
        if place.exists() {
            // A damaged one that training has now come past again.
            remove(&place)?;
        }
        fs::rename(&partial, &place).map_err(at("rename to", &place))?;
        sync_dir(&self.dir)?;
        let steps = self.steps()?;
        for step in steps.iter().rev().skip(self.keep) {
            remove(&self.dir.join(format!("step-{step}")))?;
        }
        Ok(digest)
    }

    fn write_partial(
        &self,
        partial: &Path,
        position: &Position,
        fill: impl FnOnce(&mut dyn Write) -> lathe_engine::Result<()>,
    ) -> Done<String> {
        if partial.exists() {
            remove(partial)?;
        }
        fs::create_dir(partial).map_err(at("create", partial))?;
        let path = partial.join(STATE);
        let file = File::create(&path).map_err(at("create", &path))?;
        let mut writer =
            Hashing { inner: BufWriter::with_capacity(1 << 20, file), hash: Sha256::new(), bytes: 0 };
        fill(&mut writer).map_err(|error| Halt::from(error).of(&path.display().to_string()))?;
        writer.flush().map_err(at("write", &path))?;
        writer.inner.get_ref().sync_all().map_err(at("sync", &path))?;
        let sha256 = hex::encode(writer.hash.finalize());
        let manifest = Manifest {
            settings: self.settings.clone(),
            position: position.clone(),
            bytes: writer.bytes,
            sha256: sha256.clone(),
        };
        write_checked(&partial.join(MANIFEST), &manifest)?;
        sync_dir(partial)?;
        Ok(format!("sha256:{sha256}"))
    }

    /// The newest checkpoint that is whole and that `take` accepts; those that are not are told in the log and passed
    /// over.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn resume(&self, mut take: impl FnMut(&Found, &mut dyn Read) -> Done<()>) -> Done<Option<Found>> {
        for step in self.steps()?.into_iter().rev() {
            let taken = self.verify(step).and_then(|found| {
                let mut state = File::open(&found.state).map_err(at("open", &found.state))?;
                take(&found, &mut state)?;
                Ok(found)
            });
            match taken {
                Ok(found) => return Ok(Some(found)),
                Err(Halt::Stopped) => return Err(Halt::Stopped),
                Err(Halt::Failed(trouble)) => {
                    tracing::warn!(step, "this checkpoint is not used: {}", trouble.cause);
                }
            }
        }
        Ok(None)
    }

    fn verify(&self, step: u64) -> Done<Found> {
        let dir = self.dir.join(format!("step-{step}"));
        let unusable = |problem: &str| Halt::user("CheckpointUnusable", problem, "remove it");
        let manifest: Manifest = read_checked(&dir.join(MANIFEST))?;
        if manifest.settings != self.settings {
            return Err(unusable("it is of a run with other settings"));
        }
        if manifest.position.step != step {
            return Err(unusable("it is of another step than its name says"));
        }
        let state = dir.join(STATE);
        let mut hashing = Hashing { inner: std::io::sink(), hash: Sha256::new(), bytes: 0 };
        let mut file = File::open(&state).map_err(at("open", &state))?;
        std::io::copy(&mut file, &mut hashing).map_err(at("read", &state))?;
        if hashing.bytes != manifest.bytes || hex::encode(hashing.hash.finalize()) != manifest.sha256 {
            return Err(unusable("its state is not what its manifest says: it is damaged"));
        }
        Ok(Found { position: manifest.position, digest: format!("sha256:{}", manifest.sha256), state })
    }

    /// Steps of all checkpoints, ascending.
    fn steps(&self) -> Done<Vec<u64>> {
        let mut steps: Vec<u64> =
            list(&self.dir)?.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Keeps a small note of the run (`<name>.json`), replaced as a whole.
    ///
    /// # Errors
    /// A failed write.
    pub fn note<T: Serialize>(&self, name: &str, value: &T) -> Done<()> {
        let path = self.dir.join(format!("{name}.json"));
        let partial = self.dir.join(format!(".{name}{PARTIAL}"));
        let written = write_checked(&partial, value)
            .and_then(|()| fs::rename(&partial, &path).map_err(at("rename to", &path)));
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written
    }

    /// A note, where there is one and it is whole.
    pub fn noted<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let path = self.dir.join(format!("{name}.json"));
        path.exists().then(|| read_checked(&path).ok()).flatten()
    }

    /// Removes everything: the result is written, nobody goes on from here.
    ///
    /// # Errors
    /// A failed removal.
    pub fn clear(&self) -> Done<()> {
        remove(&self.dir)
    }
}
