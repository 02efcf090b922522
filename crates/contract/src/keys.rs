//! The gateway's keys: what a client holds, and what the gateway keeps of it.
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Every key begins with it, so that a leaked one is found by a search.
const PREFIX: &str = "lathe-";
const MAX_ENTRY_BYTES: usize = 64 << 10;
const MAX_MODELS: usize = 256;
/// Longest name of a namespace or a service (a DNS label), and of a Model (a DNS subdomain).
const MAX_NAMESPACE: usize = 63;
const MAX_MODEL: usize = 253;

/// A new key and its hash, from 32 random bytes: the key is shown once, the hash goes into a [`KeyEntry`].
#[must_use]
pub fn new_key(seed: [u8; 32]) -> (String, KeyHash) {
    let key = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(seed));
    let hash = KeyHash::of(&key);
    (key, hash)
}

/// SHA-256 of a key, written `sha256:` and 64 hexadecimal digits. A key is 32 random bytes, so there is nothing to guess and no
/// need of a slow hash.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The hash of what a client sent.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// Equality in a time that does not depend on where the two differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        let difference = self.0.iter().zip(&other.0).fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl From<KeyHash> for String {
    fn from(hash: KeyHash) -> Self {
        format!("sha256:{}", hex::encode(hash.0))
    }
}

impl TryFrom<String> for KeyHash {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut hash = [0; 32];
        let digits = text.strip_prefix("sha256:").filter(|digits| digits.len() == 64);
        digits
            .and_then(|digits| hex::decode_to_slice(digits, &mut hash).ok())
            .ok_or("`hash` must be `sha256:` and 64 hexadecimal digits, as `lathe keys create` prints it")?;
        Ok(Self(hash))
    }
}

/// One key as the gateway knows it: a file of its Secret, which has the key's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeyEntry {
    /// The key's hash.
    pub hash: KeyHash,
    /// The one namespace whose models it may ask.
    pub namespace: String,
    /// Names of services and adapters of that namespace; absent: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Of prompts and answers together; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u32>,
    /// Of prompts and answers together, in a calendar month in UTC; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_month: Option<u64>,
}

/// Why an entry is no key. The text names the field and what is allowed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct KeyEntryError(String);

impl KeyEntry {
    /// Reads the content of an entry.
    ///
    /// # Errors
    /// It is too long, no JSON, has an unknown field, or a field has a value that is not allowed.
    pub fn parse(json: &[u8]) -> Result<Self, KeyEntryError> {
        if json.len() > MAX_ENTRY_BYTES {
            return Err(KeyEntryError(format!("must have at most {MAX_ENTRY_BYTES} bytes")));
        }
        let entry: Self = serde_json::from_slice(json).map_err(|error| KeyEntryError(error.to_string()))?;
        entry.check()?;
        Ok(entry)
    }

    fn check(&self) -> Result<(), KeyEntryError> {
        let refused = |what: String| Err(KeyEntryError(what));
        if !is_name(&self.namespace, MAX_NAMESPACE, false) {
            return refused("`namespace` must be the name of a namespace, e.g. `team-a`".into());
        }
        for (at, model) in self.models.iter().flatten().enumerate() {
            if !is_name(model, MAX_MODEL, true) {
                return refused(format!(
                    "`models[{at}]` must be the name of a service or adapter in `{}`, without the namespace",
                    self.namespace
                ));
            }
        }
        if self.models.as_ref().is_some_and(|models| models.len() > MAX_MODELS) {
            return refused(format!("`models` must have at most {MAX_MODELS} names; leave it out for all"));
        }
        for (field, limit) in [
            ("requestsPerMinute", self.requests_per_minute.map(u64::from)),
            ("tokensPerMinute", self.tokens_per_minute.map(u64::from)),
            ("tokensPerMonth", self.tokens_per_month),
        ] {
            if limit == Some(0) {
                return refused(format!("`{field}` must be at least 1; leave it out for no limit"));
            }
        }
        Ok(())
    }
}

fn is_name(text: &str, longest: usize, dots: bool) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || (dots && b == b'.');
    let outer = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = text.as_bytes();
    bytes.len() <= longest && outer(bytes.first()) && outer(bytes.last()) && bytes.iter().all(|&b| inner(b))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_key_is_43_characters_behind_its_prefix_and_is_known_by_its_hash_alone() {
        let (key, hash) = new_key([7; 32]);
        assert_eq!(key, "lathe-BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc");
        assert_eq!(key.len(), "lathe-".len() + 43);
        assert!(hash.matches(&KeyHash::of(&key)));
        assert!(!hash.matches(&new_key([8; 32]).1));
        // As sha256sum says of the key.
        assert_eq!(
            String::from(hash),
            "sha256:0474c489d333dc68b0628d4df5684691fa9ed7773be8a2de8c523ce7a75fd48f"
        );
    }

    fn entry(changes: Value) -> Result<KeyEntry, String> {
        let hash = String::from(new_key([7; 32]).1);
        let mut entry = json!({"hash": hash, "namespace": "team-a"});
        for (field, value) in changes.as_object().expect("an object") {
            entry[field] = value.clone();
        }
        KeyEntry::parse(entry.to_string().as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn an_entry_reads_back_and_what_is_absent_is_no_limit() {
        let full = json!({"models": ["support", "tone.v1"], "requestsPerMinute": 600, "tokensPerMinute": 100_000, "tokensPerMonth": 5_000_000_000_u64});
        let full = entry(full).expect("an entry");
        assert_eq!(full.tokens_per_month, Some(5_000_000_000));
        assert_eq!((full.requests_per_minute, full.tokens_per_minute), (Some(600), Some(100_000)));
        let written = serde_json::to_vec(&full).expect("JSON");
        assert_eq!(KeyEntry::parse(&written), Ok(full));
        let plain = entry(json!({})).expect("an entry");
        assert_eq!((plain.models, plain.requests_per_minute, plain.tokens_per_minute), (None, None, None));
        assert_eq!(plain.tokens_per_month, None);
    }

    #[rstest]
    #[case(json!({"model": "support"}), "unknown field `model`")]
    #[case(json!({"hash": "sha256:12"}), "`hash` must be")]
    #[case(json!({"hash": "lathe-abc"}), "`hash` must be")]
    #[case(json!({"namespace": "../kube-system"}), "`namespace` must be")]
    #[case(json!({"namespace": ""}), "`namespace` must be")]
    #[case(json!({"models": ["team-b/support"]}), "`models[0]` must be")]
    #[case(json!({"models": ["support", ".."]}), "`models[1]` must be")]
    #[case(json!({"requestsPerMinute": 0}), "`requestsPerMinute` must be at least 1")]
    #[case(json!({"tokensPerMinute": -1}), "invalid value")]
    #[case(json!({"tokensPerMonth": 0}), "`tokensPerMonth` must be at least 1")]
    #[case(json!({"tokensPerMonth": 1.5}), "invalid type")]
    fn an_entry_that_is_wrong_says_where(#[case] changes: Value, #[case] said: &str) {
        let error = entry(changes).expect_err("refused");
        assert!(error.contains(said), "{error}");
    }
}
