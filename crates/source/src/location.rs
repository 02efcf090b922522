//! An address as the API writes it, and what it means.
use std::fmt;

use reqwest::Url;

use crate::digest::Digest;
use crate::error::{SourceError, printable};
use crate::names;

/// Longest address, in bytes.
const MAX_URI: usize = 2048;

/// A place that holds a model, an adapter or a dataset, or that shall hold one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    uri: String,
    address: Address,
    digest: Option<Digest>,
}

/// What an address means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `pvc://<claim>/<path>`: a file or folder of a mounted volume.
    Pvc {
        /// Name of the PersistentVolumeClaim.
        claim: String,
        /// Path below the volume's root; empty is the root.
        path: String,
    },
    /// `https://` (or `http://`, see [`crate::Options::allow_http`]): one file, or a folder of files with known names.
    Http(Url),
    /// `hf://[datasets/]owner/name[@revision][/file]`: a repository of a hub.
    Hub(HubAddress),
    /// `s3://<bucket>/<prefix>`: an object, or the objects below a prefix.
    S3 {
        /// The bucket.
        bucket: String,
        /// Key or prefix, without a slash at its ends.
        prefix: String,
    },
}

/// A repository of a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubAddress {
    /// A dataset repository, not a model.
    pub dataset: bool,
    /// `owner/name`.
    pub repo: String,
    /// Branch, tag or commit; `main` where none is given.
    pub revision: String,
    /// One file of it.
    pub file: Option<String>,
}

impl Location {
    /// Reads `uri`, `revision` (a branch, tag or commit of a hub) and `digest` (`sha256:<hex>`, what the content must have).
    ///
    /// # Errors
    /// `InvalidLocation`, `UnsupportedScheme` or `UnsafeName`, with what is allowed.
    pub fn parse(uri: &str, revision: Option<&str>, digest: Option<&str>) -> Result<Self, SourceError> {
        let invalid =
            |problem: &str| SourceError::InvalidLocation { uri: shown(uri), problem: problem.into() };
        if uri.len() > MAX_URI {
            return Err(invalid("it is longer than 2048 bytes"));
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Err(invalid("it must begin with hf://, s3://, pvc:// or https://"));
        };
        let address = match scheme {
            "pvc" => pvc(rest).map_err(|e| e.at(uri))?,
            "s3" => s3(rest).map_err(|e| e.at(uri))?,
            "hf" => hub(rest, revision).map_err(|e| e.at(uri))?,
            "https" | "http" => http(uri).map_err(|e| e.at(uri))?,
            other => return Err(SourceError::UnsupportedScheme { scheme: printable(other) }),
        };
        if revision.is_some() && scheme != "hf" {
            return Err(invalid("`revision` belongs to hf:// alone; pin other sources by `digest`"));
        }
        let digest = digest.map(str::parse).transpose()?;
        Ok(Self { uri: uri.to_string(), address, digest })
    }

    /// The address as it was written.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// What the address means.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What the content must have.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The place `name` below this one, with no digest pinned: where a job puts its result.
    ///
    /// # Errors
    /// `InvalidLocation` or `UnsafeName` where that is no valid place to write.
    pub fn join(&self, name: &str) -> Result<Self, SourceError> {
        if !matches!(self.address, Address::Pvc { .. } | Address::S3 { .. }) {
            return Err(SourceError::ReadOnly { uri: shown(&self.uri) });
        }
        Self::parse(&format!("{}/{name}", self.uri.trim_end_matches('/')), None, None)
    }
}

impl fmt::Display for Location {
    /// The address without what may be a credential (the query of a URL).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.uri))
    }
}

/// An address for messages: no query, no user part, no control characters.
fn shown(uri: &str) -> String {
    let uri = uri.split(['?', '#']).next().unwrap_or_default();
    match uri.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = host.rsplit('@').next().unwrap_or_default();
            printable(&format!("{scheme}://{host}{path}"))
        }
        _ => printable(uri),
    }
}

/// A problem that does not know its address yet.
struct Problem(String);

impl Problem {
    fn at(self, uri: &str) -> SourceError {
        SourceError::InvalidLocation { uri: shown(uri), problem: self.0 }
    }
}

impl From<SourceError> for Problem {
    fn from(error: SourceError) -> Self {
        Self(error.to_string())
    }
}

fn problem<T>(text: &str) -> Result<T, Problem> {
    Err(Problem(text.into()))
}

fn pvc(rest: &str) -> Result<Address, Problem> {
    let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
    let dns = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if claim.is_empty() || claim.len() > 253 || !claim.bytes().all(dns) || claim.starts_with(['.', '-']) {
        return problem("the claim must be the name of a PersistentVolumeClaim: pvc://<claim>/<path>");
    }
    let path = path.trim_end_matches('/');
    if !path.is_empty() {
        names::check_path(path)?;
    }
    Ok(Address::Pvc { claim: claim.into(), path: path.into() })
}

fn s3(rest: &str) -> Result<Address, Problem> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(allowed) || bucket.contains("..") {
        return problem(
            "the bucket must be 3 to 63 lower-case letters, digits, `-` and `.`: s3://<bucket>/<prefix>",
        );
    }
    let prefix = prefix.trim_end_matches('/');
    if prefix.is_empty() {
        return problem("a prefix is needed below the bucket: s3://<bucket>/<prefix>");
    }
    names::check_path(prefix)?;
    Ok(Address::S3 { bucket: bucket.into(), prefix: prefix.into() })
}

