//! The header of a safetensors file, checked without its bytes.
//!
//! Format: eight bytes of header length (little endian), a JSON object of that length, then the tensors' bytes.
use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::SourceError;

/// Longest header that is read. A shard of the largest models has about 1 MiB.
pub(crate) const MAX_HEADER: u64 = 16 << 20;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Element type in the file's own words (`BF16`, `F32`, `I8`).
    pub dtype: String,
    /// Length of each dimension.
    pub shape: Vec<u64>,
    /// Bytes.
    pub bytes: u64,
}

impl Tensor {
    /// Number of elements. The product was checked when the header was read.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Header length from the first eight bytes of a file of `size` bytes.
pub(crate) fn header_length(path: &str, first: &[u8], size: Option<u64>) -> Result<u64, SourceError> {
    let Some((length, _)) = first.split_first_chunk::<8>() else {
        return Err(SourceError::malformed(path, "it has fewer than 8 bytes"));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || size.is_some_and(|size| length > size.saturating_sub(8)) {
        return Err(SourceError::malformed(
            path,
            format!("its header claims {length} bytes; at most 16 MiB and the file's size are allowed"),
        ));
    }
    Ok(length)
}

/// The tensors of a header. Offsets must fit the shapes, and lie one after the other from 0 to the end of the file.
pub(crate) fn parse(
    path: &str,
    header: &[u8],
    size: Option<u64>,
) -> Result<BTreeMap<String, Tensor>, SourceError> {
    let bad = |problem: String| SourceError::malformed(path, problem);
    let text = serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(header)
        .map_err(|e| bad(format!("its header is not JSON: {e}")))?;
    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::with_capacity(text.len());
    for (name, value) in text {
        if name == "__metadata__" {
            continue;
        }
        let entry = Entry::deserialize(value).map_err(|e| bad(format!("tensor {name}: {e}")))?;
        let bits =
            bits(&entry.dtype).ok_or_else(|| bad(format!("tensor {name}: unknown type {}", entry.dtype)))?;
        let total =
            entry.shape.iter().try_fold(bits, |n, d| n.checked_mul(*d)).filter(|n| n % 8 == 0).map(|n| n / 8);
        let (begin, end) = entry.data_offsets;
        let bytes = end.checked_sub(begin);
        if bytes.is_none() || bytes != total {
            return Err(bad(format!(
                "tensor {name}: offsets {begin}..{end} do not fit shape {:?} of {}",
                entry.shape, entry.dtype
            )));
        }
        ranges.push((begin, end));
        tensors.insert(name, Tensor { dtype: entry.dtype, shape: entry.shape, bytes: end - begin });
    }
    ranges.sort_unstable();
    let mut at = 0;
    for (begin, end) in ranges {
        if begin != at {
            return Err(bad(format!("its tensors overlap or leave a hole at byte {}", begin.min(at))));
        }
        at = end;
    }
    let body = size.map(|size| size.saturating_sub(8).saturating_sub(header.len() as u64));
    if body.is_some_and(|body| body != at) {
        return Err(bad(format!("its tensors end at byte {at} of {}", body.unwrap_or_default())));
    }
    Ok(tensors)
}

/// Bits of one element.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "BOOL" | "I8" | "U8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[test]
    fn a_sound_header() {
        let header = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}"#;
        let tensors = parse("m", header, Some(8 + header.len() as u64 + 16)).unwrap();
        assert_eq!(tensors["a"], Tensor { dtype: "BF16".into(), shape: vec![2, 3], bytes: 12 });
        assert_eq!((tensors["a"].elements(), tensors["b"].elements()), (6, 1));
        assert!(parse("m", header, Some(8 + header.len() as u64 + 15)).is_err());
    }

    #[rstest]
    #[case(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,7]}}"#)]
    #[case(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#)]
    #[case(r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#)]
    #[case(r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#)]
    #[case(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#)]
    #[case(r#"{"a":{"dtype":"I8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"I8","shape":[8],"data_offsets":[4,12]}}"#)]
    #[case(r#"{"a":{"dtype":"I8","shape":[8],"data_offsets":[1,9]}}"#)]
    #[case("[]")]
    #[case("{")]
    fn a_lying_header(#[case] header: &str) {
        assert_eq!(parse("m", header.as_bytes(), None).unwrap_err().reason(), "Malformed");
    }

    #[rstest]
    #[case(&[1, 0, 0], None)]
    #[case(&[0xff; 8], None)]
    #[case(&[9, 0, 0, 0, 0, 0, 0, 0], Some(16))]
    fn a_lying_length(#[case] first: &[u8], #[case] size: Option<u64>) {
        assert!(header_length("m", first, size).is_err());
    }
}
