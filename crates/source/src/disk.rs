//! Files that appear under their final name only when they are whole.
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::digest::FileHash;
use crate::error::SourceError;
use crate::names::PARTIAL;

/// Bytes read or written at a time.
pub(crate) const BLOCK: usize = 1 << 20;

/// Bytes that tell what a file is.
pub(crate) const HEAD: usize = 64;

/// A file being written as `<name>.partial`, hashed on the way.
pub(crate) struct Partial {
    file: File,
    path: PathBuf,
    last: PathBuf,
    hash: Sha256,
    len: u64,
}

impl Partial {
    /// Opens the unfinished file of `last`, with the bytes that are there already if `keep`.
    pub fn open(last: &Path, keep: bool, cancel: &CancellationToken) -> Result<Self, SourceError> {
        let mut name = last.file_name().unwrap_or_default().to_os_string();
        name.push(PARTIAL);
        let path = last.with_file_name(name);
        let at = |e| SourceError::io(&path, e);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(|e| SourceError::io(dir, e))?;
        }
        // No link is followed: what stands there could lead out of the folder.
        let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(!keep)
            .custom_flags(flags)
            .open(&path)
            .map_err(at)?;
        let mut hash = Sha256::new();
        let len = if keep { hash_into(&mut file, &mut hash, &path, cancel)? } else { 0 };
        Ok(Self { file, path, last: last.into(), hash, len })
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn append(&mut self, bytes: &[u8]) -> Result<(), SourceError> {
        self.file.write_all(bytes).map_err(|e| SourceError::io(&self.path, e))?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Begins again with nothing.
    pub fn restart(&mut self) -> Result<(), SourceError> {
        let at = |e| SourceError::io(&self.path, e);
        self.file.set_len(0).map_err(at)?;
        self.file.seek(SeekFrom::Start(0)).map_err(at)?;
        self.hash = Sha256::new();
        self.len = 0;
        Ok(())
    }

    /// The first bytes, for a look at what they are.
    pub fn head(&self) -> Result<Vec<u8>, SourceError> {
        read_at(&self.file, 0, HEAD).map_err(|e| SourceError::io(&self.path, e))
    }

    /// sha256 of the bytes so far.
    pub fn hash(&self) -> FileHash {
        self.hash.clone().finalize().into()
    }

    /// Makes the bytes durable, then gives them their name.
    pub fn finish(self) -> Result<(), SourceError> {
        self.file.sync_all().map_err(|e| SourceError::io(&self.path, e))?;
        std::fs::rename(&self.path, &self.last).map_err(|e| SourceError::io(&self.last, e))
    }
}

/// Writes a small file whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], cancel: &CancellationToken) -> Result<(), SourceError> {
    let mut partial = Partial::open(path, false, cancel)?;
    partial.append(bytes)?;
    partial.finish()
}

/// At most `len` bytes from `from` on; the file's own position stays.
pub(crate) fn read_at(file: &File, from: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let (mut bytes, mut done) = (vec![0; len], 0);
    while done < len {
        match file.read_at(&mut bytes[done..], from + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Makes a folder's names durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), SourceError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| SourceError::io(dir, e))
}

/// Size and sha256 of a file; stops between blocks when `cancel` says so.
pub(crate) fn hash_file(path: &Path, cancel: &CancellationToken) -> Result<(u64, FileHash), SourceError> {
    let mut file = File::open(path).map_err(|e| SourceError::io(path, e))?;
    let mut hash = Sha256::new();
    let len = hash_into(&mut file, &mut hash, path, cancel)?;
    Ok((len, hash.finalize().into()))
}

fn hash_into(
    file: &mut File,
    hash: &mut Sha256,
    path: &Path,
    cancel: &CancellationToken,
) -> Result<u64, SourceError> {
    let mut block = vec![0; BLOCK];
    let mut len = 0;
    loop {
        if cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let n = file.read(&mut block).map_err(|e| SourceError::io(path, e))?;
        if n == 0 {
            return Ok(len);
        }
        hash.update(&block[..n]);
        len += n as u64;
    }
}

/// Fails at once where `need` bytes more cannot fit, rather than after hours.
pub(crate) fn check_space(dir: &Path, need: u64) -> Result<(), SourceError> {
    let free = free_space(dir)?;
    if need <= free {
        return Ok(());
    }
    Err(SourceError::DiskFull {
        path: dir.into(),
        detail: format!("{need} bytes are needed, {free} are free"),
    })
}

/// Bytes that may still be written below a folder.
pub(crate) fn free_space(dir: &Path) -> Result<u64, SourceError> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| SourceError::io(dir, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Runs file work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(SourceError::Io { path: PathBuf::new(), source: std::io::Error::other(e) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_goes_on_where_it_stopped_and_hashes_everything() {
        let dir = tempfile::tempdir().unwrap();
        let (path, never) = (dir.path().join("a/b"), CancellationToken::new());
        let mut first = Partial::open(&path, true, &never).unwrap();
        first.append(b"hel").unwrap();
        drop(first);
        assert!(!path.exists());
        let mut second = Partial::open(&path, true, &never).unwrap();
        assert_eq!(second.len(), 3);
        second.append(b"lo").unwrap();
        let hash = second.hash();
        second.finish().unwrap();
        assert_eq!(hash_file(&path, &never).unwrap(), (5, hash));
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join("a.partial")).unwrap();
        assert!(Partial::open(&dir.path().join("a"), true, &CancellationToken::new()).is_err());
    }

    /// The kernel's own "no space left", from the device that always says it.
    #[test]
    fn a_full_disk_is_named() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut full =
            Partial { file, path: "w.partial".into(), last: "w".into(), hash: Sha256::new(), len: 0 };
        assert_eq!(full.append(b"x").unwrap_err().reason(), "DiskFull");
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(check_space(dir.path(), u64::MAX).unwrap_err().reason(), "DiskFull");
        check_space(dir.path(), 1).unwrap();
    }
}
