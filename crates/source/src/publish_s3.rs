//! An artefact below a prefix of a bucket: a mark first, the manifest last.
//!
//! Of two writers that meet below a prefix, the mark belongs to the later one. Where their content is the same, as under an
//! artefact's digest, both may go on: an object is replaced as a whole, and by its equal. Where it is not, the earlier one
//! ends before it writes a manifest over files that are not its own.
use std::fs::File;

use bytes::Bytes;
use futures::{StreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::digest::FileEntry;
use crate::disk::{blocking, read_at};
use crate::download::Meter;
use crate::error::SourceError;
use crate::manifest::{self, MANIFEST};
use crate::options::Options;
use crate::publish::{Artefact, UNFINISHED};
use crate::s3::{S3, explain};

/// Bytes of a part. S3 allows 10 000 parts, so the part grows with the file.
const PART: u64 = 16 << 20;
const MAX_PARTS: u64 = 9_000;
/// Parts of one file under way.
const PARTS_AT_ONCE: usize = 3;

pub(crate) async fn write(
    artefact: &Artefact,
    bucket: &str,
    prefix: &str,
    options: &Options,
    meter: &Meter<'_>,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    let s3 = S3::new(bucket, prefix, &options.credentials, options)?;
    if !prepare(&s3, artefact).await? {
        return Ok(());
    }
    // One failure stops the others, and all are awaited so that each can abort its parts.
    let stop = &cancel.child_token();
    let s3 = &s3;
    let uploads = stream::iter(artefact.files.clone())
        .map(|file| async move { upload(s3, artefact, &file, meter, stop).await });
    let mut outcome = Ok(());
    let mut uploads = uploads.buffer_unordered(options.parallel.clamp(1, 4));
    while let Some(uploaded) = uploads.next().await {
        if uploaded.is_err() && outcome.is_ok() {
            stop.cancel();
            outcome = uploaded;
        }
    }
    outcome?;
    is_ours(s3, artefact.digest).await?;
    put(s3, MANIFEST, artefact.manifest()?).await?;
    is_ours(s3, artefact.digest).await?;
    unmark(s3).await
}

/// Ends where a later writer has begun to replace what is here by other content, or has done so.
async fn is_ours(s3: &S3, digest: crate::Digest) -> Result<(), SourceError> {
    match s3.mark().await? {
        Some(mark) if mark == digest.to_string() => Ok(()),
        Some(_) => Err(SourceError::Incomplete { what: s3.shown() }),
        None => match recorded(s3).await? {
            Some(found) if found != digest => Err(taken(s3, found)),
            _ => Ok(()),
        },
    }
}

fn taken(s3: &S3, found: crate::Digest) -> SourceError {
    SourceError::AlreadyExists { what: s3.shown(), problem: format!("it holds the artefact {found}") }
}

async fn unmark(s3: &S3) -> Result<(), SourceError> {
    s3.store.delete(&s3.key(UNFINISHED)?).await.map_err(|e| explain(e, &s3.shown()))
}

/// Sets the mark and removes what a broken upload left. `false` where the same artefact is there already.
async fn prepare(s3: &S3, artefact: &Artefact) -> Result<bool, SourceError> {
    let prefix = s3.key("")?;
    let failed = |e| explain(e, &s3.shown());
    let mut listed = s3.store.list(Some(&prefix));
    let mut there: Vec<Path> = Vec::new();
    let limit = artefact.files.len() + 10_000;
    while let Some(meta) = listed.next().await {
        there.push(meta.map_err(failed)?.location);
        if there.len() > limit {
            return Err(SourceError::AlreadyExists {
                what: s3.shown(),
                problem: format!("it holds more than {limit} objects"),
            });
        }
    }
    let mark = s3.key(UNFINISHED)?;
    if !there.is_empty() && !there.contains(&mark) {
        return match recorded(s3).await? {
            Some(found) if found == artefact.digest => Ok(false),
            Some(found) => Err(taken(s3, found)),
            None => Err(SourceError::AlreadyExists {
                what: s3.shown(),
                problem: "it holds objects that are no artefact of Lathe".into(),
            }),
        };
    }
    let mut same = Vec::new();
    if there.contains(&mark) && s3.mark().await? == Some(artefact.digest.to_string()) {
        if recorded(s3).await? == Some(artefact.digest) {
            // All is there; its writer ended before it could say so.
            unmark(s3).await?;
            return Ok(false);
        }
        // It may still be at work: what it wrote is what we write.
        let names = artefact.files.iter().map(|file| file.path.as_str()).chain([MANIFEST]);
        same = names.map(|name| s3.key(name)).collect::<Result<Vec<_>, _>>()?;
    }
    put(s3, UNFINISHED, artefact.digest.to_string().into_bytes()).await?;
    // The manifest goes first: were this to break too, no old manifest may stand over new files.
    let manifest = s3.key(MANIFEST)?;
    there.sort_by_key(|key| *key != manifest);
    for key in there.iter().filter(|key| **key != mark && !same.contains(key)) {
        s3.store.delete(key).await.map_err(failed)?;
    }
    Ok(true)
}

/// The digest of the manifest below the prefix, where there is one that can be read.
async fn recorded(s3: &S3) -> Result<Option<crate::Digest>, SourceError> {
    let got = match s3.store.get(&s3.key(MANIFEST)?).await {
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        got => got.map_err(|e| explain(e, &s3.shown()))?,
    };
    if got.meta.size > manifest::MAX_BYTES {
        return Ok(None);
    }
    let bytes = got.bytes().await.map_err(|e| explain(e, &s3.shown()))?;
    Ok(manifest::read(&bytes).ok().map(|(_, digest)| digest))
}

async fn put(s3: &S3, name: &str, bytes: Vec<u8>) -> Result<(), SourceError> {
    let put = s3.store.put(&s3.key(name)?, PutPayload::from(bytes)).await;
    put.map(|_| ()).map_err(|e| explain(e, &format!("{}/{name}", s3.shown())))
}

/// One file, in parts where it is large, checked on the way to be still what was hashed.
async fn upload(
    s3: &S3,
    artefact: &Artefact,
    file: &FileEntry,
    meter: &Meter<'_>,
    cancel: &CancellationToken,
) -> Result<(), SourceError> {
    if cancel.is_cancelled() {
        return Err(SourceError::Cancelled);
    }
    is_ours(s3, artefact.digest).await?;
    let path = artefact.dir.join(&file.path);
    let what = format!("{}/{}", s3.shown(), file.path);
    let part = PART.max(file.size.div_ceil(MAX_PARTS));
    let mut hash = Sha256::new();
    let changed = || SourceError::Changed { what: file.path.clone() };
    if file.size <= part {
        let bytes = block(&path, 0, part).await?;
        hash.update(&bytes);
        if hash.finalize()[..] != file.sha256 {
            return Err(changed());
        }
        put(s3, &file.path, bytes.to_vec()).await?;
        meter.add(&file.path, file.size as i64);
        return Ok(());
    }
    let begun = s3.store.put_multipart(&s3.key(&file.path)?).await.map_err(|e| explain(e, &what))?;
    let mut parts = WriteMultipart::new_with_chunk_size(begun, part as usize);
    let mut at = 0;
    let sent = loop {
        if let Err(e) = parts.wait_for_capacity(PARTS_AT_ONCE).await {
            break Err(explain(e, &what));
        }
        let bytes = match block(&path, at, part).await {
            Ok(bytes) if bytes.is_empty() => break Ok(()),
            Ok(bytes) => bytes,
            Err(error) => break Err(error),
        };
        hash.update(&bytes);
        at += bytes.len() as u64;
        meter.add(&file.path, bytes.len() as i64);
        if cancel.is_cancelled() {
            break Err(SourceError::Cancelled);
        }
        parts.put(bytes);
    };
    let sent = sent.and_then(|()| if hash.finalize()[..] == file.sha256 { Ok(()) } else { Err(changed()) });
    match sent {
        Ok(()) => parts.finish().await.map(|_| ()).map_err(|e| explain(e, &what)),
        Err(error) => {
            // Parts that nobody completes cost storage until they are aborted.
            if let Err(e) = parts.abort().await {
                tracing::warn!(file = %what, error = %e, "could not abort an upload");
            }
            Err(error)
        }
    }
}

async fn block(path: &std::path::Path, from: u64, len: u64) -> Result<Bytes, SourceError> {
    let path = path.to_path_buf();
    blocking(move || {
        File::open(&path)
            .and_then(|f| read_at(&f, from, len as usize))
            .map(Bytes::from)
            .map_err(|e| SourceError::io(&path, e))
    })
    .await
}
