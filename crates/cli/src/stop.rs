//! Ctrl-C, SIGTERM and a closed terminal: the first asks to finish, the second not to wait.
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::failure::{Done, Problem};

/// How often the user has asked to stop.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<u32>);

impl Stop {
    /// Listens from now on; the signals no longer end the process by themselves.
    ///
    /// # Errors
    /// Signals cannot be heard.
    pub fn listen() -> Done<Self> {
        let (count, heard) = watch::channel(0);
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            let mut signal = signal(kind).map_err(|error| {
                Problem::transient("InputOutput", format!("cannot hear signals: {error}"))
            })?;
            let count = count.clone();
            tokio::spawn(async move {
                while signal.recv().await.is_some() {
                    count.send_modify(|count| *count += 1);
                }
            });
        }
        Ok(Self(heard))
    }

    /// Waits for the next request that [`Stop::next`] has not returned yet; its number, from 1.
    pub async fn next(&mut self) -> u32 {
        match self.0.changed().await {
            Ok(()) => *self.0.borrow_and_update(),
            // Nobody can ask any more.
            Err(_) => std::future::pending().await,
        }
    }
}
