//! What the gateway shows a worker: a token for its InferenceService, signed with the gateway's key.
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use axum::http::HeaderValue;
use lathe_contract::{Scope, Signer, TOKEN_LIFETIME};

/// Tokens by the UID that they are for, each used for half of its life.
#[derive(Debug)]
pub struct Tokens {
    signer: Signer,
    made: Mutex<HashMap<String, Made>>,
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
        Self { signer, made: Mutex::default() }
    }

    /// The value of `Authorization` for the workers of `uid`. `now` is Unix time in seconds.
    pub fn bearer(&self, uid: &str, now: i64) -> HeaderValue {
        let fresh = |made: &Made| (0..TOKEN_LIFETIME.as_secs() as i64 / 2).contains(&(now - made.at));
        // Every change is whole.
        let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = all.get(uid).filter(|made| fresh(made)) {
            return made.value.clone();
        }
        all.retain(|_, made| fresh(made));
        let token = format!("Bearer {}", self.signer.sign(uid, Scope::Inference, now));
        let mut value = HeaderValue::try_from(token).unwrap_or(HeaderValue::from_static(""));
        value.set_sensitive(true);
        all.insert(uid.to_owned(), Made { value: value.clone(), at: now });
        value
    }
}

#[cfg(test)]
mod tests {
    use lathe_contract::Verifier;

    use super::*;

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
