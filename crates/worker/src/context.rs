//! What every task needs: the mounted folders, somewhere to say how far it is, and whether to stop.
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lathe_contract::{Inspected, ModelInput, Mounts, ObjectRef, SourceRef};
use lathe_source::{
    CancellationToken, Credentials, Digest, Draft, Fetched, Headers, Location, Options, Update,
};
use tempfile::TempDir;
use tokio::runtime::Handle;

use crate::base::weights_digest;
use crate::failure::{Done, Halt, io};
use crate::status::Status;

/// How often a fetch's progress is told.
const TELL: Duration = Duration::from_millis(500);

/// The surroundings of a task. The work itself is one thread that computes; it reaches the network through here.
#[derive(Clone, Debug)]
pub struct Context {
    /// The object that is worked for.
    pub object: ObjectRef,
    /// Where volumes and secrets are mounted.
    pub mounts: Mounts,
    /// What is told meanwhile.
    pub status: Status,
    /// SIGTERM has come.
    pub stop: CancellationToken,
    /// Where network calls run; the task's thread is not one of its own.
    pub runtime: Handle,
}

impl Context {
    /// To be asked in every loop.
    ///
    /// # Errors
    /// [`Halt::Stopped`] once SIGTERM has come.
    pub fn go_on(&self) -> Done<()> {
        if self.stop.is_cancelled() { Err(Halt::Stopped) } else { Ok(()) }
    }

    /// The object and, in a pod, the pod: what another worker calls this one.
    pub fn who(&self) -> String {
        let ObjectRef { kind, namespace, name, .. } = &self.object;
        // In a pod: the pod's name.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{kind} {namespace}/{name} (on {})", host.trim())
    }

