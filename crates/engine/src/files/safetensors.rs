//! Safetensors files, mapped into memory.

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

use super::error::{FileError, file_name};
use super::header::{Header, StoredDtype};
use super::mapped::Mapped;
use super::weights::refuse_pickle_content;
use crate::{TensorView, WeightSource};

/// A safetensors file, mapped into memory and fully checked.
#[derive(Debug)]
pub struct SafetensorsFile {
    file: String,
    map: Mapped,
    header: Header,
}

/// A tensor of a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct StoredTensor<'a> {
    /// Element type.
    pub dtype: StoredDtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Elements in row-major order, little-endian; not necessarily aligned.
    pub bytes: &'a [u8],
    /// Where they lie.
    map: &'a Mapped,
}

impl SafetensorsFile {
    /// Maps a file and checks its header against its size.
    ///
    /// The file must not be cut short while it is mapped: reading a page that is gone ends the process, as with any
    /// memory map. Models lie in folders that only Lathe writes, by rename.
    ///
    /// # Errors
    /// [`FileError::Pickle`], [`FileError::Malformed`] or [`FileError::Io`].
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let name = file_name(path);
        let handle = File::open(path).map_err(FileError::io("open", path))?;
        let metadata = handle.metadata().map_err(FileError::io("read", path))?;
        if !metadata.is_file() || metadata.len() < 8 {
            return Err(FileError::malformed(&name, "is too short for a safetensors file"));
        }
        let map = Mapped::open(&handle).map_err(FileError::io("map", path))?;
        let bytes = map.bytes();
        refuse_pickle_content(&name, bytes)?;
        let header = Header::parse(&name, bytes, bytes.len() as u64)?;
        Ok(SafetensorsFile { file: name, map, header })
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        &self.file
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        let info = self.header.tensors.get(name)?;
        let bytes = &self.map.bytes()[self.header.data_start..][info.range.clone()];
        Some(StoredTensor { dtype: info.dtype, shape: &info.shape, bytes, map: &self.map })
    }
}

impl<'a> StoredTensor<'a> {
    /// The tensor as the engine takes it.
    fn as_weight(&self, name: &str) -> crate::Result<TensorView<'a>> {
        let dtype = self.dtype.weight().ok_or_else(|| crate::Error::Source {
            name: name.to_owned(),
            source: format!("its type must be F32, F16 or BF16 (found {})", self.dtype.name()).into(),
        })?;
        Ok(TensorView {
            dtype,
            shape: self.shape.to_vec(),
            data: Cow::Borrowed(self.bytes),
            in_place: self.map.part(self.bytes),
        })
    }
}

impl WeightSource for SafetensorsFile {
    fn tensor(&self, name: &str) -> crate::Result<TensorView<'_>> {
        let tensor = self.get(name).ok_or_else(|| crate::Error::MissingTensor { name: name.to_owned() })?;
        tensor.as_weight(name)
    }
}
