//! An artefact onto a mounted volume: copied beside its place, then moved there at once.
use std::fs::{File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use crate::digest::{Digest, FileEntry};
use crate::disk::{BLOCK, Partial, blocking, check_space, sync_dir, write_whole};
use crate::download::Meter;
use crate::error::SourceError;
use crate::local;
use crate::manifest::{self, MANIFEST};
use crate::names::{self, PARTIAL};
use crate::options::Options;
use crate::publish::Artefact;

pub(crate) async fn write(
    artefact: &Artefact,
    claim: &str,
    path: &str,
    options: &Options,
    meter: &Meter<'_>,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    let what = format!("pvc://{claim}/{path}");
    if path.is_empty() {
        return Err(SourceError::InvalidLocation {
            uri: what,
            problem: "a path is needed below the claim: pvc://<claim>/<path>".into(),
        });
    }
    let root = local::root(claim, options)?;
    let place = root.join(path);
    let Some((staging, _lock)) = prepare(&root, &place, artefact.digest, &what)? else { return Ok(()) };
    let written = fill(artefact, &staging, &place, meter, cancel).await;
    if written.is_err() {
        // The volume is the user's: its space is given back, the next try begins anew in any case.
        let removed =
            blocking(move || std::fs::remove_dir_all(&staging).map_err(|e| SourceError::io(&staging, e)))
                .await;
        if let Err(error) = removed {
            tracing::warn!(%error, "could not remove an unfinished copy");
        }
    }
    written
}

/// Copies the files, then the manifest, and moves the whole to its place.
async fn fill(
    artefact: &Artefact,
    staging: &Path,
    place: &Path,
    meter: &Meter<'_>,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    check_space(staging, artefact.files.iter().map(|f| f.size).sum())?;
    for file in &artefact.files {
        let (from, to) = (artefact.dir.join(&file.path), staging.join(&file.path));
        let (expected, cancel) = (file.clone(), cancel.clone());
        blocking(move || copy(&from, &to, &expected, &cancel)).await?;
        meter.add(&file.path, file.size as i64);
    }
    let (manifest, files, cancel) = (artefact.manifest()?, artefact.files.clone(), cancel.clone());
    let (staging, place) = (staging.to_path_buf(), place.to_path_buf());
    blocking(move || {
        write_whole(&staging.join(MANIFEST), &manifest, &cancel)?;
        for file in &files {
            if let Some(dir) = staging.join(&file.path).parent() {
                sync_dir(dir)?;
            }
        }
        sync_dir(&staging)?;
        std::fs::rename(&staging, &place).map_err(|e| SourceError::io(&place, e))?;
        sync_dir(place.parent().unwrap_or(&place))
    })
    .await
}

/// An empty folder beside the place, locked; `None` where the same artefact is there already.
fn prepare(
    root: &Path,
    place: &Path,
    digest: Digest,
    what: &str,
) -> Result<Option<(PathBuf, File)>, SourceError> {
    let parent = place.parent().unwrap_or(root);
    // Created one by one, so that no link on the way leads out of the volume.
    let mut at = root.to_path_buf();
    for part in parent.strip_prefix(root).unwrap_or(Path::new("")) {
        at.push(part);
        match std::fs::create_dir(&at) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(SourceError::io(&at, e)),
            _ => local::within(root, &at, what)?,
        }
    }
    if holds(place, digest, what)? {
        return Ok(None);
    }
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let staging = parent.join(format!(".{name}{PARTIAL}"));
    let io = |e| SourceError::io(&staging, e);
    match std::fs::create_dir(&staging) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(e)),
        _ => {}
    }
    let lock = File::open(&staging).map_err(io)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(SourceError::Incomplete { what: what.into() }),
        Err(TryLockError::Error(e)) => return Err(io(e)),
    }
    for entry in std::fs::read_dir(&staging).map_err(io)? {
        let entry = entry.map_err(io)?;
        let is_dir = entry.file_type().map_err(io)?.is_dir();
        let removed =
            if is_dir { std::fs::remove_dir_all(entry.path()) } else { std::fs::remove_file(entry.path()) };
        removed.map_err(io)?;
    }
    Ok(Some((staging, lock)))
}

/// Whether the place holds this artefact. Something else there is an error.
fn holds(place: &Path, digest: Digest, what: &str) -> Result<bool, SourceError> {
    let exists = |problem: &str| SourceError::AlreadyExists { what: what.into(), problem: problem.into() };
    let mut entries = match std::fs::read_dir(place) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => return Err(exists("it is a file")),
        Err(e) => return Err(SourceError::io(place, e)),
    };
    if entries.next().is_none() {
        return Ok(false);
    }
    let recorded = std::fs::read(place.join(MANIFEST)).ok().and_then(|bytes| manifest::read(&bytes).ok());
    let Some((files, found)) = recorded else {
        return Err(exists("it holds files that are no artefact of Lathe"));
    };
    if found != digest {
        return Err(exists(&format!("it holds the artefact {found}")));
    }
    let whole = |f: &FileEntry| {
        std::fs::metadata(place.join(&f.path)).is_ok_and(|m| m.is_file() && m.len() == f.size)
    };
    if files.iter().all(whole) { Ok(true) } else { Err(exists("it holds a damaged copy of this artefact")) }
}

/// Copies a file and checks that it still is what was hashed.
fn copy(from: &Path, to: &Path, expected: &FileEntry, cancel: &CancellationToken) -> Result<(), SourceError> {
    let mut source = File::open(from).map_err(|e| SourceError::io(from, e))?;
    let mut target = Partial::open(to, false, cancel)?;
    let mut block = vec![0; BLOCK];
    loop {
        if cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        match source.read(&mut block).map_err(|e| SourceError::io(from, e))? {
            0 => break,
            n => target.append(&block[..n])?,
        }
    }
    if target.len() != expected.size || target.hash() != expected.sha256 {
        return Err(SourceError::Changed { what: names::last(&expected.path).into() });
    }
    target.finish()
}
