//! From a location to checked files on disk.
use std::collections::BTreeSet;
use std::path::PathBuf;

use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use crate::cache::{InUse, Slot};
use crate::digest::{Digest, FileEntry, digest_of};
use crate::disk::{blocking, check_space, free_space, sync_dir, write_whole};
use crate::download::{Download, Meter};
use crate::error::SourceError;
use crate::location::Location;
use crate::manifest::{self, MANIFEST};
use crate::options::{Options, Progress};
use crate::remote::{Listing, Remote};
use crate::{evict, local, names};

const MAX_FILES: usize = 10_000;
/// Listings of a source that changes while it is read.
const ROUNDS: usize = 3;

/// Checked files on disk.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The folder that holds them: in the cache, or where the volume is mounted.
    pub dir: PathBuf,
    /// The files, sorted by path.
    pub files: Vec<FileEntry>,
    /// The identity of the files.
    pub digest: Digest,
    /// The commit, of a hub.
    pub revision: Option<String>,
    /// As long as this or a clone of it is there, the cache keeps the files.
    pub(crate) _in_use: Option<InUse>,
}

impl Fetched {
    /// The path of the one file, where the location is a file.
    pub fn file(&self) -> Option<PathBuf> {
        match self.files.as_slice() {
            [file] => Some(self.dir.join(&file.path)),
            _ => None,
        }
    }
}

/// Brings what `location` names onto this machine's disk and checks it.
///
/// A server's files go to `options.cache`, resumed where an earlier try stopped, and appear there only when all of them
/// are whole and fit the checksums that the source gives and the digest that the location pins; the same content is
/// not read twice. Where the cache has no room for it, what nobody uses goes. A volume's files stay where they are and are hashed. Cancelling stops at once and keeps what was
/// read for the next try.
///
/// # Errors
/// See [`SourceError`]; [`SourceError::fault`] says whether trying again later can help.
pub async fn fetch(
    location: &Location,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Fetched, SourceError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(SourceError::Cancelled),
        fetched = rounds(location, options, progress, cancel) => fetched,
    }
}

