//! The list of files that lies beside an artefact. It is written last, so where it is, everything is.
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, FileEntry, digest_of, parse_hash};
use crate::error::SourceError;
use crate::names;

/// Name of the manifest in an artefact's folder. It is not part of the digest.
pub const MANIFEST: &str = "lathe-manifest.json";

/// Largest manifest that is read.
pub(crate) const MAX_BYTES: u64 = 4 << 20;
const MAX_FILES: usize = 10_000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: u32,
    digest: String,
    files: Vec<Row>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    path: String,
    size: u64,
    sha256: String,
}

/// The manifest's bytes for these files.
pub(crate) fn write(files: &[FileEntry]) -> Result<Vec<u8>, SourceError> {
    let mut rows: Vec<Row> = files
        .iter()
        .map(|f| Row { path: f.path.clone(), size: f.size, sha256: hex::encode(f.sha256) })
        .collect();
    rows.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
    let text = Text { version: 1, digest: digest_of(files).to_string(), files: rows };
    let mut bytes =
        serde_json::to_vec_pretty(&text).map_err(|e| SourceError::malformed(MANIFEST, e.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads a manifest and believes nothing: names are checked, and the digest must be that of the list.
pub(crate) fn read(bytes: &[u8]) -> Result<(Vec<FileEntry>, Digest), SourceError> {
    let bad = |problem: String| SourceError::malformed(MANIFEST, problem);
    let text: Text = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
    if text.version != 1 {
        return Err(bad(format!("version {} is unknown, this Lathe reads version 1", text.version)));
    }
    if text.files.len() > MAX_FILES {
        return Err(bad(format!("it lists {} files, at most {MAX_FILES} are allowed", text.files.len())));
    }
    let mut files = Vec::with_capacity(text.files.len());
    for row in text.files {
        names::check_path(&row.path)?;
        if names::is_pickle(&row.path) {
            return Err(SourceError::PickleRefused { what: MANIFEST.into(), files: row.path });
        }
        let Some(sha256) = parse_hash(&row.sha256) else {
            return Err(bad(format!("`sha256` of {} must be 64 lower-case hex digits", row.path)));
        };
        files.push(FileEntry { path: row.path, size: row.size, sha256 });
    }
    files.sort();
    if files.windows(2).any(|pair| pair[0].path == pair[1].path) {
        return Err(bad("it lists a file twice".into()));
    }
    let digest = digest_of(&files);
    if text.digest != digest.to_string() {
        return Err(bad(format!("its `digest` is not that of its files, {digest}")));
    }
    Ok((files, digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_changed_is_not() {
        let files = vec![FileEntry { path: "a.json".into(), size: 3, sha256: [7; 32] }];
        let bytes = write(&files).unwrap();
        assert_eq!(read(&bytes).unwrap(), (files.clone(), digest_of(&files)));
        let text = String::from_utf8(bytes).unwrap();
        for (from, to) in [
            ("a.json", "../a.json"),
            ("a.json", "a.pkl"),
            ("\"size\": 3", "\"size\": 4"),
            ("version\": 1", "version\": 2"),
        ] {
            assert!(read(text.replace(from, to).as_bytes()).is_err(), "{to}");
        }
        assert!(read(b"{").is_err());
    }
}
