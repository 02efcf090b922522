//! Training state on a volume, written so that it is there whole or not at all.
//!
//! `<destination>/run-<settings>/step-<n>.<token>/` holds `state` and, written last, `manifest` with the state's size and
//! sha256 and a checksum of itself. The folder's name holds the hash of everything that decides the result, so that jobs
//! with other settings never meet, and a job that is made again goes on where it was. The token is the writer's: `owner.rs`
//! says what happens where there are two.
mod disk;
mod owner;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use super::curve::Curve;
use crate::failure::{Done, Halt};
use disk::{Hashing, at, list, read_checked, remove, sync_dir, write_checked};
use owner::Owner;

const STATE: &str = "state";
const MANIFEST: &str = "manifest";
const PARTIAL: &str = ".partial";

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    settings: String,
    keep: usize,
    owner: Owner,
}

/// A checkpoint's folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    step: u64,
    name: String,
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
    /// Takes over the folder of a run below `destination`, and removes what a killed process left half-written. `token`
    /// is like no other worker's, `who` is what a worker is told that had the folder until now.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(destination: &Path, settings: &str, keep: usize, token: &str, who: &str) -> Done<Self> {
        let name = format!("run-{}", settings.get(..16).unwrap_or(settings));
        let dir = destination.join(&name);
        fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        for entry in list(destination)? {
            if entry.starts_with("run-") && entry != name {
                tracing::info!(folder = entry, "checkpoints of other settings are left alone");
            }
        }
        let owner = Owner::claim(&dir, token, who)?;
        let store = Store { dir, settings: settings.to_owned(), keep: keep.max(1), owner };
        for entry in list(&store.dir)?.iter().filter(|entry| entry.ends_with(PARTIAL)) {
            remove(&store.dir.join(entry))?;
        }
        Ok(store)
    }

    /// Whether nobody has taken the folder over.
    ///
    /// # Errors
    /// `CheckpointsTaken`.
    pub fn is_ours(&self) -> Done<()> {
        self.owner.holds()
    }

    /// Writes a checkpoint and lets the oldest ones go. Returns its digest.
    ///
    /// # Errors
    /// `CheckpointsTaken`, `DiskFull` and other failed writes; the checkpoints before are still there then.
    pub fn write(
        &self,
        position: &Position,
        fill: impl FnOnce(&mut dyn Write) -> lathe_engine::Result<()>,
    ) -> Done<String> {
        self.is_ours()?;
        let name = format!("step-{}.{}", position.step, self.owner.token);
        let partial = self.dir.join(format!(".{name}{PARTIAL}"));
        let written = self.write_partial(&partial, position, fill);
        if written.is_err() {
            // Best effort: the error that is returned says more.
            let _ = fs::remove_dir_all(&partial);
        }
        // Whoever came meanwhile has removed what was half-written: that is the cause then.
        let digest = written.or_else(|halt| self.is_ours().and(Err(halt)))?;
        let place = self.dir.join(&name);
        fs::rename(&partial, &place).map_err(at("rename to", &place)).or_else(|halt| {
            self.is_ours()?;
            Err(halt)
        })?;
        sync_dir(&self.dir)?;
        // Those of the one who came meanwhile are not ours to let go.
        self.is_ours()?;
        self.forget(position.step, &name)?;
        Ok(digest)
    }

    /// Lets go what is not kept beside the one just written. What stands for a later step was found unusable at the start,
    /// or is the last word of a worker that was taken over: it must not count in place of those that are good.
    fn forget(&self, step: u64, just_written: &str) -> Done<()> {
        let places = self.places()?;
        let (later, before): (Vec<_>, Vec<_>) = places
            .into_iter()
            .rev()
            .filter(|place| place.name != just_written)
            .partition(|place| place.step > step);
        for place in later.iter().chain(before.iter().skip(self.keep - 1)) {
            remove(&self.dir.join(&place.name))?;
        }
        Ok(())
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
    pub fn resume(&self, mut take: impl FnMut(&Found, &mut File) -> Done<()>) -> Done<Option<Found>> {
        for place in self.places()?.into_iter().rev() {
            let step = place.step;
            let taken = self.verify(&place).and_then(|found| {
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

    fn verify(&self, place: &Place) -> Done<Found> {
        let dir = self.dir.join(&place.name);
        let unusable = |problem: &str| Halt::user("CheckpointUnusable", problem, "remove it");
        let manifest: Manifest = read_checked(&dir.join(MANIFEST))?;
        if manifest.settings != self.settings {
            return Err(unusable("it is of a run with other settings"));
        }
        if manifest.position.step != place.step {
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

    /// All checkpoints, ascending by their steps.
    fn places(&self) -> Done<Vec<Place>> {
        let place = |name: String| {
            let step = name.strip_prefix("step-")?.split_once('.')?.0.parse().ok()?;
            Some(Place { step, name })
        };
        let mut places: Vec<Place> = list(&self.dir)?.into_iter().filter_map(place).collect();
        places.sort_unstable();
        Ok(places)
    }

    /// Keeps a small note of the run (`<name>.json`), replaced as a whole.
    ///
    /// # Errors
    /// A failed write.
    pub fn note<T: Serialize>(&self, name: &str, value: &T) -> Done<()> {
        let path = self.dir.join(format!("{name}.json"));
        let partial = self.dir.join(format!(".{name}.{}{PARTIAL}", self.owner.token));
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
    /// `CheckpointsTaken`, or a failed removal.
    pub fn clear(&self) -> Done<()> {
        self.is_ours()?;
        remove(&self.dir)
    }
}
