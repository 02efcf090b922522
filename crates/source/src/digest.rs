//! The identity of a set of files: one sha256 over their names, sizes and sha256.
use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::error::SourceError;

/// sha256 of one file's bytes.
pub type FileHash = [u8; 32];

/// One file of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileEntry {
    /// Path below the set's root, with `/` between its parts.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// sha256 of the bytes.
    pub sha256: FileHash,
}

/// Identity of a set of files, written `sha256:<64 hex digits>`.
///
/// It is the sha256 of the text that has a line `<sha256 in hex> <size> <path>\n` for each file, sorted by path as bytes.
/// Only what [`digest_of`] or [`FromStr`] made is a `Digest`, so its text is safe as a file name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// The identity of these files, in whatever order they come.
pub fn digest_of(files: &[FileEntry]) -> Digest {
    let mut sorted: Vec<&FileEntry> = files.iter().collect();
    sorted.sort_unstable_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
    let mut hash = Sha256::new();
    for file in sorted {
        hash.update(format!("{} {} {}\n", hex::encode(file.sha256), file.size, file.path));
    }
    Digest(hash.finalize().into())
}

impl Digest {
    /// The 64 hex digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let hash = text.strip_prefix("sha256:").and_then(parse_hash);
        hash.map(Self).ok_or_else(|| SourceError::InvalidLocation {
            uri: crate::error::printable(text),
            problem: "`digest` must be sha256: and 64 lower-case hex digits".into(),
        })
    }
}

/// 64 lower-case hex digits.
pub(crate) fn parse_hash(text: &str) -> Option<FileHash> {
    if text.len() != 64 || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut hash = [0; 32];
    hex::decode_to_slice(text, &mut hash).ok()?;
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, bytes: &[u8]) -> FileEntry {
        FileEntry { path: path.into(), size: bytes.len() as u64, sha256: Sha256::digest(bytes).into() }
    }

    /// `printf '%s %s %s\n' $(sha256sum <f) $(stat -c %s f) f | sha256sum` over the files in byte order.
    #[test]
    fn equals_what_the_shell_computes_and_ignores_order() {
        let (a, b) = (entry("B.json", b"{}"), entry("a.txt", b"hello"));
        let shell = "sha256:05ce32555a8a1fbac9d471d59bc281ce868bad637b7d6f3e818b7ae09716fb2a";
        assert_eq!(digest_of(&[a.clone(), b.clone()]).to_string(), shell);
        assert_eq!(digest_of(&[a.clone(), b.clone()]), digest_of(&[b, a]));
    }

    #[test]
    fn every_field_counts() {
        let base = entry("a", b"x");
        let of = |f: FileEntry| digest_of(&[f]);
        assert_ne!(of(base.clone()), of(FileEntry { path: "b".into(), ..base.clone() }));
        assert_ne!(of(base.clone()), of(FileEntry { size: 2, ..base.clone() }));
        assert_ne!(of(base.clone()), of(FileEntry { sha256: [0; 32], ..base }));
    }

    #[test]
    fn text_is_parsed_strictly() {
        let digest = digest_of(&[]);
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        for bad in ["", "sha256:", "sha256:../../etc", &digest.hex(), &digest.to_string().to_uppercase()] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
