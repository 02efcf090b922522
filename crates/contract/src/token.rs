//! Signed tokens between Lathe's programs.
//!
//! `base64url(claims).base64url(Ed25519 signature over the first part)`: one algorithm, no header
//! to choose one by. A token speaks to one object (its UID), for one purpose, for a minute.
use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{
    Signature, Signer as _, SigningKey, VerifyingKey,
    pkcs8::{
        DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey, spki::der::pem::LineEnding,
    },
};
use serde::{Deserialize, Serialize};

/// How long a token is good for.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// Clocks of two nodes may differ by this much.
const CLOCK_SKEW: i64 = 10;
const MAX_TOKEN_BYTES: usize = 1024;

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Read the report.
    Report,
    /// Change the set of adapters.
    Adapters,
    /// Ask the model.
    Inference,
    /// Hand over loss curves.
    Curves,
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// UID of the object that the worker works for.
    pub aud: String,
    /// What is allowed.
    pub scope: Scope,
    /// Unix time in seconds after which it is void.
    pub exp: i64,
}

/// Why a token was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// Not a token at all.
    #[error("the token is malformed")]
    Malformed,
    /// Made with another key, or changed on the way.
    #[error("the token is not signed by a key that this worker trusts")]
    Signature,
    /// Too old, or from the future.
    #[error("the token is expired, or valid for longer than a minute; check the clocks of both nodes")]
    Expired,
    /// Made for another object.
    #[error("the token is for another object")]
    Audience,
    /// Made for another purpose.
    #[error("the token does not allow this call")]
    Scope,
    /// Not a key.
    #[error("not an Ed25519 key in PEM: {0}")]
    Key(String),
}

/// Makes tokens. Holds the private key; its `Debug` does not show it.
pub struct Signer(SigningKey);

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signer(..)")
    }
}

impl Signer {
    /// A key pair from 32 random bytes.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Reads a PKCS#8 PEM.
    pub fn from_pem(pem: &str) -> Result<Self, TokenError> {
        SigningKey::from_pkcs8_pem(pem).map(Self).map_err(|e| TokenError::Key(e.to_string()))
    }

    /// The private key as PKCS#8 PEM.
    pub fn to_pem(&self) -> Result<String, TokenError> {
        let pem = self.0.to_pkcs8_pem(LineEnding::LF).map_err(|e| TokenError::Key(e.to_string()))?;
        Ok(pem.to_string())
    }

    /// The public key as SPKI PEM, for [`crate::Trust`].
    pub fn public_pem(&self) -> Result<String, TokenError> {
        self.0.verifying_key().to_public_key_pem(LineEnding::LF).map_err(|e| TokenError::Key(e.to_string()))
    }

    /// A token for the object `uid`, valid for [`TOKEN_LIFETIME`] from `now` (Unix seconds).
    #[must_use]
    pub fn sign(&self, uid: &str, scope: Scope, now: i64) -> String {
        let claims = Claims { aud: uid.to_owned(), scope, exp: now + TOKEN_LIFETIME.as_secs() as i64 };
        let payload = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims).unwrap_or_default());
        let signature = URL_SAFE_NO_PAD.encode(self.0.sign(payload.as_bytes()).to_bytes());
        format!("{payload}.{signature}")
    }
}

/// Checks tokens with one public key.
#[derive(Clone, Debug)]
pub struct Verifier(VerifyingKey);

impl Verifier {
    /// Reads an SPKI PEM.
    pub fn from_pem(pem: &str) -> Result<Self, TokenError> {
        VerifyingKey::from_public_key_pem(pem).map(Self).map_err(|e| TokenError::Key(e.to_string()))
    }

    /// Accepts a token made for `uid` and `scope`, not expired at `now` (Unix seconds).
    pub fn verify(&self, token: &str, uid: &str, scope: Scope, now: i64) -> Result<(), TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Malformed);
        }
        let (payload, signature) = token.split_once('.').ok_or(TokenError::Malformed)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Malformed)?;
        let signature = Signature::from_slice(&signature).map_err(|_| TokenError::Malformed)?;
        self.0.verify_strict(payload.as_bytes(), &signature).map_err(|_| TokenError::Signature)?;
        let json = URL_SAFE_NO_PAD.decode(payload).map_err(|_| TokenError::Malformed)?;
        let claims: Claims = serde_json::from_slice(&json).map_err(|_| TokenError::Malformed)?;
        let left = claims.exp.checked_sub(now).ok_or(TokenError::Expired)?;
        if !(-CLOCK_SKEW..=TOKEN_LIFETIME.as_secs() as i64 + CLOCK_SKEW).contains(&left) {
            return Err(TokenError::Expired);
        }
        if claims.aud != uid {
            return Err(TokenError::Audience);
        }
        if claims.scope != scope {
            return Err(TokenError::Scope);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const NOW: i64 = 1_790_000_000;

    fn pair() -> (Signer, Verifier) {
        let signer =
            Signer::from_pem(&Signer::from_seed(&[7; 32]).to_pem().expect("pem")).expect("reads back");
        let verifier = Verifier::from_pem(&signer.public_pem().expect("pem")).expect("reads back");
        (signer, verifier)
    }

    #[rstest]
    #[case::good("uid-1", Scope::Report, 0, Ok(()))]
    #[case::other_object("uid-2", Scope::Report, 0, Err(TokenError::Audience))]
    #[case::other_purpose("uid-1", Scope::Adapters, 0, Err(TokenError::Scope))]
    #[case::last_moment("uid-1", Scope::Report, 70, Ok(()))]
    #[case::expired("uid-1", Scope::Report, 71, Err(TokenError::Expired))]
    #[case::from_the_future("uid-1", Scope::Report, -11, Err(TokenError::Expired))]
    fn a_token_speaks_to_one_object_for_one_purpose_for_a_minute(
        #[case] uid: &str,
        #[case] scope: Scope,
        #[case] later: i64,
        #[case] expected: Result<(), TokenError>,
    ) {
        let (signer, verifier) = pair();
        let token = signer.sign("uid-1", Scope::Report, NOW);
        assert_eq!(verifier.verify(&token, uid, scope, NOW + later), expected);
    }

    #[test]
    fn another_key_or_a_changed_byte_is_refused() {
        let (signer, verifier) = pair();
        let other = Signer::from_seed(&[8; 32]).sign("uid-1", Scope::Report, NOW);
        assert_eq!(verifier.verify(&other, "uid-1", Scope::Report, NOW), Err(TokenError::Signature));
        let token = signer.sign("uid-1", Scope::Report, NOW);
        for index in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[index] = if bytes[index] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).expect("ascii");
            assert!(verifier.verify(&changed, "uid-1", Scope::Report, NOW).is_err(), "byte {index}");
        }
        assert_eq!(verifier.verify("", "uid-1", Scope::Report, NOW), Err(TokenError::Malformed));
        assert_eq!(verifier.verify("é.é", "uid-1", Scope::Report, NOW), Err(TokenError::Malformed));
    }
}
