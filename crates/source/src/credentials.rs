//! Credentials from a mounted Secret or the environment.
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::Path;

use crate::error::SourceError;

/// Keys that are read besides every `AWS_*`.
const KEYS: [&str; 5] = ["HF_TOKEN", "HF_ENDPOINT", "token", "username", "password"];
const MAX_VALUE: u64 = 64 << 10;

/// Keys and values of a Secret. They are sent to the host that the location or `HF_ENDPOINT` names, and to no other.
///
/// - `hf://`: `HF_TOKEN` or `token`; `HF_ENDPOINT` is the hub's address.
/// - `https://`: `token` (bearer), or `username` and `password`.
/// - `s3://`: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL`,
///   `AWS_SKIP_SIGNATURE`, web identity (`AWS_ROLE_ARN`, `AWS_WEB_IDENTITY_TOKEN_FILE`) and what else the AWS SDKs name.
#[derive(Clone, Default)]
pub struct Credentials {
    values: BTreeMap<String, String>,
}

impl Credentials {
    /// The environment's `HF_TOKEN`, `HF_ENDPOINT` and `AWS_*`, and over them the keys of the mounted Secret.
    ///
    /// # Errors
    /// `InvalidCredentials` where the folder cannot be read or a value is not a line of text.
    pub fn load(secret_dir: Option<&Path>) -> Result<Self, SourceError> {
        let mut values = BTreeMap::new();
        for (key, value) in std::env::vars_os() {
            let (Some(key), Some(value)) = (key.to_str(), value.to_str()) else { continue };
            if (key.starts_with("AWS_") || key.starts_with("HF_")) && wanted(key) && !value.is_empty() {
                values.insert(key.to_string(), value.to_string());
            }
        }
        if let Some(dir) = secret_dir {
            let secret = read_dir(dir)?;
            if secret.contains_key("AWS_ACCESS_KEY_ID") {
                // One identity, never half of each: the environment's session token would not fit the Secret's key.
                values.remove("AWS_SESSION_TOKEN");
            }
            values.extend(secret);
        }
        Ok(Self { values })
    }

    /// These with one key more.
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.values.insert(key.into(), value.into());
        self
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// The keys and values that begin with `AWS_`.
    pub(crate) fn aws(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().filter(|(key, _)| key.starts_with("AWS_")).map(|(k, v)| (k.as_str(), v.as_str()))
    }
}

impl fmt::Debug for Credentials {
    /// Names alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

fn wanted(key: &str) -> bool {
    KEYS.contains(&key) || key.starts_with("AWS_")
}

fn read_dir(dir: &Path) -> Result<BTreeMap<String, String>, SourceError> {
    let invalid =
        |path: &Path, problem: String| SourceError::InvalidCredentials { path: path.into(), problem };
    let mut values = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(|e| invalid(dir, e.to_string()))? {
        let entry = entry.map_err(|e| invalid(dir, e.to_string()))?;
        let Ok(key) = entry.file_name().into_string() else { continue };
        if !wanted(&key) {
            continue;
        }
        let path = entry.path();
        let mut bytes = Vec::new();
        std::fs::File::open(&path)
            .and_then(|file| file.take(MAX_VALUE + 1).read_to_end(&mut bytes))
            .map_err(|e| invalid(&path, e.to_string()))?;
        let value = String::from_utf8(bytes).ok().filter(|v| v.len() as u64 <= MAX_VALUE);
        let value =
            value.as_deref().map(str::trim).filter(|v| !v.is_empty() && !v.contains(char::is_control));
        let Some(value) = value else {
            return Err(invalid(&path, "the value must be one line of text, at most 64 KiB".into()));
        };
        values.insert(key, value.to_string());
    }
    if values.is_empty() {
        let keys = KEYS.join(", ");
        return Err(invalid(dir, format!("the Secret has no key that is known: {keys} or AWS_*")));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounted_secret_is_read_trimmed_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("..data")).unwrap();
        std::fs::write(dir.path().join("..data/token"), "hunter2\n").unwrap();
        std::os::unix::fs::symlink("..data/token", dir.path().join("token")).unwrap();
        std::fs::write(dir.path().join("notes"), [0xff]).unwrap();
        let credentials = Credentials::load(Some(dir.path())).unwrap();
        assert_eq!(credentials.get("token"), Some("hunter2"));
        assert!(!format!("{credentials:?}").contains("hunter2"));
    }

    #[test]
    fn wrong_secrets_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Credentials::load(Some(dir.path())).unwrap_err().reason(), "InvalidCredentials");
        std::fs::write(dir.path().join("token"), "a\nb").unwrap();
        assert!(Credentials::load(Some(dir.path())).unwrap_err().to_string().contains("token"));
    }
}
