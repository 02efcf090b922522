//! The download folder: one entry for each content, shared by processes, complete or absent.
//!
//! `<key>/` is complete, `<key>.partial/` is being filled by whoever holds the lock on `<key>.lock`. Who uses a complete
//! one holds a shared lock on `<key>.use`, whose time of change is that of the last use: eviction looks at both.
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use crate::digest::{Digest, FileEntry};
use crate::error::SourceError;
use crate::manifest::{self, MANIFEST};
use crate::names::PARTIAL;
use crate::remote::Listing;

/// Hexadecimal digits of a key.
pub(crate) const KEY_DIGITS: usize = 40;

/// How often a process that waits for another one looks again.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// An entry that this process alone may fill.
pub(crate) struct Slot {
    _lock: File,
    in_use: PathBuf,
    pub whole: PathBuf,
    pub partial: PathBuf,
}

/// Keeps an entry from being evicted; every clone must go first.
#[derive(Clone, Debug)]
pub(crate) struct InUse {
    _lock: Arc<File>,
}

impl Slot {
    /// Waits until no other process fills the entry of this listing.
    pub async fn lock(cache: &Path, listing: &Listing) -> Result<Self, SourceError> {
        let key = key(listing);
        std::fs::create_dir_all(cache).map_err(|e| SourceError::io(cache, e))?;
        let path = cache.join(format!("{key}.lock"));
        let lock =
            File::options().create(true).append(true).open(&path).map_err(|e| SourceError::io(&path, e))?;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
                Err(TryLockError::Error(e)) => return Err(SourceError::io(&path, e)),
            }
        }
        let [in_use, whole, partial] =
            [format!("{key}.use"), key.clone(), format!("{key}{PARTIAL}")].map(|name| cache.join(name));
        Ok(Self { _lock: lock, in_use, whole, partial })
    }

    /// Says that the complete entry is used from now on.
    pub fn hold(&self) -> Result<InUse, SourceError> {
        let at = |e| SourceError::io(&self.in_use, e);
        let file = File::options().create(true).append(true).open(&self.in_use).map_err(at)?;
        // Who evicts holds the other lock first, which is ours: nothing to wait for.
        file.lock_shared().map_err(at)?;
        file.set_modified(SystemTime::now()).map_err(at)?;
        Ok(InUse { _lock: Arc::new(file) })
    }

    /// The files, where the entry is complete and none was cut since.
    pub fn complete(&self) -> Option<(Vec<FileEntry>, Digest)> {
        let (files, digest) = manifest::read(&std::fs::read(self.whole.join(MANIFEST)).ok()?).ok()?;
        let same = |f: &FileEntry| {
            std::fs::metadata(self.whole.join(&f.path)).is_ok_and(|m| m.is_file() && m.len() == f.size)
        };
        files.iter().all(same).then_some((files, digest))
    }

    /// Forgets what was read so far.
    pub fn clear(&self) -> Result<(), SourceError> {
        remove(&self.partial)
    }

    /// Gives the filled folder its final name, in place of what may be there.
    pub fn publish(&self) -> Result<(), SourceError> {
        remove(&self.whole)?;
        std::fs::rename(&self.partial, &self.whole).map_err(|e| SourceError::io(&self.whole, e))?;
        crate::disk::sync_dir(self.whole.parent().unwrap_or(Path::new(".")))
    }
}

pub(crate) fn remove(dir: &Path) -> Result<(), SourceError> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(SourceError::io(dir, e)),
        _ => Ok(()),
    }
}

/// Another address, commit, file, size, checksum or validator is another entry.
fn key(listing: &Listing) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{:?}\n", listing.identity));
    let mut files: Vec<_> = listing.files.iter().collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    for file in files {
        hash.update(format!("{file:?}\n"));
    }
    hex::encode(&hash.finalize()[..KEY_DIGITS / 2])
}
