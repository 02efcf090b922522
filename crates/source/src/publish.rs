//! Writing an artefact to where it shall stay: never half of one under its final name.
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::digest::{Digest, FileEntry, digest_of};
use crate::disk::{blocking, hash_file};
use crate::download::Meter;
use crate::error::SourceError;
use crate::location::{Address, Location};
use crate::manifest::{self, MANIFEST};
use crate::names::{self, PARTIAL};
use crate::options::{Options, Progress};
use crate::{publish_pvc, publish_s3};

/// Object that stands below a prefix while an artefact is written there, with its digest. Readers refuse the prefix, unless
/// a manifest of the same digest is there already.
pub(crate) const UNFINISHED: &str = "lathe-unfinished";

/// Longest clean-up after a cancellation.
const GRACE: Duration = Duration::from_secs(5);

/// An artefact on this machine, its files hashed.
pub(crate) struct Artefact {
    pub dir: PathBuf,
    pub files: Vec<FileEntry>,
    pub digest: Digest,
}

impl Artefact {
    pub fn manifest(&self) -> Result<Vec<u8>, SourceError> {
        manifest::write(&self.files)
    }
}

/// Writes every file of `dir` to `location` (`pvc://` or `s3://`), and a manifest ([`MANIFEST`]) of them last.
///
/// On a volume the files are copied beside the place, made durable and moved there by one rename. Below a prefix a mark
/// stands until the manifest is written, and readers refuse the prefix while it does; what a broken upload left is
/// replaced by the next one. Two that write to one place at the same time never mix: see `publish_pvc` and `publish_s3`.
/// Cancelling takes effect at once, with up to five seconds to clean up. Writing the same content again is no error and
/// writes nothing. Returns the digest that a reader will find.
///
/// # Errors
/// `AlreadyExists` where something else is there, `PickleRefused`, `UnsafeName`, `DiskFull`, and those of the network.
pub async fn publish(
    dir: &Path,
    location: &Location,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Digest, SourceError> {
    let work = async {
        let (from, stop) = (dir.to_path_buf(), cancel.clone());
        let artefact = blocking(move || read_artefact(&from, &stop)).await?;
        write_artefact(&artefact, location, options, progress, cancel).await?;
        Ok(artefact.digest)
    };
    stoppable(work, cancel).await
}

/// Ends `work` when `cancel` says so, with a moment to clean up.
pub(crate) async fn stoppable<T>(
    work: impl Future<Output = Result<T, SourceError>>,
    cancel: &CancellationToken,
) -> Result<T, SourceError> {
    tokio::pin!(work);
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        done = &mut work => return done,
    }
    // It has seen the token too: a moment to take back what it began (parts of an upload cost storage until they are).
    tokio::time::timeout(GRACE, work).await.unwrap_or(Err(SourceError::Cancelled))
}

pub(crate) async fn write_artefact(
    artefact: &Artefact,
    location: &Location,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    let meter = Meter::new(progress, Some(artefact.files.iter().map(|f| f.size).sum()));
    match location.address() {
        Address::Pvc { claim, path } => {
            publish_pvc::write(artefact, claim, path, options, &meter, cancel).await
        }
        Address::S3 { bucket, prefix } => {
            publish_s3::write(artefact, bucket, prefix, options, &meter, cancel).await
        }
        Address::Http(_) | Address::Hub(_) => Err(SourceError::ReadOnly { uri: location.to_string() }),
    }
}

/// The files of `dir`, whatever their names, hashed.
pub(crate) fn read_artefact(dir: &Path, cancel: &CancellationToken) -> Result<Artefact, SourceError> {
    let mut paths = Vec::new();
    walk(dir, "", &mut paths)?;
    paths.sort();
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        let (size, sha256) = hash_file(&dir.join(&path), cancel)?;
        files.push(FileEntry { path, size, sha256 });
    }
    if files.is_empty() {
        return Err(SourceError::NotFound {
            what: format!("a file in {}", dir.display()),
            next: "an artefact has at least one".into(),
        });
    }
    Ok(Artefact { dir: dir.into(), digest: digest_of(&files), files })
}

/// Plain files below `dir`, but for an older manifest. Links, devices and pickles have no place in an artefact.
fn walk(dir: &Path, below: &str, paths: &mut Vec<String>) -> Result<(), SourceError> {
    let at = |e| SourceError::io(dir, e);
    for entry in std::fs::read_dir(dir).map_err(at)? {
        let entry = entry.map_err(at)?;
        let name = entry.file_name().into_string().map_err(|name| SourceError::UnsafeName {
            name: name.to_string_lossy().into_owned(),
            problem: "it must be UTF-8",
        })?;
        let path = if below.is_empty() { name } else { format!("{below}/{name}") };
        let kind = entry.file_type().map_err(at)?;
        if path == MANIFEST {
            continue;
        }
        if path.ends_with(PARTIAL) || path == UNFINISHED {
            return Err(SourceError::UnsafeName {
                name: path,
                problem: "it is the mark of an unfinished file",
            });
        }
        names::check_path(&path)?;
        if kind.is_dir() {
            walk(&entry.path(), &path, paths)?;
        } else if !kind.is_file() {
            return Err(SourceError::UnsafeName {
                name: path,
                problem: "an artefact holds plain files and folders",
            });
        } else if names::is_pickle(&path) {
            return Err(SourceError::PickleRefused { what: dir.display().to_string(), files: path });
        } else {
            paths.push(path);
        }
    }
    Ok(())
}
