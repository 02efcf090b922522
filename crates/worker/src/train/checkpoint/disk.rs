//! Small files with a checksum of themselves, and what else a checkpoint does with a disk.
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::failure::{Done, Halt, io};

/// Longest manifest or note that is read.
const MAX_TEXT: u64 = 16 << 20;

/// A line of JSON, and a line with its sha256.
pub fn write_checked<T: Serialize>(path: &Path, value: &T) -> Done<()> {
    let mut text = serde_json::to_string(value).map_err(std::io::Error::from).map_err(at("write", path))?;
    let hash = hex::encode(Sha256::digest(&text));
    text.push('\n');
    text.push_str(&hash);
    text.push('\n');
    let mut file = File::create(path).map_err(at("create", path))?;
    file.write_all(text.as_bytes()).map_err(at("write", path))?;
    file.sync_all().map_err(at("sync", path))
}

/// What [`write_checked`] wrote, unless a byte of it changed.
pub fn read_checked<T: DeserializeOwned>(path: &Path) -> Done<T> {
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

/// Counts and hashes what passes through.
pub struct Hashing<W> {
    pub inner: W,
    pub hash: Sha256,
    pub bytes: u64,
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

/// Names in a folder.
pub fn list(dir: &Path) -> Done<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(at("list", dir))?;
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
    let names: std::io::Result<Vec<Option<String>>> = names.collect();
    Ok(names.map_err(at("list", dir))?.into_iter().flatten().collect())
}

/// Removes a file or folder; one that is gone already is no error.
pub fn remove(path: &Path) -> Done<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes renames in a folder last.
pub fn sync_dir(dir: &Path) -> Done<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at("sync", dir))
}

/// A failed read or write, with the file and what was tried.
pub fn at(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Halt {
    let path = path.to_owned();
    move |error| io(&error, &format!("cannot {action} {}", path.display()))
}
