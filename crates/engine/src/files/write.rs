//! Safetensors files, written whole or not at all.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use super::atomic::write_atomically;
use super::error::{FileError, file_name};
use super::header::METADATA;
use crate::Dtype;

/// What a tensor of a file to be written is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorLayout {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

/// Writes a safetensors file by [`write_atomically`], one tensor in memory at a time: `data` gives a tensor's elements,
/// row-major and little-endian. `format: pt`, which readers demand, is added to `metadata`.
///
/// # Errors
/// What `data` says, [`FileError::Io`], or [`FileError::Malformed`] if names repeat or a tensor's bytes do not fit its shape.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorLayout],
    metadata: &BTreeMap<String, String>,
    mut data: impl FnMut(&TensorLayout) -> Result<Vec<u8>, FileError>,
) -> Result<(), FileError> {
    let name = file_name(path);
    let header = header_bytes(&name, tensors, metadata)?;
    write_atomically(path, |writer| {
        let mut write = |bytes: &[u8]| writer.write_all(bytes).map_err(FileError::io("write", path));
        write(&(header.len() as u64).to_le_bytes())?;
        write(&header)?;
        for tensor in tensors {
            let bytes = data(tensor)?;
            if Some(bytes.len()) != byte_len(tensor) {
                let problem =
                    format!("tensor `{}` {:?} was given {} bytes", tensor.name, tensor.shape, bytes.len());
                return Err(FileError::malformed(&name, problem));
            }
            write(&bytes)?;
        }
        Ok(())
    })
}

fn header_bytes(
    file: &str,
    tensors: &[TensorLayout],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, FileError> {
    let mut json = serde_json::Map::new();
    let mut metadata = metadata.clone();
    metadata.insert("format".to_owned(), "pt".to_owned());
    json.insert(METADATA.to_owned(), serde_json::json!(metadata));
    let mut start = 0_usize;
    for tensor in tensors {
        let end = byte_len(tensor).and_then(|len| start.checked_add(len));
        let end =
            end.ok_or_else(|| FileError::malformed(file, format!("tensor `{}` is too large", tensor.name)))?;
        let entry = serde_json::json!({
            "dtype": format!("{:?}", tensor.dtype), "shape": tensor.shape, "data_offsets": [start, end]
        });
        if json.insert(tensor.name.clone(), entry).is_some() {
            return Err(FileError::malformed(file, format!("tensor `{}` stands twice", tensor.name)));
        }
        start = end;
    }
    let mut header = serde_json::Value::Object(json).to_string().into_bytes();
    // Spaces, so that the data begins aligned.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn byte_len(tensor: &TensorLayout) -> Option<usize> {
    tensor.shape.iter().try_fold(tensor.dtype.bytes(), |size, &dimension| size.checked_mul(dimension))
}