fn http(uri: &str) -> Result<Address, Problem> {
    let Ok(url) = Url::parse(uri) else {
        return problem("it is not a URL");
    };
    if !url.username().is_empty() || url.password().is_some() {
        return problem(
            "credentials do not belong into a URL; give them by `secretRef` (keys `token`, or `username` and `password`)",
        );
    }
    Ok(Address::Http(url))
}

fn hub(rest: &str, revision: Option<&str>) -> Result<Address, Problem> {
    let form = "it must be hf://owner/name, hf://owner/name@revision, hf://owner/name/file or hf://datasets/owner/name/file";
    let (dataset, rest) = match rest.strip_prefix("datasets/") {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let mut parts = rest.splitn(3, '/');
    let (Some(owner), Some(name)) = (parts.next(), parts.next()) else {
        return problem(form);
    };
    let file = parts.next().filter(|f| !f.is_empty());
    let (name, at) = match name.split_once('@') {
        Some((name, at)) => (name, Some(at)),
        None => (name, None),
    };
    let word = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    for part in [owner, name] {
        if part.is_empty()
            || part.len() > 96
            || !part.bytes().all(word)
            || part.starts_with('.')
            || part.contains("..")
        {
            return problem(form);
        }
    }
    if at.is_some() && revision.is_some() && at != revision {
        return problem("the address and `revision` name different revisions; keep one");
    }
    let revision = at.or(revision).unwrap_or("main");
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
    if revision.is_empty() || revision.len() > 200 || !revision.bytes().all(valid) || revision.contains("..")
    {
        return problem("the revision must be a branch, tag or commit (letters, digits, `-`, `_`, `.`, `/`)");
    }
    if let Some(file) = file {
        names::check_path(file)?;
    }
    Ok(Address::Hub(HubAddress {
        dataset,
        repo: format!("{owner}/{name}"),
        revision: revision.into(),
        file: file.map(Into::into),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("pvc://data/a/b.jsonl", Address::Pvc { claim: "data".into(), path: "a/b.jsonl".into() })]
    #[case("pvc://data", Address::Pvc { claim: "data".into(), path: String::new() })]
    #[case("s3://models/a/b/", Address::S3 { bucket: "models".into(), prefix: "a/b".into() })]
    #[case("hf://o/n", Address::Hub(HubAddress { dataset: false, repo: "o/n".into(), revision: "main".into(), file: None }))]
    #[case("hf://o/n@v1", Address::Hub(HubAddress { dataset: false, repo: "o/n".into(), revision: "v1".into(), file: None }))]
    #[case("hf://datasets/o/n/x/t.jsonl", Address::Hub(HubAddress { dataset: true, repo: "o/n".into(), revision: "main".into(), file: Some("x/t.jsonl".into()) }))]
    fn understood(#[case] uri: &str, #[case] address: Address) {
        assert_eq!(Location::parse(uri, None, None).unwrap().address(), &address);
    }

    #[rstest]
    #[case("models/a", None, "InvalidLocation")]
    #[case("gs://b/p", None, "UnsupportedScheme")]
    #[case("oci://r/i", None, "UnsupportedScheme")]
    #[case("file:///etc/passwd", None, "UnsupportedScheme")]
    #[case("pvc://Data/x", None, "InvalidLocation")]
    #[case("pvc://data/../x", None, "InvalidLocation")]
    #[case("pvc://data//x", None, "InvalidLocation")]
    #[case("pvc:///x", None, "InvalidLocation")]
    #[case("s3://bucket", None, "InvalidLocation")]
    #[case("s3://b/x", None, "InvalidLocation")]
    #[case("s3://bucket/a/../b", None, "InvalidLocation")]
    #[case("hf://name", None, "InvalidLocation")]
    #[case("hf://../x", None, "InvalidLocation")]
    #[case("hf://o/n@../../x", None, "InvalidLocation")]
    #[case("hf://o/n@v1", Some("v2"), "InvalidLocation")]
    #[case("https://user:pw@h/x", None, "InvalidLocation")]
    #[case("https://h/x", Some("main"), "InvalidLocation")]
    fn refused(#[case] uri: &str, #[case] revision: Option<&str>, #[case] reason: &str) {
        assert_eq!(Location::parse(uri, revision, None).unwrap_err().reason(), reason);
    }

    #[test]
    fn messages_hold_no_credential() {
        for uri in ["https://u:hunter2@h/x?sig=hunter2", "https://h/x.jsonl?sig=hunter2#hunter2"] {
            let text = match Location::parse(uri, Some("r"), None) {
                Ok(location) => location.to_string(),
                Err(error) => error.to_string(),
            };
            assert!(!text.contains("hunter2"), "{text}");
        }
        assert_eq!(Location::parse("https://h/x?sig=1", None, None).unwrap().to_string(), "https://h/x");
    }

    #[test]
    fn a_result_goes_below_its_destination() {
        let base = Location::parse("s3://models/support/", None, None).unwrap();
        assert_eq!(base.join("v1").unwrap().uri(), "s3://models/support/v1");
        assert!(base.join("../v1").is_err());
        assert_eq!(
            Location::parse("hf://o/n", None, None).unwrap().join("x").unwrap_err().reason(),
            "ReadOnlyLocation"
        );
    }
}
