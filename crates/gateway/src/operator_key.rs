//! The operator's public key, by which the gateway knows who asks what flows.
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use lathe_contract::Verifier;

use crate::files;
use crate::tasks::Tasks;

/// The key that is in force; an installation may have none.
#[derive(Debug, Default)]
pub struct OperatorKey(RwLock<Option<Verifier>>);

impl OperatorKey {
    /// Of this key alone.
    #[cfg(test)]
    pub fn of(key: Verifier) -> Self {
        Self(RwLock::new(Some(key)))
    }

    /// The key; `None`: there is none.
    pub fn get(&self) -> Option<Verifier> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From here on this file's text counts. One that is no key leaves the one before in force, one that is gone takes it along.
    fn is(&self, text: Option<&str>) {
        let key = match text.map(Verifier::from_pem).transpose() {
            Ok(key) => key,
            Err(error) => {
                tracing::error!("`operator.pub` is not taken, and the key stays as it was: {error}");
                return;
            }
        };
        if key.is_none() {
            tracing::warn!(
                "there is no `operator.pub`: the operator is not told what flows, and scales nothing; mount it from the Secret \
                 `lathe-keys`, or name it with --operator-key"
            );
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = key;
    }
}

/// Reads the key, and again as the file changes. Without one requests are served all the same.
pub fn follow(tasks: &mut Tasks, path: PathBuf) -> Arc<OperatorKey> {
    let key = Arc::new(OperatorKey::default());
    let seen = files::read(&path).unwrap_or_else(|error| {
        tracing::error!("the operator's key {} cannot be read: {error}", path.display());
        None
    });
    key.is(seen.as_deref());
    let told = Arc::clone(&key);
    files::follow(tasks, path, seen, move |text| told.is(text));
    key
}

#[cfg(test)]
mod tests {
    use lathe_contract::Signer;

    use super::*;
    use crate::files::PAUSE;

    #[tokio::test(start_paused = true)]
    async fn a_key_that_comes_changes_or_goes_counts_from_then_on_and_a_broken_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("operator.pub");
        let pem = |seed| Signer::from_seed(&[seed; 32]).public_pem().unwrap();
        let mut tasks = Tasks::new();
        let key = follow(&mut tasks, path.clone());
        let in_force = || key.get().map(|key| format!("{key:?}"));
        let of = |seed| Some(format!("{:?}", Verifier::from_pem(&pem(seed)).unwrap()));
        assert_eq!(in_force(), None);
        let until = async |expected: Option<String>| {
            while in_force() != expected {
                tokio::time::sleep(PAUSE).await;
            }
        };
        std::fs::write(&path, pem(1)).unwrap();
        until(of(1)).await;
        std::fs::write(&path, "no key").unwrap();
        tokio::time::sleep(3 * PAUSE).await;
        assert_eq!(in_force(), of(1));
        std::fs::write(&path, pem(2)).unwrap();
        until(of(2)).await;
        std::fs::remove_file(&path).unwrap();
        until(None).await;
    }
}
