//! The operator's public key, by which the gateway knows who asks what flows, and hands over losses.
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::{HeaderMap, header};
use lathe_contract::{Scope, TRAFFIC_AUDIENCE, TokenError, Verifier};

use crate::error::ApiError;
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

    /// Lets the operator in for `scope`, and nobody else.
    pub fn admit(&self, headers: &HeaderMap, scope: Scope) -> Result<(), ApiError> {
        let key = self.get().ok_or_else(ApiError::operator_unknown)?;
        let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = token.and_then(|value| value.strip_prefix("Bearer ")).ok_or(TokenError::Malformed);
        let now = jiff::Timestamp::now().as_second();
        let checked = token.and_then(|token| key.verify(token, TRAFFIC_AUDIENCE, scope, now));
        checked.map_err(|refusal| ApiError::unauthorized(format!("Not allowed: {refusal}.")))
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
