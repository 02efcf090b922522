//! Whether files of a volume are still those that were hashed once: names, sizes, and samples of what they hold.
//!
//! It finds what happens to files: one is replaced, cut, trained further, converted. A change that spares every sample goes
//! unseen, so a fingerprint never takes the place of a digest; it says that a digest need not be computed again.
use std::fs::File;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::digest::{Digest, FileEntry, FileHash, digest_of};
use crate::disk::{blocking, hash_file, read_at};
use crate::error::SourceError;
use crate::fetch::Fetched;
use crate::local;
use crate::location::{Address, Location};
use crate::options::Options;

/// Files up to this size are read as a whole.
const WHOLE: u64 = 2 << 20;
/// Bytes of a sample.
const SAMPLE: u64 = 64 << 10;
/// Samples of a larger file: its begin, its end, and others at equal distances.
const SAMPLES: u64 = 32;

/// The fingerprint of a `pvc://` location; `None` for all others, whose files are checked as they are fetched.
///
/// # Errors
/// As [`crate::fetch`].
pub async fn fingerprint(
    location: &Location,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Option<Digest>, SourceError> {
    Ok(of(location, options, cancel).await?.map(|(_, mark)| mark))
}

/// The files of a `pvc://` location with a pinned digest, where they still have the fingerprint that was taken when that digest
/// was computed. They are not hashed: [`Fetched::files`] is empty.
///
/// # Errors
/// As [`crate::fetch`].
pub async fn unchanged(
    location: &Location,
    expected: &str,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Option<Fetched>, SourceError> {
    let Some(digest) = location.digest() else { return Ok(None) };
    let found = of(location, options, cancel).await?.filter(|(_, mark)| mark.to_string() == expected);
    Ok(found.map(|(dir, _)| Fetched { dir, files: Vec::new(), digest, revision: None, _in_use: None }))
}

async fn of(
    location: &Location,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Option<(std::path::PathBuf, Digest)>, SourceError> {
    if !matches!(location.address(), Address::Pvc { .. }) {
        return Ok(None);
    }
    let (place, opts, cancel) = (location.clone(), options.clone(), cancel.clone());
    blocking(move || {
        let local = local::list(&place, &opts)?;
        let entry = |(path, size): (String, u64)| {
            let sha256 = sampled(&local.dir.join(&path), size, &cancel)?;
            Ok(FileEntry { path, size, sha256 })
        };
        let entries = local.files.into_iter().map(entry).collect::<Result<Vec<_>, SourceError>>()?;
        Ok(Some((local.dir, digest_of(&entries))))
    })
    .await
}

fn sampled(path: &Path, size: u64, cancel: &CancellationToken) -> Result<FileHash, SourceError> {
    if size <= WHOLE {
        return hash_file(path, cancel).map(|(_, hash)| hash);
    }
    let at = |e| SourceError::io(path, e);
    let (file, mut hash) = (File::open(path).map_err(at)?, Sha256::new());
    let last = size - SAMPLE;
    for sample in 0..SAMPLES {
        if cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        // In two steps: a file may be larger than its product with a number.
        let from = last / (SAMPLES - 1) * sample + last % (SAMPLES - 1) * sample / (SAMPLES - 1);
        hash.update(read_at(&file, from, SAMPLE as usize).map_err(at)?);
    }
    Ok(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_counts_and_the_last_is_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (path, never) = (dir.path().join("w"), CancellationToken::new());
        let size = 5 << 20;
        let mut bytes = vec![7_u8; size];
        let mark = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            sampled(&path, bytes.len() as u64, &never).unwrap()
        };
        let before = mark(&bytes);
        for at in [0, SAMPLE as usize - 1, size - 1] {
            bytes[at] ^= 1;
            assert_ne!(mark(&bytes), before, "byte {at}");
            bytes[at] ^= 1;
        }
        // Whatever is trained or converted is another file everywhere.
        assert_ne!(mark(&vec![8; size]), before);
        assert_eq!(mark(&bytes), before);
    }
}
