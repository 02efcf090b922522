//! An artefact onto a mounted volume: copied beside its place, then moved there at once.
//!
//! Writers may meet here (a pod that still ends and its successor), on nodes between which no lock holds. Each copies into
//! a folder of its own name, and takes away what others left or still fill: whoever loses its folder ends, and what gets
//! the final name was filled by one writer alone.
use std::fs::File;
use std::io::{ErrorKind, Read};
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
    let Some(staging) = prepare(&root, &place, artefact.digest, &what)? else { return Ok(()) };
    let written = fill(artefact, &staging, &place, meter, cancel).await;
    let Err(error) = written else { return Ok(()) };
    // The volume is the user's: its space is given back, the next try begins anew in any case.
    let mine = staging.clone();
    let removed = blocking(move || take_away(&mine)).await;
    if let Err(error) = removed {
        tracing::warn!(%error, "could not remove an unfinished copy");
    }
    match error {
        SourceError::Cancelled => Err(error),
        // Somebody else was quicker, with the same bytes or with others.
        _ if holds(&place, artefact.digest, &what)? => Ok(()),
        error => Err(error),
    }
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
    blocking(move || move_to(&staging, &place, &manifest, &files, &cancel)).await
}

/// An artefact that lies beside its place already: nothing is copied.
pub(crate) async fn settle(
    artefact: &Artefact,
    claim: &str,
    path: &str,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    let (place, what) = (local::root(claim, options)?.join(path), format!("pvc://{claim}/{path}"));
    if holds(&place, artefact.digest, &what)? {
        return Ok(());
    }
    let (manifest, files, cancel) = (artefact.manifest()?, artefact.files.clone(), cancel.clone());
    let (dir, to) = (artefact.dir.clone(), place.clone());
    let moved = blocking(move || {
        for file in &files {
            let path = dir.join(&file.path);
            File::open(&path).and_then(|file| file.sync_all()).map_err(|e| SourceError::io(&path, e))?;
        }
        move_to(&dir, &to, &manifest, &files, &cancel)
    });
    match moved.await {
        Err(SourceError::Cancelled) => Err(SourceError::Cancelled),
        // Somebody else was quicker, with the same bytes or with others.
        Err(_) if holds(&place, artefact.digest, &what)? => Ok(()),
        moved => moved,
    }
}

/// Writes the manifest, makes the folder's names durable and gives it its name.
fn move_to(
    dir: &Path,
    place: &Path,
    manifest: &[u8],
    files: &[FileEntry],
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    let lost = || SourceError::Incomplete { what: place.display().to_string() };
    write_whole(&dir.join(MANIFEST), manifest, cancel)?;
    for file in files {
        if let Some(folder) = dir.join(&file.path).parent() {
            sync_dir(folder)?;
        }
    }
    sync_dir(dir)?;
    // Somebody else may have taken the folder away, and a file made since then has made it anew.
    if !files.iter().all(|file| is_whole(dir, file)) {
        return Err(lost());
    }
    std::fs::rename(dir, place).map_err(|e| match e.kind() {
        ErrorKind::NotFound => lost(),
        _ => SourceError::io(place, e),
    })?;
    sync_dir(place.parent().unwrap_or(place))
}

/// An empty folder beside the place, this writer's alone; `None` where the same artefact is there already.
fn prepare(root: &Path, place: &Path, digest: Digest, what: &str) -> Result<Option<PathBuf>, SourceError> {
    let parent = place.parent().unwrap_or(root);
    make_folders(root, parent, what)?;
    if holds(place, digest, what)? {
        return Ok(None);
    }
    new_folder(place).map(Some)
}

/// Makes `folder` one by one, so that no link on the way leads out of the volume.
pub(crate) fn make_folders(root: &Path, folder: &Path, what: &str) -> Result<(), SourceError> {
    let mut at = root.to_path_buf();
    for part in folder.strip_prefix(root).unwrap_or(Path::new("")) {
        at.push(part);
        match std::fs::create_dir(&at) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(SourceError::io(&at, e)),
            _ => local::within(root, &at, what)?,
        }
    }
    Ok(())
}

/// An empty folder `.<name>.<token>.partial` beside the place, this writer's alone; those of others for it go.
pub(crate) fn new_folder(place: &Path) -> Result<PathBuf, SourceError> {
    let parent = place.parent().unwrap_or(place);
    let begin = format!(".{}.", place.file_name().unwrap_or_default().to_string_lossy());
    for entry in std::fs::read_dir(parent).map_err(|e| SourceError::io(parent, e))? {
        let entry = entry.map_err(|e| SourceError::io(parent, e))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let token = name.strip_prefix(&begin).and_then(|rest| rest.strip_suffix(PARTIAL));
        if token.is_some_and(|token| token.len() == TOKEN && token.bytes().all(|b| b.is_ascii_hexdigit())) {
            take_away(&entry.path())?;
        }
    }
    let folder = unfinished(place);
    std::fs::create_dir(&folder).map_err(|e| SourceError::io(&folder, e))?;
    Ok(folder)
}

/// Digits that tell one writer's folder from another's.
const TOKEN: usize = 16;

/// `.<name>.<token>.partial` beside the place, like no other.
pub(crate) fn unfinished(place: &Path) -> PathBuf {
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    place.with_file_name(format!(".{name}.{:0TOKEN$x}{PARTIAL}", rand::random::<u64>()))
}

/// Removes a folder that may still be filled: it goes under another name first, so that whoever fills it finds it gone as
/// a whole and never moves half of it to its place. One that is gone already is no error.
pub(crate) fn take_away(dir: &Path) -> Result<(), SourceError> {
    let mut name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Of the same form, so that the next writer finds it if this one is killed here.
    let end = name.len().saturating_sub(PARTIAL.len() + TOKEN);
    name.replace_range(end.., &format!("{:0TOKEN$x}{PARTIAL}", rand::random::<u64>()));
    let gone = dir.with_file_name(name);
    match std::fs::rename(dir, &gone) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        renamed => renamed.map_err(|e| SourceError::io(dir, e))?,
    }
    match std::fs::remove_dir_all(&gone) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(SourceError::io(&gone, e)),
        _ => Ok(()),
    }
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
    if files.iter().all(|file| is_whole(place, file)) {
        Ok(true)
    } else {
        Err(exists("it holds a damaged copy of this artefact"))
    }
}

fn is_whole(dir: &Path, file: &FileEntry) -> bool {
    std::fs::metadata(dir.join(&file.path)).is_ok_and(|m| m.is_file() && m.len() == file.size)
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