    /// Brings files here. `what` is for messages, e.g. "base model `x`".
    ///
    /// # Errors
    /// See [`lathe_source::fetch`].
    pub fn fetch(&self, what: &str, source: &SourceRef) -> Done<Fetched> {
        let (location, options) = self.place(source).map_err(|halt| halt.of(what))?;
        self.status.say(format!("fetching {what} from {location}"));
        let told = Mutex::new(None::<Instant>);
        let progress = |update: Update<'_>| {
            let Ok(mut last) = told.lock() else { return };
            if last.is_none_or(|at| at.elapsed() >= TELL) {
                *last = Some(Instant::now());
                self.status.say(format!("fetching {what}: {}", amount(&update)));
            }
        };
        let fetched = lathe_source::fetch(&location, &options, &progress, &self.stop);
        self.runtime.block_on(fetched).map_err(|error| Halt::from(error).of(what))
    }

    /// Brings a model's files here, with the digest of its weights. Files of a volume that have not changed since they were
    /// inspected are not hashed again: the digests of then hold.
    ///
    /// # Errors
    /// As [`Context::fetch`].
    pub fn fetch_model(&self, what: &str, model: &ModelInput) -> Done<(Fetched, String)> {
        if let Some(Inspected { fingerprint, weights_digest }) = &model.inspected {
            let (location, options) = self.place(&model.source).map_err(|halt| halt.of(what))?;
            let known = lathe_source::unchanged(&location, fingerprint, &options, &self.stop);
            match self.runtime.block_on(known) {
                Ok(Some(fetched)) => return Ok((fetched, weights_digest.clone())),
                Ok(None) => tracing::info!(what, "its files are not as they were inspected: they are hashed"),
                // Whoever reads all of it meets the same trouble, and tells it better.
                Err(error) => tracing::debug!(what, %error, "no fingerprint can be taken"),
            }
        }
        let fetched = self.fetch(what, &model.source)?;
        let weights = weights_digest(&fetched.files);
        Ok((fetched, weights))
    }

    /// What tells later whether files of a volume are the same; empty for all others.
    ///
    /// # Errors
    /// As [`Context::fetch`].
    pub fn fingerprint(&self, what: &str, source: &SourceRef) -> Done<String> {
        let (location, options) = self.place(source).map_err(|halt| halt.of(what))?;
        let mark = lathe_source::fingerprint(&location, &options, &self.stop);
        let mark = self.runtime.block_on(mark).map_err(|error| Halt::from(error).of(what))?;
        Ok(mark.map(|mark| mark.to_string()).unwrap_or_default())
    }

    /// Reads a location without its weights.
    ///
    /// # Errors
    /// See [`lathe_source::headers`].
    pub fn headers(&self, what: &str, source: &SourceRef) -> Done<Headers> {
        let (location, options) = self.place(source).map_err(|halt| halt.of(what))?;
        let headers = lathe_source::headers(&location, &options, &self.stop);
        self.runtime.block_on(headers).map_err(|error| Halt::from(error).of(what))
    }

    /// Writes a folder to `path` below a destination.
    ///
    /// # Errors
    /// See [`lathe_source::publish`].
    pub fn publish(&self, dir: &Path, destination: &SourceRef, path: &str) -> Done<()> {
        let (destination, options) = self.place(destination)?;
        let location = destination.join(path)?;
        let quiet = |_: Update<'_>| {};
        let published = lathe_source::publish(dir, &location, &options, &quiet, &self.stop);
        self.runtime.block_on(published)?;
        Ok(())
    }

    /// A folder for an artefact that shall lie below `folder` of a destination; see [`Draft`].
    ///
    /// # Errors
    /// See [`Draft::open`].
    pub fn draft(&self, destination: &SourceRef, folder: &str) -> Done<Draft> {
        let (destination, options) = self.place(destination)?;
        Ok(Draft::open(&destination.join(folder)?, &options)?)
    }

    /// Gives the files of a draft their place below a destination; returns where that is, and their digest.
    ///
    /// # Errors
    /// See [`Draft::publish`].
    pub fn settle(&self, draft: Draft, destination: &SourceRef) -> Done<(Location, Digest)> {
        let (_, options) = self.place(destination)?;
        let quiet = |_: Update<'_>| {};
        Ok(self.runtime.block_on(draft.publish(&options, &quiet, &self.stop))?)
    }

    /// The folder of a `pvc://` location.
    ///
    /// # Errors
    /// Another kind of location, or a claim that is not mounted.
    pub fn folder(&self, source: &SourceRef) -> Done<PathBuf> {
        let (location, options) = self.place(source)?;
        let lathe_source::Address::Pvc { claim, path } = location.address() else {
            let cause = format!("{location} is no volume, and checkpoints are kept on one");
            return Err(Halt::user("InvalidLocation", cause, "use pvc://<claim>/<path>"));
        };
        match options.mounts.get(claim) {
            Some(root) => Ok(root.join(path)),
            None => Err(lathe_source::SourceError::ClaimNotMounted {
                claim: claim.clone(),
                mounted: self.mounts.claims.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
            }
            .into()),
        }
    }

    /// A folder for small files on their way, removed when it is dropped: below the cache, for the root is read-only in a pod.
    ///
    /// # Errors
    /// A failed write.
    pub fn scratch(&self) -> Done<TempDir> {
        let cache = Path::new(&self.mounts.cache);
        std::fs::create_dir_all(cache)
            .and_then(|()| tempfile::Builder::new().prefix("scratch-").tempdir_in(cache))
            .map_err(|error| io(&error, &format!("cannot make a folder in {}", cache.display())))
    }

    fn place(&self, source: &SourceRef) -> Done<(Location, Options)> {
        let location = Location::parse(&source.uri, source.revision.as_deref(), source.digest.as_deref())?;
        let mut options = Options::new(&self.mounts.cache);
        options.cache_room = self.mounts.cache_bytes.and_then(|bytes| u64::try_from(bytes).ok());
        options.mounts =
            self.mounts.claims.iter().map(|(claim, at)| (claim.clone(), PathBuf::from(at))).collect();
        options.credentials = Credentials::load(source.secret_dir.as_deref().map(Path::new))?;
        Ok((location, options))
    }
}

fn amount(update: &Update<'_>) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    match update.total {
        Some(total) => {
            format!("{:.0} of {:.0} MB ({})", megabytes(update.done), megabytes(total), update.file)
        }
        None => format!("{:.0} MB ({})", megabytes(update.done), update.file),
    }
}
