//! What a file is by its first bytes: a pickle is refused under any name.
use crate::error::SourceError;
use crate::names;

/// Checks the first bytes (up to 64) of a file of `size` bytes against its name.
pub(crate) fn check(path: &str, head: &[u8], size: u64) -> Result<(), SourceError> {
    if names::is_weights(path) && is_safetensors(head, size) {
        return Ok(());
    }
    if is_pickle(head) {
        return Err(SourceError::PickleRefused { what: "the source".into(), files: path.into() });
    }
    if head.starts_with(b"version https://git-lfs") {
        return Err(SourceError::malformed(
            path,
            "it is a git-lfs pointer instead of the file; run `git lfs pull` where it was copied from",
        ));
    }
    if names::is_weights(path) {
        return Err(SourceError::malformed(
            path,
            "it does not begin with a safetensors header that fits the file's size",
        ));
    }
    Ok(())
}

/// Eight bytes of header length that fit the file, then a JSON object.
fn is_safetensors(head: &[u8], size: u64) -> bool {
    let Some((length, rest)) = head.split_first_chunk::<8>() else { return false };
    let length = u64::from_le_bytes(*length);
    length >= 2 && length <= size.saturating_sub(8) && rest.first() == Some(&b'{')
}

/// A protocol mark (2 to 5), or the zip archive that PyTorch puts pickles into.
fn is_pickle(head: &[u8]) -> bool {
    matches!(head, [0x80, 2..=5, ..]) || head.starts_with(b"PK\x03\x04")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("model.safetensors", b"\x02\0\0\0\0\0\0\0{}", None)]
    #[case("model.safetensors", b"\x03\0\0\0\0\0\0\0{}", Some("Malformed"))]
    #[case("model.safetensors", b"PK\x03\x04aaaaaa", Some("PickleRefused"))]
    #[case("model.safetensors", b"\x80\x02}q\x00(X\x01", Some("PickleRefused"))]
    #[case("model.safetensors", b"version https://git-lfs.github.com/spec/v1", Some("Malformed"))]
    #[case("model.safetensors", b"", Some("Malformed"))]
    #[case("train.jsonl", b"\x80\x04\x95", Some("PickleRefused"))]
    #[case("train.jsonl", b"{}", None)]
    #[case("config.json", b"", None)]
    fn by_content(#[case] path: &str, #[case] head: &[u8], #[case] reason: Option<&str>) {
        assert_eq!(check(path, head, head.len() as u64).err().map(|e| e.reason()), reason);
    }

    /// A header of 640 bytes begins like a pickle of protocol 2.
    #[test]
    fn an_unlucky_header_length_is_no_pickle() {
        check("model.safetensors", b"\x80\x02\0\0\0\0\0\0{\"a\"", 648).unwrap();
    }
}
