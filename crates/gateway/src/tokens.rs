//! What the gateway shows a worker: a token for its InferenceService, signed with the gateway's key.
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use axum::http::HeaderValue;
use lathe_contract::{Scope, Signer, TOKEN_LIFETIME};

use crate::files;
use crate::tasks::Tasks;

/// Tokens by the UID that they are for, each used for half of its life.
#[derive(Debug)]
pub struct Tokens(Mutex<State>);

#[derive(Debug)]
struct State {
    signer: Signer,
    made: HashMap<String, Made>,
}

#[derive(Debug)]
struct Made {
    /// `Bearer ...`
    value: HeaderValue,
    /// Unix time in seconds.
    at: i64,
}

impl Tokens {
    /// Tokens of this key.
    pub fn new(signer: Signer) -> Self {
        Self(Mutex::new(State { signer, made: HashMap::new() }))
    }

    /// The value of `Authorization` for the workers of `uid`. `now` is Unix time in seconds.
    pub fn bearer(&self, uid: &str, now: i64) -> HeaderValue {
        let fresh = |made: &Made| (0..TOKEN_LIFETIME.as_secs() as i64 / 2).contains(&(now - made.at));
        let State { signer, made: all } = &mut *self.lock();
        if let Some(made) = all.get(uid).filter(|made| fresh(made)) {
            return made.value.clone();
        }
        all.retain(|_, made| fresh(made));
        let token = format!("Bearer {}", signer.sign(uid, Scope::Inference, now));
        let mut value = HeaderValue::try_from(token).unwrap_or(HeaderValue::from_static(""));
        value.set_sensitive(true);
        all.insert(uid.to_owned(), Made { value: value.clone(), at: now });
        value
    }

    /// From here on tokens are signed with this key.
    fn sign_with(&self, signer: Signer) {
        *self.lock() = State { signer, made: HashMap::new() };
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the gateway's key, and again as the file changes. One that cannot be read leaves the one before in force.
///
/// # Errors
/// There is none to begin with.
pub fn follow(tasks: &mut Tasks, path: PathBuf) -> anyhow::Result<Arc<Tokens>> {
    let seen = files::read(&path)
        .with_context(|| format!("the gateway's key {} cannot be read; {NEXT}", path.display()))?;
    let tokens = Arc::new(Tokens::new(signer(&path, seen.as_deref())?));
    let (told, of) = (Arc::clone(&tokens), path.clone());
    files::follow(tasks, path, seen, move |pem| match signer(&of, pem) {
        Ok(signer) => {
            tracing::info!("the gateway's key has changed");
            told.sign_with(signer);
        }
        Err(error) => tracing::error!("the gateway's key stays as it was: {error:#}"),
    });
    Ok(tokens)
}

const NEXT: &str =
    "mount `gateway.key` of the Secret `lathe-keys`, which the operator makes, or name it with --signing-key";

fn signer(path: &Path, pem: Option<&str>) -> anyhow::Result<Signer> {
    let pem = pem.with_context(|| format!("the gateway's key {} is not there; {NEXT}", path.display()))?;
    Signer::from_pem(pem).with_context(|| format!("{} is no key; {NEXT}", path.display()))
}

#[cfg(test)]
mod tests {
    use lathe_contract::Verifier;

    use super::*;
    use crate::files::PAUSE;

    #[tokio::test(start_paused = true)]
    async fn a_key_that_changes_signs_from_then_on_and_a_broken_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gateway.key");
        let [old, new] = [[3; 32], [4; 32]].map(|seed| Signer::from_seed(&seed));
        std::fs::write(&path, old.to_pem().unwrap()).unwrap();
        let mut tasks = Tasks::default();
        let tokens = follow(&mut tasks, path.clone()).unwrap();
        let signed_by = |signer: &Signer| {
            let token =
                tokens.bearer("one", 1000).to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned();
            let verifier = Verifier::from_pem(&signer.public_pem().unwrap()).unwrap();
            verifier.verify(&token, "one", Scope::Inference, 1000).is_ok()
        };
        assert!(signed_by(&old));
        std::fs::write(&path, "nothing").unwrap();
        tokio::time::sleep(3 * PAUSE).await;
        assert!(signed_by(&old));
        std::fs::write(&path, new.to_pem().unwrap()).unwrap();
        while !signed_by(&new) {
            tokio::time::sleep(PAUSE).await;
        }
        assert!(!signed_by(&old));
    }

    #[test]
    fn a_token_is_for_one_service_and_made_anew_at_half_of_its_life() {
        let signer = Signer::from_seed(&[3; 32]);
        let verifier = Verifier::from_pem(&signer.public_pem().unwrap()).unwrap();
        let tokens = Tokens::new(signer);
        let good = |value: &HeaderValue, uid, now| {
            let token = value.to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned();
            verifier.verify(&token, uid, Scope::Inference, now).is_ok()
        };
        let first = tokens.bearer("one", 1000);
        assert!(good(&first, "one", 1000) && !good(&first, "two", 1000));
        assert_eq!(tokens.bearer("one", 1029), first);
        let second = tokens.bearer("one", 1030);
        assert_ne!(second, first);
        // A clock that went back does not make an old token of a future one.
        assert!(good(&tokens.bearer("one", 500), "one", 500));
        assert!(good(&tokens.bearer("two", 500), "two", 500));
    }
}
