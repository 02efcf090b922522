//! A mounted file that may change while the program runs.
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::tasks::Tasks;

/// Between two looks; the kubelet itself takes up to a minute.
pub const PAUSE: Duration = Duration::from_secs(3);

/// Reads the file at `path` again and again. Where it does not say what was `seen` before, `changed` is told what it says; one that
/// cannot be read is no news.
pub fn follow(
    tasks: &mut Tasks,
    path: PathBuf,
    mut seen: Option<String>,
    mut changed: impl FnMut(Option<&str>) + Send + 'static,
) {
    tasks.spawn(async move {
        loop {
            tokio::time::sleep(PAUSE).await;
            let of = path.clone();
            // Files may be slow.
            let Ok(Ok(text)) = tokio::task::spawn_blocking(move || read(&of)).await else { continue };
            if text != seen {
                changed(text.as_deref());
                seen = text;
            }
        }
    });
}

/// What the file says; `None`: there is none.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
