//! What a model is, without its weights: small files whole, of weights only their headers.
use std::collections::BTreeMap;
use std::path::PathBuf;

use futures::{StreamExt, TryStreamExt, stream};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::card::card_license;
use crate::digest::{Digest, FileEntry, FileHash, digest_of};
use crate::disk::{blocking, read_at};
use crate::error::SourceError;
use crate::fetch::check_pin;
use crate::location::Location;
use crate::options::Options;
use crate::remote::{Listing, Remote, RemoteFile};
use crate::safetensors::{self, Tensor};
use crate::{local, names};

/// Read with the first request of a weights file: nearly every header fits.
const FIRST_READ: u64 = 256 << 10;

/// A location without its weights.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    /// Small files by name (`config.json`, `tokenizer.json`, `README.md`, ...), whole.
    pub small: BTreeMap<String, Vec<u8>>,
    /// The tensors of each `*.safetensors` file, by file and by tensor name.
    pub weights: BTreeMap<String, BTreeMap<String, Tensor>>,
    /// Bytes of all files, as far as they are told.
    pub bytes: u64,
    /// The commit, of a hub.
    pub revision: Option<String>,
    /// The licence that the model card names (`license:` in its front matter), lower case.
    pub license: Option<String>,
    /// The digest of the whole, where the source tells the sha256 of what was not read (hub, manifest). Not checked
    /// against the bytes: [`crate::fetch`] does that.
    pub digest: Option<Digest>,
}

impl Headers {
    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.tensors().map(Tensor::elements).fold(0, u64::saturating_add)
    }

    /// Bytes of weights by element type (`BF16`).
    pub fn bytes_by_dtype(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for tensor in self.tensors() {
            let sum: &mut u64 = sums.entry(tensor.dtype.clone()).or_default();
            *sum = sum.saturating_add(tensor.bytes);
        }
        sums
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.weights.values().flat_map(BTreeMap::values)
    }
}

/// Where headers are read from.
enum Place {
    Remote(Box<Remote>, Listing),
    Local(PathBuf),
}

/// Reads everything but weights and datasets: of a `*.safetensors` file only its header, by range.
///
/// # Errors
/// As [`crate::fetch`].
pub async fn headers(
    location: &Location,
    options: &Options,
    cancel: &CancellationToken,
) -> Result<Headers, SourceError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(SourceError::Cancelled),
        headers = read(location, options) => headers,
    }
}

async fn read(location: &Location, options: &Options) -> Result<Headers, SourceError> {
    let (place, files) = list(location, options).await?;
    let (place, mut headers) = (&place, Headers::default());
    let parts: Vec<Part> = stream::iter(files)
        .map(|file| async move { part(place, &file, options).await })
        .buffer_unordered(options.parallel.max(1))
        .try_collect()
        .await?;
    let mut entries = Vec::new();
    for part in parts {
        headers.bytes = headers.bytes.saturating_add(part.size.unwrap_or_default());
        entries.push(part.size.zip(part.sha256).map(|(size, sha256)| FileEntry {
            path: part.path.clone(),
            size,
            sha256,
        }));
        if let Some(bytes) = part.small {
            headers.small.insert(part.path, bytes);
        } else if let Some(tensors) = part.tensors {
            headers.weights.insert(part.path, tensors);
        }
    }
    let license = headers.small.get("README.md").and_then(|card| card_license(card));
    headers.license = license.map(|license| license.name.unwrap_or(license.license));
    headers.digest = entries.into_iter().collect::<Option<Vec<FileEntry>>>().map(|e| digest_of(&e));
    if let Place::Remote(_, listing) = place {
        headers.revision = listing.revision.clone();
    }
    match headers.digest {
        Some(found) => check_pin(location, found).map(|()| headers),
        None => Ok(headers),
    }
}

async fn list(location: &Location, options: &Options) -> Result<(Place, Vec<RemoteFile>), SourceError> {
    if let Some(remote) = Remote::of(location, options)? {
        let listing = remote.list(options).await?;
        crate::fetch::check_listing(&listing, options.max_bytes)?;
        let files = listing.files.clone();
        return Ok((Place::Remote(Box::new(remote), listing), files));
    }
    let (place, opts) = (location.clone(), options.clone());
    let local = blocking(move || local::list(&place, &opts)).await?;
    let known: BTreeMap<String, FileHash> =
        local.recorded.into_iter().flat_map(|r| r.0).map(|f| (f.path, f.sha256)).collect();
    let file = |(path, size): (String, u64)| RemoteFile {
        sha256: known.get(&path).copied(),
        path,
        size: Some(size),
        validator: None,
    };
    Ok((Place::Local(local.dir), local.files.into_iter().map(file).collect()))
}

/// What is learned of one file.
struct Part {
    path: String,
    size: Option<u64>,
    sha256: Option<FileHash>,
    small: Option<Vec<u8>>,
    tensors: Option<BTreeMap<String, Tensor>>,
}

async fn part(place: &Place, file: &RemoteFile, options: &Options) -> Result<Part, SourceError> {
    let mut part =
        Part { path: file.path.clone(), size: file.size, sha256: file.sha256, small: None, tensors: None };
    if names::is_weights(&file.path) {
        let mut bytes = read_range(place, file, 0, FIRST_READ, options).await?;
        let length = safetensors::header_length(&file.path, &bytes, file.size)?;
        let end = 8 + length;
        if (bytes.len() as u64) < end {
            let from = bytes.len() as u64;
            bytes.extend(read_range(place, file, from, end, options).await?);
        }
        let header = bytes
            .get(8..end as usize)
            .ok_or_else(|| SourceError::malformed(&file.path, "it ends within its header"))?;
        part.tensors = Some(safetensors::parse(&file.path, header, file.size)?);
    } else if !file.path.ends_with(".jsonl") {
        let bytes = match place {
            Place::Remote(remote, listing) => remote.read_small(listing, file, options).await?,
            Place::Local(_) => {
                read_range(place, file, 0, names::cap(&file.path, options.max_bytes), options).await?
            }
        };
        let sha256: FileHash = Sha256::digest(&bytes).into();
        if let Some(expected) = file.sha256.filter(|e| *e != sha256) {
            return Err(SourceError::ChecksumMismatch {
                file: file.path.clone(),
                expected: hex::encode(expected),
                found: hex::encode(sha256),
            });
        }
        (part.size, part.sha256, part.small) = (Some(bytes.len() as u64), Some(sha256), Some(bytes));
    }
    Ok(part)
}

async fn read_range(
    place: &Place,
    file: &RemoteFile,
    from: u64,
    to: u64,
    options: &Options,
) -> Result<Vec<u8>, SourceError> {
    match place {
        Place::Remote(remote, listing) => remote.read_range(listing, file, from, to, options).await,
        Place::Local(dir) => {
            let path = dir.join(&file.path);
            let len = to.min(file.size.unwrap_or(to)).saturating_sub(from) as usize;
            blocking(move || {
                std::fs::File::open(&path)
                    .and_then(|f| read_at(&f, from, len))
                    .map_err(|e| SourceError::io(&path, e))
            })
            .await
        }
    }
}
