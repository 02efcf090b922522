//! An artefact in the making: on the volume where it shall stay, so that it is written once and then only renamed.
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use crate::digest::Digest;
use crate::disk::blocking;
use crate::error::SourceError;
use crate::location::{Address, Location};
use crate::options::{Options, Progress};
use crate::publish::{read_artefact, stoppable, write_artefact};
use crate::{local, publish_pvc};

const DRAFT: &str = "draft";

/// A folder to write an artefact into; what is not published is removed when it is dropped, or by the next writer for the
/// same place where a process was killed.
#[derive(Debug)]
pub struct Draft {
    dir: PathBuf,
    folder: Location,
}

impl Draft {
    /// An empty folder for an artefact that shall lie below `folder`: on the same volume, or in the cache where that is no
    /// volume. On a volume, what other writers left or still fill for that place goes.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(folder: &Location, options: &Options) -> Result<Self, SourceError> {
        let dir = match folder.address() {
            Address::Pvc { claim, path } => {
                let root = local::root(claim, options)?;
                let parent = root.join(path);
                publish_pvc::make_folders(&root, &parent, &folder.to_string())?;
                publish_pvc::new_folder(&parent.join(DRAFT))?
            }
            // Processes of one machine share it.
            _ => {
                let dir = publish_pvc::unfinished(&options.cache.join(DRAFT));
                std::fs::create_dir_all(&dir).map_err(|e| SourceError::io(&dir, e))?;
                dir
            }
        };
        Ok(Self { dir, folder: folder.clone() })
    }

    /// Where to write.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What a failed write into it means: another writer for the same place may have taken it away.
    ///
    /// # Errors
    /// `IncompleteUpload` where it is gone.
    pub fn is_there(&self) -> Result<(), SourceError> {
        if self.dir.is_dir() {
            Ok(())
        } else {
            Err(SourceError::Incomplete { what: self.folder.to_string() })
        }
    }

    /// Gives the artefact its place, `<folder>/<hex digits of its digest>`: by one rename on a volume, by an upload
    /// elsewhere. The same content there already is no error.
    ///
    /// # Errors
    /// As [`crate::publish`].
    pub async fn publish(
        self,
        options: &Options,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<(Location, Digest), SourceError> {
        let work = async {
            let (from, stop) = (self.dir.clone(), cancel.clone());
            let artefact = blocking(move || read_artefact(&from, &stop)).await?;
            let place = self.folder.join(&artefact.digest.hex())?;
            match place.address() {
                Address::Pvc { claim, path } => {
                    publish_pvc::settle(&artefact, claim, path, options, cancel).await?
                }
                _ => write_artefact(&artefact, &place, options, progress, cancel).await?,
            }
            Ok((place, artefact.digest))
        };
        stoppable(work, cancel).await
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // The space is the user's. After a publish nothing is there any more.
        let _ = publish_pvc::take_away(&self.dir);
    }
}
