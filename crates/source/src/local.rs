//! `pvc://`: files of a mounted volume, read in place.
use std::path::{Path, PathBuf};

use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use crate::digest::{Digest, FileEntry, digest_of};
use crate::disk::{HEAD, blocking, hash_file, read_at};
use crate::download::Meter;
use crate::error::SourceError;
use crate::fetch::{Fetched, check_pin};
use crate::location::{Address, Location};
use crate::manifest::{self, MANIFEST};
use crate::options::{LocalCheck, Options, Progress};
use crate::{names, sniff};

/// What a folder or file of a volume holds.
pub(crate) struct Local {
    /// The folder that the names are below.
    pub dir: PathBuf,
    /// Names and sizes.
    pub files: Vec<(String, u64)>,
    /// From a manifest.
    pub recorded: Option<(Vec<FileEntry>, Digest)>,
}

/// Checks the files where they are.
pub(crate) async fn open(
    location: &Location,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Fetched, SourceError> {
    let (place, opts) = (location.clone(), options.clone());
    let local = blocking(move || list(&place, &opts)).await?;
    let total = local.files.iter().map(|f| f.1).sum();
    if total > options.max_bytes {
        return Err(SourceError::TooLarge {
            what: location.to_string(),
            bytes: total,
            limit: options.max_bytes,
        });
    }
    if let (LocalCheck::Sizes, Some((files, digest))) = (options.local_check, &local.recorded) {
        check_pin(location, *digest)?;
        return Ok(Fetched {
            dir: local.dir,
            files: files.clone(),
            digest: *digest,
            revision: None,
            _in_use: None,
        });
    }
    let meter = Meter::new(progress, Some(total));
    let (meter, dir) = (&meter, local.dir.as_path());
    let mut files: Vec<FileEntry> = stream::iter(local.files)
        .map(|(path, size)| async move {
            let (at, cancel) = (dir.join(&path), cancel.clone());
            let (found, sha256) = blocking(move || hash_file(&at, &cancel)).await?;
            if found != size {
                return Err(SourceError::Changed { what: path });
            }
            meter.add(&path, found as i64);
            Ok(FileEntry { path, size: found, sha256 })
        })
        .buffer_unordered(options.parallel.max(1))
        .try_collect()
        .await?;
    files.sort();
    let digest = digest_of(&files);
    if let Some((_, recorded)) = local.recorded
        && recorded != digest
    {
        return Err(SourceError::DigestMismatch { expected: recorded, found: digest });
    }
    check_pin(location, digest)?;
    Ok(Fetched { dir: local.dir, files, digest, revision: None, _in_use: None })
}

/// The files of a manifest, else those of the allow-list, else the one file that the address names.
pub(crate) fn list(location: &Location, options: &Options) -> Result<Local, SourceError> {
    let Address::Pvc { claim, path } = location.address() else {
        return Err(SourceError::InvalidLocation {
            uri: location.to_string(),
            problem: "it is not pvc://".into(),
        });
    };
    let root = root(claim, options)?;
    let target = root.join(path);
    let what = location.to_string();
    within(&root, &target, &what)?;
    if target.is_file() {
        let name = names::last(path);
        names::check_single(&what, name)?;
        let dir = target.parent().unwrap_or(&root).to_path_buf();
        let files = vec![(name.to_string(), look(&root, &dir, name, &what)?)];
        return Ok(Local { dir, files, recorded: None });
    }
    list_dir(&root, target, &what)
}

/// The same for a folder of this machine that is no volume: an artefact before it is written somewhere.
pub(crate) fn list_dir(root: &Path, dir: PathBuf, what: &str) -> Result<Local, SourceError> {
    let recorded = match std::fs::metadata(dir.join(MANIFEST)) {
        Ok(m) if m.len() > manifest::MAX_BYTES => {
            return Err(SourceError::TooLarge {
                what: MANIFEST.into(),
                bytes: m.len(),
                limit: manifest::MAX_BYTES,
            });
        }
        Ok(_) => {
            let path = dir.join(MANIFEST);
            Some(manifest::read(&std::fs::read(&path).map_err(|e| SourceError::io(&path, e))?)?)
        }
        Err(_) => None,
    };
    let paths: Vec<String> = match &recorded {
        Some((files, _)) => files.iter().map(|f| f.path.clone()).collect(),
        None => {
            let mut all = Vec::new();
            for entry in std::fs::read_dir(&dir).map_err(|e| SourceError::io(&dir, e))? {
                let entry = entry.map_err(|e| SourceError::io(&dir, e))?;
                all.extend(entry.file_name().into_string().ok());
            }
            all.sort();
            names::select(what, all, |name| name)?
        }
    };
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        let size = look(root, &dir, &path, what)?;
        files.push((path, size));
    }
    for (entry, (_, size)) in recorded.iter().flat_map(|r| &r.0).zip(&files) {
        if entry.size != *size {
            return Err(SourceError::malformed(
                &entry.path,
                format!("it has {size} bytes, its manifest says {}", entry.size),
            ));
        }
    }
    Ok(Local { dir, files, recorded })
}

/// The folder where a claim is mounted, free of links.
pub(crate) fn root(claim: &str, options: &Options) -> Result<PathBuf, SourceError> {
    let Some(mount) = options.mounts.get(claim) else {
        let known: Vec<&str> = options.mounts.keys().map(String::as_str).collect();
        let mounted = if known.is_empty() { "none".into() } else { known.join(", ") };
        return Err(SourceError::ClaimNotMounted { claim: claim.into(), mounted });
    };
    mount.canonicalize().map_err(|e| SourceError::io(mount, e))
}

/// Refuses a path that a link leads out of the volume. Links inside of it are fine.
pub(crate) fn within(root: &Path, path: &Path, what: &str) -> Result<(), SourceError> {
    let real = path.canonicalize().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => SourceError::NotFound {
            what: what.into(),
            next: "check the path below the claim and that its writer has finished".into(),
        },
        _ => SourceError::io(path, e),
    })?;
    if real.starts_with(root) {
        return Ok(());
    }
    Err(SourceError::UnsafeName { name: what.into(), problem: "a link leads out of the volume" })
}

/// Size of a file below `dir` that is a plain file inside the volume and no pickle.
fn look(root: &Path, dir: &Path, name: &str, what: &str) -> Result<u64, SourceError> {
    let path = dir.join(name);
    within(root, &path, &format!("{what}/{name}"))?;
    let at = |e| SourceError::io(&path, e);
    let size = match std::fs::metadata(&path).map_err(at)? {
        m if m.is_file() => m.len(),
        _ => return Err(SourceError::malformed(name, "it is not a plain file")),
    };
    let head = std::fs::File::open(&path).and_then(|f| read_at(&f, 0, HEAD)).map_err(at)?;
    sniff::check(name, &head, size)?;
    Ok(size)
}
