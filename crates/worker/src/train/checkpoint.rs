//! Training state on a volume, written so that it is there whole or not at all.
//!
//! `<destination>/run-<settings>/step-<n>/` holds `state` and, written last, `manifest` with the state's size and sha256
//! and a checksum of itself. The folder's name holds the hash of everything that decides the result, so that jobs with
//! other settings never meet, and a job that is made again goes on where it was.
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use super::curve::Curve;
use crate::failure::{Done, Halt, io};

const STATE: &str = "state";
const MANIFEST: &str = "manifest";
const PARTIAL: &str = ".partial";
/// Longest manifest or note that is read.
const MAX_TEXT: u64 = 16 << 20;

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
        let mut writer = Hashing { inner: BufWriter::with_capacity(1 << 20, file), hash: Sha256::new(), bytes: 0 };
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
        let mut steps: Vec<u64> = list(&self.dir)?
            .iter()
            .filter_map(|name| name.strip_prefix("step-")?.parse().ok())
            .collect();
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

/// A line of JSON, and a line with its sha256.
fn write_checked<T: Serialize>(path: &Path, value: &T) -> Done<()> {
    let mut text = serde_json::to_string(value).map_err(std::io::Error::from).map_err(at("write", path))?;
    let hash = hex::encode(Sha256::digest(&text));
    text.push('\n');
    text.push_str(&hash);
    text.push('\n');
    let mut file = File::create(path).map_err(at("create", path))?;
    file.write_all(text.as_bytes()).map_err(at("write", path))?;
    file.sync_all().map_err(at("sync", path))
}

fn read_checked<T: DeserializeOwned>(path: &Path) -> Done<T> {
    let damaged = || Halt::user("CheckpointUnusable", format!("{} is damaged", path.display()), "remove it");
    let mut text = String::new();
    let file = File::open(path).map_err(at("open", path))?;
    file.take(MAX_TEXT).read_to_string(&mut text).map_err(at("read", path))?;
    let (json, hash) = text.trim_end().split_once('\n').ok_or_else(damaged)?;
    if hex::encode(Sha256::digest(json)) != hash {
        return Err(damaged());
    }
    serde_json::from_str(json).map_err(|_| damaged())
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = self.inner.write(bytes)?;
        self.hash.update(&bytes[..taken]);
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn list(dir: &Path) -> Done<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(at("list", dir))?;
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
    let names: std::io::Result<Vec<Option<String>>> = names.collect();
    Ok(names.map_err(at("list", dir))?.into_iter().flatten().collect())
}

fn remove(path: &Path) -> Done<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes renames in a folder last.
fn sync_dir(dir: &Path) -> Done<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at("sync", dir))
}

fn at(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Halt {
    let path = path.to_owned();
    move |error| io(&error, &format!("cannot {action} {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: &str = "0123456789abcdef0123";

    fn position(step: u64) -> Position {
        Position { step, tokens: step * 100, ..Position::default() }
    }

    fn write(store: &Store, step: u64) -> Done<String> {
        store.write(&position(step), |to| Ok(to.write_all(format!("state {step}").as_bytes())?))
    }

    fn resumed(store: &Store) -> Option<u64> {
        let mut text = String::new();
        let found = store
            .resume(|_, state| {
                text.clear();
                state.read_to_string(&mut text).unwrap();
                Ok(())
            })
            .unwrap()?;
        assert_eq!(text, format!("state {}", found.position.step));
        assert_eq!(found.position.tokens, found.position.step * 100);
        Some(found.position.step)
    }

    #[test]
    fn the_newest_of_those_kept_is_taken_up() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
        assert_eq!(resumed(&store), None);
        for step in [5, 9, 10, 100] {
            write(&store, step).unwrap();
        }
        assert_eq!(store.steps().unwrap(), [10, 100]);
        assert_eq!(resumed(&Store::open(dir.path(), SETTINGS, 2).unwrap()), Some(100));
        assert_eq!(resumed(&Store::open(dir.path(), "fedcba9876543210", 2).unwrap()), None);
    }

    #[test]
    fn a_damaged_one_falls_back_to_the_one_before_whatever_byte_is_damaged() {
        for file in [STATE, MANIFEST] {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
            write(&store, 1).unwrap();
            write(&store, 2).unwrap();
            let path = store.dir.join("step-2").join(file);
            let whole = fs::read(&path).unwrap();
            for at in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[at] ^= 1;
                fs::write(&path, &damaged).unwrap();
                // A changed line end at the very end changes nothing that is read.
                let expected = if file == MANIFEST && at + 1 == whole.len() { continue } else { 1 };
                assert_eq!(resumed(&store), Some(expected), "{file} byte {at}");
                fs::write(&path, &whole[..at]).unwrap();
                assert_eq!(resumed(&store), Some(1), "{file} cut at {at}");
            }
            fs::remove_file(&path).unwrap();
            assert_eq!(resumed(&store), Some(1));
            // Training comes past it again.
            write(&store, 2).unwrap();
            assert_eq!(resumed(&store), Some(2));
        }
    }

    #[test]
    fn one_that_the_trainer_refuses_falls_back_too() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
        write(&store, 1).unwrap();
        write(&store, 2).unwrap();
        let refuse = |found: &Found, _: &mut dyn Read| match found.position.step {
            2 => Err(Halt::user("CheckpointUnusable", "x", "y")),
            _ => Ok(()),
        };
        assert_eq!(store.resume(refuse).unwrap().map(|found| found.position.step), Some(1));
    }

    #[test]
    fn a_failed_write_leaves_nothing_and_keeps_those_before() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
        write(&store, 1).unwrap();
        let full = store.write(&position(2), |to| {
            to.write_all(b"half")?;
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into())
        });
        assert!(matches!(full, Err(Halt::Failed(t)) if t.reason == "DiskFull" && t.user_error));
        assert_eq!(list(&store.dir).unwrap(), ["step-1"]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
        fs::create_dir(store.dir.join(".step-7.partial")).unwrap();
        fs::write(store.dir.join(".step-7.partial/state"), "half").unwrap();
        fs::write(store.dir.join(".before.partial"), "half").unwrap();
        let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
        assert!(list(&store.dir).unwrap().is_empty());
    }

    #[test]
    fn a_note_is_whole_or_absent() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
        assert_eq!(store.noted::<u32>("before"), None);
        store.note("before", &7u32).unwrap();
        assert_eq!(store.noted::<u32>("before"), Some(7));
        fs::write(store.dir.join("before.json"), "8\n").unwrap();
        assert_eq!(store.noted::<u32>("before"), None);
    }
}