async fn rounds(
    location: &Location,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Fetched, SourceError> {
    let Some(remote) = Remote::of(location, options)? else {
        return local::open(location, options, progress, cancel).await;
    };
    let mut round = 1;
    loop {
        match once(location, &remote, options, progress, cancel).await {
            Err(SourceError::Changed { what }) if round < ROUNDS => {
                tracing::info!(%what, "the source changed while it was read; reading it anew");
                round += 1;
            }
            fetched => return fetched,
        }
    }
}

async fn once(
    location: &Location,
    remote: &Remote,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Fetched, SourceError> {
    let listing = remote.list(options).await?;
    let total = check_listing(&listing, options.max_bytes)?;
    if let Some(found) = listing.digest {
        check_pin(location, found)?;
    }
    let slot = Slot::lock(&options.cache, &listing).await?;
    let revision = listing.revision.clone();
    if let Some((files, digest)) = slot.complete().filter(|_| listing.immutable) {
        check_pin(location, digest)?;
        let _in_use = Some(slot.hold()?);
        return Ok(Fetched { dir: slot.whole, files, digest, revision, _in_use });
    }
    make_room(location, options, total, &slot).await?;
    let meter = Meter::new(progress, total);
    let download = Download { remote, listing: &listing, options, meter: &meter, cancel };
    match fill(&download, &slot).await {
        Ok((files, digest)) => {
            if let Err(error) = check_pin(location, digest) {
                slot.clear()?;
                return Err(error);
            }
            slot.publish()?;
            let _in_use = Some(slot.hold()?);
            Ok(Fetched { dir: slot.whole, files, digest, revision, _in_use })
        }
        Err(error @ (SourceError::Changed { .. } | SourceError::PickleRefused { .. })) => {
            // A file that is still being written may stand in the way. That is not the cause to tell: what is left lies
            // under no final name and under a key of its own.
            if let Err(left) = slot.clear() {
                tracing::debug!(%left, "an unfinished download is not removed yet");
            }
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Evicts what the cache's limit or the disk leaves no room for beside `incoming` bytes more.
async fn make_room(
    location: &Location,
    options: &Options,
    incoming: Option<u64>,
    slot: &Slot,
) -> Result<(), SourceError> {
    let (cache, room, what) = (options.cache.clone(), options.cache_room, location.to_string());
    let limit = room.unwrap_or(u64::MAX).min(options.cache_bytes);
    let (incoming, partial) = (incoming.unwrap_or(0), slot.partial.clone());
    blocking(move || {
        let within_limit = limit.saturating_sub(incoming);
        let short = incoming.saturating_sub(free_space(&cache)?);
        let on_disk = if short > 0 { evict::size(&cache)?.saturating_sub(short) } else { u64::MAX };
        evict::evict(&cache, within_limit.min(on_disk))?;
        let Some(room) = room else { return Ok(()) };
        // Bytes of an earlier try are among those that are there.
        let others = evict::bytes_in(&cache).saturating_sub(evict::bytes_in(&partial));
        let room = room.saturating_sub(others);
        if incoming > room { Err(SourceError::NoRoom { what, needed: incoming, room }) } else { Ok(()) }
    })
    .await
}

/// Reads all files into the slot's unfinished folder, and their manifest last.
async fn fill(download: &Download<'_>, slot: &Slot) -> Result<(Vec<FileEntry>, Digest), SourceError> {
    let dir = slot.partial.as_path();
    std::fs::create_dir_all(dir).map_err(|e| SourceError::io(dir, e))?;
    if let Some(total) = download.meter.total {
        check_space(dir, total.saturating_sub(evict::bytes_in(dir)))?;
    }
    let mut files: Vec<FileEntry> = stream::iter(download.listing.files.clone())
        .map(|file| async move { download.run(&file, &dir.join(&file.path)).await })
        .buffer_unordered(download.options.parallel.max(1))
        .try_collect()
        .await?;
    files.sort();
    let digest = digest_of(&files);
    if download.listing.digest.is_some_and(|told| told != digest) {
        return Err(SourceError::malformed(MANIFEST, "its digest is not that of the files"));
    }
    let (text, cancel, at) = (manifest::write(&files)?, download.cancel.clone(), dir.to_path_buf());
    let folders: BTreeSet<PathBuf> =
        files.iter().filter_map(|f| Some(dir.join(&f.path).parent()?.to_path_buf())).collect();
    blocking(move || {
        write_whole(&at.join(MANIFEST), &text, &cancel)?;
        folders.iter().try_for_each(|folder| sync_dir(folder))?;
        sync_dir(&at)
    })
    .await?;
    Ok((files, digest))
}

/// The bytes of all files where every size is known.
pub(crate) fn check_listing(listing: &Listing, max_bytes: u64) -> Result<Option<u64>, SourceError> {
    let what = || crate::error::printable(&listing.identity);
    let count = listing.files.len();
    if count > MAX_FILES {
        return Err(SourceError::malformed(
            what(),
            format!("it has {count} files; at most {MAX_FILES} are read"),
        ));
    }
    let mut seen = BTreeSet::new();
    let mut total = Some(0u64);
    for file in &listing.files {
        names::check_path(&file.path)?;
        if file.path == MANIFEST || !seen.insert(&file.path) {
            return Err(SourceError::malformed(what(), format!("it lists {} twice", file.path)));
        }
        let limit = names::cap(&file.path, max_bytes);
        if let Some(bytes) = file.size.filter(|size| *size > limit) {
            return Err(SourceError::TooLarge { what: file.path.clone(), bytes, limit });
        }
        total = total.zip(file.size).map(|(sum, size)| sum.saturating_add(size));
    }
    match total {
        Some(bytes) if bytes > max_bytes => {
            Err(SourceError::TooLarge { what: what(), bytes, limit: max_bytes })
        }
        total => Ok(total),
    }
}

/// What was read against what is pinned.
pub(crate) fn check_pin(location: &Location, found: Digest) -> Result<(), SourceError> {
    match location.digest() {
        Some(expected) if expected != found => Err(SourceError::DigestMismatch { expected, found }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::RemoteFile;
    use rstest::rstest;

    #[rstest]
    #[case(&[("a.json", Some(3)), ("b.jsonl", Some(4))], Ok(Some(7)))]
    #[case(&[("a.json", Some(3)), ("b.jsonl", None)], Ok(None))]
    #[case(&[("a.json", Some(3)), ("a.json", Some(3))], Err("Malformed"))]
    #[case(&[("../a.json", Some(3))], Err("UnsafeName"))]
    #[case(&[("a.jsonl", Some(101))], Err("TooLarge"))]
    #[case(&[("a.jsonl", Some(60)), ("b.jsonl", Some(60))], Err("TooLarge"))]
    #[case(&[("a.jsonl", Some(u64::MAX)), ("b.jsonl", Some(u64::MAX))], Err("TooLarge"))]
    fn a_listing_is_not_believed(
        #[case] files: &[(&str, Option<u64>)],
        #[case] expected: Result<Option<u64>, &str>,
    ) {
        let file = |&(path, size): &(&str, Option<u64>)| RemoteFile {
            path: path.into(),
            size,
            sha256: None,
            validator: None,
        };
        let files = files.iter().map(file).collect();
        let listing = Listing {
            files,
            identity: "x".into(),
            revision: None,
            immutable: true,
            digest: None,
            single: false,
        };
        assert_eq!(check_listing(&listing, 100).map_err(|e| e.reason()), expected);
    }
}
