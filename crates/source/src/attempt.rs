//! Trying again what the network or the server may get right the next time.
use std::future::Future;

use crate::error::SourceError;
use crate::options::Options;

/// Counts the tries of one piece of work.
pub(crate) struct Attempts<'a> {
    options: &'a Options,
    used: u32,
}

impl<'a> Attempts<'a> {
    pub fn new(options: &'a Options) -> Self {
        Self { options, used: 0 }
    }

    /// Waits as the back-off says, or gives `error` back where trying again is of no use or there were enough tries.
    pub async fn pause(&mut self, error: SourceError) -> Result<(), SourceError> {
        let SourceError::Unreachable { what, cause, retry_after } = &error else {
            return Err(error);
        };
        let Some(delay) = self.options.retry.delay(self.used, self.options.seed, *retry_after) else {
            return Err(error);
        };
        self.used += 1;
        tracing::debug!(%what, %cause, retry = self.used, ?delay, "trying again");
        tokio::time::sleep(delay).await;
        Ok(())
    }

    /// The work moved on, so the tries count from nothing.
    pub fn progressed(&mut self) {
        self.used = 0;
    }
}

/// Runs `work` until it succeeds, fails for good, or was tried enough.
pub(crate) async fn retry<T, W: Future<Output = Result<T, SourceError>>>(
    options: &Options,
    mut work: impl FnMut() -> W,
) -> Result<T, SourceError> {
    let mut attempts = Attempts::new(options);
    loop {
        match work().await {
            Ok(value) => return Ok(value),
            Err(error) => attempts.pause(error).await?,
        }
    }
}
