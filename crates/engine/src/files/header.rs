//! The header of a safetensors file: eight bytes of length, then JSON, then the tensors' bytes.
//!
//! Written anew and not taken from the `safetensors` crate, since that one lets a later duplicate of a key win, allows
//! headers of 100 MB, and maps nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Deserialize;

use super::error::FileError;
use crate::Dtype;

/// Longest header that is read, in bytes.
const MAX_HEADER: u64 = 16 << 20;
const MAX_DIMENSIONS: usize = 8;
pub(super) const METADATA: &str = "__metadata__";

/// The checked header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes before the tensors' data: the length field and the header itself.
    pub data_start: usize,
    /// The tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// The strings under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: StoredDtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Bytes after [`Header::data_start`].
    pub range: Range<usize>,
}

/// Element types that can stand in a file. Weights are read from `F32`, `F16` and `BF16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[allow(missing_docs, non_camel_case_types)]
pub enum StoredDtype {
    BOOL,
    U8,
    I8,
    F8_E4M3,
    F8_E5M2,
    U16,
    I16,
    F16,
    BF16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

impl StoredDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            StoredDtype::BOOL
            | StoredDtype::U8
            | StoredDtype::I8
            | StoredDtype::F8_E4M3
            | StoredDtype::F8_E5M2 => 1,
            StoredDtype::U16 | StoredDtype::I16 | StoredDtype::F16 | StoredDtype::BF16 => 2,
            StoredDtype::U32 | StoredDtype::I32 | StoredDtype::F32 => 4,
            StoredDtype::U64 | StoredDtype::I64 | StoredDtype::F64 => 8,
        }
    }

    /// The name in a header, e.g. `BF16`.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// The type of a weight; none for integers and other precisions.
    pub fn weight(self) -> Option<Dtype> {
        match self {
            StoredDtype::F32 => Some(Dtype::F32),
            StoredDtype::F16 => Some(Dtype::F16),
            StoredDtype::BF16 => Some(Dtype::BF16),
            _ => None,
        }
    }
}

impl Header {
    /// Bytes that [`Header::parse`] needs of a file that begins with `start` (at least eight bytes): the length field
    /// and the header.
    ///
    /// # Errors
    /// [`FileError::Malformed`] if the header would be longer than the file or 16 MiB.
    pub fn length(file: &str, start: &[u8], file_len: u64) -> Result<usize, FileError> {
        let malformed = |problem: String| FileError::malformed(file, problem);
        let Some(field) = start.first_chunk::<8>() else {
            return Err(malformed("is too short for a safetensors file".to_owned()));
        };
        let length = u64::from_le_bytes(*field);
        if length > MAX_HEADER || length > file_len.saturating_sub(8) {
            return Err(malformed(format!(
                "the header must be at most {MAX_HEADER} bytes and fit the file of {file_len} bytes (it says {length})"
            )));
        }
        // At most 16 MiB + 8, so it fits any `usize`.
        Ok(length as usize + 8)
    }

    /// Checks a header against the size of its file: no duplicate names, shapes and offsets that agree, neither holes
    /// nor overlaps, the last tensor at the end of the file. `start` is the file's beginning, at least the whole header.
    ///
    /// # Errors
    /// [`FileError::Malformed`] with the tensor's name.
    pub fn parse(file: &str, start: &[u8], file_len: u64) -> Result<Header, FileError> {
        let data_start = Header::length(file, start, file_len)?;
        let json =
            start.get(8..data_start).ok_or_else(|| FileError::malformed(file, "the header is cut short"))?;
        let raw: RawHeader = serde_json::from_slice(json)
            .map_err(|error| FileError::malformed(file, format!("the header is not valid: {error}")))?;
        let data_len = usize::try_from(file_len - data_start as u64)
            .map_err(|_| FileError::malformed(file, "is too large for this machine"))?;
        let mut tensors = BTreeMap::new();
        for (name, raw) in raw.tensors {
            let info = raw.check(data_len).map_err(|problem| {
                FileError::malformed(file, format!("tensor `{}`: {problem}", name.escape_debug()))
            })?;
            tensors.insert(name, info);
        }
        no_holes(&tensors, data_len).map_err(|problem| FileError::malformed(file, problem))?;
        Ok(Header { data_start, tensors, metadata: raw.metadata })
    }
}

/// Sorted by offset, each tensor must begin where the one before ends, from 0 to the end of the data.
fn no_holes(tensors: &BTreeMap<String, TensorInfo>, data_len: usize) -> Result<(), String> {
    let mut by_offset: Vec<_> = tensors.iter().collect();
    by_offset.sort_by_key(|(_, info)| (info.range.start, info.range.end));
    let mut end = 0;
    for (name, info) in by_offset {
        if info.range.start != end {
            let what =
                if info.range.start < end { "overlaps the one before" } else { "leaves a hole before it" };
            return Err(format!("tensor `{}` {what}", name.escape_debug()));
        }
        end = info.range.end;
    }
    if end != data_len {
        return Err(format!(
            "the tensors end at byte {end} of {data_len}; the file is cut short or has something behind"
        ));
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: StoredDtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn check(self, data_len: usize) -> Result<TensorInfo, String> {
        if self.shape.len() > MAX_DIMENSIONS {
            return Err(format!(
                "must have at most {MAX_DIMENSIONS} dimensions (found {})",
                self.shape.len()
            ));
        }
        let (Ok(start), Ok(end)) =
            (usize::try_from(self.data_offsets.0), usize::try_from(self.data_offsets.1))
        else {
            return Err("its offsets are beyond the file".to_owned());
        };
        if start > end || end > data_len {
            return Err(format!(
                "its offsets {start} to {end} must rise and lie within the {data_len} bytes of data"
            ));
        }
        let shape: Option<Vec<usize>> = self.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
        let bytes =
            |shape: &[usize]| shape.iter().try_fold(self.dtype.bytes(), |size, &d| size.checked_mul(d));
        match shape {
            Some(shape) if bytes(&shape) == Some(end - start) => {
                Ok(TensorInfo { dtype: self.dtype, shape, range: start..end })
            }
            _ => Err(format!("{:?} {:?} does not make {} bytes", self.dtype, self.shape, end - start)),
        }
    }
}

struct RawHeader {
    tensors: BTreeMap<String, RawTensor>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                use serde::de::Error;
                let mut header = RawHeader { tensors: BTreeMap::new(), metadata: BTreeMap::new() };
                let mut seen_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        if std::mem::replace(&mut seen_metadata, true) {
                            return Err(A::Error::custom("`__metadata__` stands twice"));
                        }
                        header.metadata = map.next_value::<UniqueKeys<String>>()?.0;
                        continue;
                    }
                    let tensor = map.next_value()?;
                    if let Some(_twice) = header.tensors.insert(name.clone(), tensor) {
                        return Err(A::Error::custom(format!(
                            "tensor `{}` stands twice",
                            name.escape_debug()
                        )));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// A JSON object whose keys must differ: two readers that choose differently would see two files in one.
pub(crate) struct UniqueKeys<V>(pub(crate) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueKeys<V> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> serde::de::Visitor<'de> for Visitor<V> {
            type Value = UniqueKeys<V>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<UniqueKeys<V>, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if entries.insert(key.clone(), value).is_some() {
                        return Err(serde::de::Error::custom(format!(
                            "`{}` stands twice",
                            key.escape_debug()
                        )));
                    }
                }
                Ok(UniqueKeys(entries))
            }
        }
        deserializer.deserialize_map(Visitor(std::marker::PhantomData))
    }
}
