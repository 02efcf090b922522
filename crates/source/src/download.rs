//! One file from a server to the disk: resumed after every break, never believed before it is whole and checked.
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::attempt::Attempts;
use crate::digest::FileEntry;
use crate::disk::{BLOCK, Partial, blocking};
use crate::error::SourceError;
use crate::options::{Options, Progress, Update};
use crate::remote::{Body, Listing, Remote, RemoteFile};
use crate::{names, sniff};

/// Sums the progress of all files.
pub(crate) struct Meter<'a> {
    pub progress: &'a dyn Progress,
    pub total: Option<u64>,
    done: AtomicI64,
}

impl<'a> Meter<'a> {
    pub fn new(progress: &'a dyn Progress, total: Option<u64>) -> Self {
        Self { progress, total, done: AtomicI64::new(0) }
    }

    /// `file` moved by so many bytes; back where it begins again.
    pub fn add(&self, file: &str, bytes: i64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.progress.update(Update { file, done: done.max(0) as u64, total: self.total });
    }
}

/// Everything that one download needs.
pub(crate) struct Download<'a> {
    pub remote: &'a Remote,
    pub listing: &'a Listing,
    pub options: &'a Options,
    pub meter: &'a Meter<'a>,
    pub cancel: &'a CancellationToken,
}

impl Download<'_> {
    /// Reads `file` to `path`. Bytes of an earlier try that are there already are kept where the server can promise
    /// (validator) or we can check (sha256) that they still fit.
    pub async fn run(&self, file: &RemoteFile, path: &Path) -> Result<FileEntry, SourceError> {
        let keep = file.validator.is_some() || file.sha256.is_some();
        let (last, cancel) = (path.to_path_buf(), self.cancel.clone());
        let mut partial = blocking(move || Partial::open(&last, keep, &cancel)).await?;
        if file.size.is_some_and(|size| partial.len() > size) {
            partial.restart()?;
        }
        let mut resumed = partial.len() > 0;
        self.meter.add(&file.path, partial.len() as i64);
        let mut attempts = Attempts::new(self.options);
        loop {
            let before = partial.len();
            let outcome;
            (partial, outcome) = self.attempt(file, partial, keep).await?;
            if partial.len() >= before + BLOCK as u64 {
                attempts.progressed();
            }
            match outcome {
                Err(error) => {
                    attempts.pause(error).await?;
                    resumed |= partial.len() > 0;
                }
                Ok(()) => match check(file, &partial) {
                    Ok(entry) => {
                        blocking(move || partial.finish()).await?;
                        return Ok(entry);
                    }
                    // Bytes of two tries that do not fit together: once more, from nothing.
                    Err(error) => {
                        self.restart(file, &mut partial)?;
                        if !std::mem::take(&mut resumed) {
                            return Err(error);
                        }
                    }
                },
            }
        }
    }

    /// One connection. The outer error ends the download, the inner one only this try.
    async fn attempt(
        &self,
        file: &RemoteFile,
        mut partial: Partial,
        keep: bool,
    ) -> Result<(Partial, Result<(), SourceError>), SourceError> {
        if !keep && partial.len() > 0 {
            self.restart(file, &mut partial)?;
        }
        if file.size == Some(partial.len()) {
            return Ok((partial, Ok(())));
        }
        let mut body = match self.remote.read(self.listing, file, partial.len(), None).await {
            Ok(body) => body,
            Err(error) => return Ok((partial, Err(error))),
        };
        self.check_same(file, &body)?;
        if body.start != partial.len() {
            if body.start != 0 {
                return Err(SourceError::malformed(&file.path, "the server answered with another range"));
            }
            self.restart(file, &mut partial)?;
        }
        let limit = file.size.unwrap_or_else(|| names::cap(&file.path, self.options.max_bytes));
        // What has no size is refused as soon as it is too much.
        let room = self.options.cache_room.filter(|room| file.size.is_none() && *room < limit);
        let mut block = BytesMut::with_capacity(BLOCK);
        let outcome = loop {
            let next = tokio::time::timeout(self.options.stall_timeout, body.stream.next()).await;
            let chunk = match next {
                Err(_) => break Err(SourceError::unreachable(&file.path, "the server stopped sending")),
                Ok(None) => break Ok(()),
                Ok(Some(Err(error))) => break Err(error),
                Ok(Some(Ok(chunk))) => chunk,
            };
            let len = partial.len() + (block.len() + chunk.len()) as u64;
            if file.size.is_some_and(|size| len > size) {
                return Err(SourceError::Changed { what: file.path.clone() });
            }
            if let Some(room) = room.filter(|room| len > *room) {
                return Err(SourceError::NoRoom { what: file.path.clone(), needed: len, room });
            }
            if len > limit {
                return Err(SourceError::TooLarge { what: file.path.clone(), bytes: len, limit });
            }
            block.extend_from_slice(&chunk);
            if block.len() >= BLOCK {
                partial = self.write(file, partial, block.split().freeze()).await?;
            }
        };
        // What came before a break is kept too.
        partial = self.write(file, partial, block.freeze()).await?;
        let whole = file.size.or(body.total).is_none_or(|size| size == partial.len());
        let outcome = match outcome {
            Ok(()) if !whole => Err(SourceError::unreachable(&file.path, "the answer ended early")),
            outcome => outcome,
        };
        Ok((partial, outcome))
    }

    /// Another size or tag than listed: other bytes.
    fn check_same(&self, file: &RemoteFile, body: &Body) -> Result<(), SourceError> {
        let other_tag =
            file.validator.is_some() && body.validator.is_some() && file.validator != body.validator;
        let other_size = file.size.is_some() && body.total.is_some() && file.size != body.total;
        if other_tag || other_size {
            return Err(SourceError::Changed { what: file.path.clone() });
        }
        Ok(())
    }

    async fn write(
        &self,
        file: &RemoteFile,
        mut partial: Partial,
        bytes: Bytes,
    ) -> Result<Partial, SourceError> {
        let len = bytes.len() as i64;
        let partial = blocking(move || partial.append(&bytes).map(|()| partial)).await?;
        self.meter.add(&file.path, len);
        Ok(partial)
    }

    fn restart(&self, file: &RemoteFile, partial: &mut Partial) -> Result<(), SourceError> {
        self.meter.add(&file.path, -(partial.len() as i64));
        partial.restart()
    }
}

/// The finished bytes against what the source announced.
fn check(file: &RemoteFile, partial: &Partial) -> Result<FileEntry, SourceError> {
    let sha256 = partial.hash();
    match file.sha256 {
        Some(expected) if expected != sha256 => Err(SourceError::ChecksumMismatch {
            file: file.path.clone(),
            expected: hex::encode(expected),
            found: hex::encode(sha256),
        }),
        _ => {
            sniff::check(&file.path, &partial.head()?, partial.len())?;
            Ok(FileEntry { path: file.path.clone(), size: partial.len(), sha256 })
        }
    }
}
