//! What a caller decides, and what it is told meanwhile.
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::credentials::Credentials;
use crate::retry::Retry;

/// How sources are read and written.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder for downloads. Several processes may share it.
    pub cache: PathBuf,
    /// Most bytes that stay in the cache: what nobody uses goes, what was used longest ago first, until a new location's
    /// files fit. What is in use stays, however much it is.
    pub cache_bytes: u64,
    /// Bytes that the cache's folder can hold at all, where that is less than its disk: what does not fit is refused.
    pub cache_room: Option<u64>,
    /// PersistentVolumeClaim name to the folder where it is mounted.
    pub mounts: BTreeMap<String, PathBuf>,
    /// Sent to the location's own host alone.
    pub credentials: Credentials,
    /// Waits between tries.
    pub retry: Retry,
    /// Seed of the jitter: any number that differs between processes.
    pub seed: u64,
    /// Files read at the same time.
    pub parallel: usize,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest silence of a server before the connection is given up and the read resumed.
    pub stall_timeout: Duration,
    /// Most bytes that one location may have.
    pub max_bytes: u64,
    /// Plain `http://` to hosts other than this machine. It sends what it reads, and credentials, in the clear.
    pub allow_http: bool,
    /// How files of a mounted volume that have a manifest are checked.
    pub local_check: LocalCheck,
}

/// How much of a mounted volume is read before it is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalCheck {
    /// Every byte is hashed.
    Content,
    /// Names and sizes are compared with the manifest, which holds the hashes of when the files were written: for
    /// a start that shall be quick. Files without a manifest are hashed all the same.
    Sizes,
}

impl Options {
    /// Downloads into `cache`; no volumes, no credentials, usual time-outs.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            cache: cache.into(),
            cache_bytes: 200 << 30,
            cache_room: None,
            mounts: BTreeMap::new(),
            credentials: Credentials::default(),
            retry: Retry::default(),
            seed: u64::from(std::process::id()),
            parallel: 4,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            max_bytes: 4 << 40,
            allow_http: false,
            local_check: LocalCheck::Content,
        }
    }
}

/// How far a read or a write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update<'a> {
    /// The file that moved, below the location's root.
    pub file: &'a str,
    /// Bytes done, over all files. It steps back where a file must begin again.
    pub done: u64,
    /// Bytes of all files, where every size is known.
    pub total: Option<u64>,
}

/// Is told of progress, about once a megabyte, from any thread. Every `Fn(Update)` is one.
pub trait Progress: Send + Sync {
    /// Must return at once.
    fn update(&self, update: Update<'_>);
}

impl<F: Fn(Update<'_>) + Send + Sync> Progress for F {
    fn update(&self, update: Update<'_>) {
        self(update);
    }
}
