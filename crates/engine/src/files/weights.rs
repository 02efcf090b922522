//! A model's weights: one `model.safetensors`, or shards under `model.safetensors.index.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::error::{FileError, bounded, file_name, read_bounded};
use super::header::UniqueKeys;
use super::safetensors::{SafetensorsFile, StoredTensor};
use crate::{TensorView, WeightSource};

/// All weights, where they are in one file.
pub const SINGLE: &str = "model.safetensors";
/// Which of several files holds a tensor.
pub const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX: u64 = 16 << 20;
const MAX_SHARDS: usize = 1024;
const PICKLES: [&str; 6] = ["bin", "pt", "pth", "pkl", "pickle", "ckpt"];

/// All tensors of a model's folder, mapped and checked.
#[derive(Debug)]
pub struct ModelWeights {
    files: Vec<SafetensorsFile>,
    /// Which file holds a tensor.
    index: BTreeMap<String, usize>,
}

impl ModelWeights {
    /// Opens the weights of a model's folder.
    ///
    /// # Errors
    /// [`FileError::Pickle`] where the folder has weights in pickle alone; else what is missing or malformed.
    pub fn open(dir: &Path) -> Result<Self, FileError> {
        if dir.join(INDEX).exists() {
            return Self::open_shards(dir);
        }
        let single = dir.join(SINGLE);
        if !single.exists() {
            refuse_pickle(dir)?;
        }
        let file = SafetensorsFile::open(&single)?;
        let index = file.header().tensors.keys().map(|name| (name.clone(), 0)).collect();
        Ok(ModelWeights { files: vec![file], index })
    }

    fn open_shards(dir: &Path) -> Result<Self, FileError> {
        let map = parse_index(&read_bounded(&dir.join(INDEX), MAX_INDEX)?)?;
        let mut files: Vec<SafetensorsFile> = Vec::new();
        let mut opened = BTreeMap::new();
        let mut index = BTreeMap::new();
        for (tensor, shard) in map {
            let at = match opened.get(&shard) {
                Some(&at) => at,
                None => {
                    files.push(SafetensorsFile::open(&dir.join(&shard))?);
                    opened.insert(shard.clone(), files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[at].header().tensors.contains_key(&tensor) {
                return Err(FileError::MissingTensor { file: shard, name: tensor });
            }
            index.insert(tensor, at);
        }
        Ok(ModelWeights { files, index })
    }

    /// A tensor by its Hugging Face name.
    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        self.files[*self.index.get(name)?].get(name)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Bytes of all tensors by element type, e.g. `("BF16", 988_065_536)`.
    pub fn bytes_by_dtype(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for tensor in self.index.keys().filter_map(|name| self.get(name)) {
            *sums.entry(tensor.dtype.name()).or_default() += tensor.bytes.len() as u64;
        }
        sums
    }
}

impl WeightSource for ModelWeights {
    fn tensor(&self, name: &str) -> crate::Result<TensorView<'_>> {
        match self.index.get(name) {
            Some(&at) => self.files[at].tensor(name),
            None => Err(crate::Error::MissingTensor { name: name.to_owned() }),
        }
    }
}

/// Which file holds each tensor, from the text of [`INDEX`].
///
/// # Errors
/// It is too large or malformed, or names something else than plain files beside it.
pub fn parse_index(bytes: &[u8]) -> Result<BTreeMap<String, String>, FileError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueKeys<String>,
    }
    bounded(INDEX, bytes, MAX_INDEX)?;
    let Index { weight_map: UniqueKeys(map) } = serde_json::from_slice(bytes)
        .map_err(|error| FileError::malformed(INDEX, format!("is not valid: {error}")))?;
    let shards: BTreeSet<&String> = map.values().collect();
    if shards.len() > MAX_SHARDS {
        return Err(FileError::malformed(INDEX, format!("names more than {MAX_SHARDS} files")));
    }
    shards.into_iter().try_for_each(|shard| plain_shard_name(shard))?;
    Ok(map)
}

/// A shard is a plain file beside its index: no folders, no way up.
fn plain_shard_name(shard: &str) -> Result<(), FileError> {
    let plain = shard.len() <= 255
        && shard.ends_with(".safetensors")
        && !shard.starts_with('.')
        && shard.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if plain {
        return Ok(());
    }
    let shard: String = shard.chars().take(60).collect();
    Err(FileError::Field {
        file: INDEX.to_owned(),
        field: "weight_map".to_owned(),
        allowed: "plain names of .safetensors files in the same folder".to_owned(),
        found: shard.escape_debug().to_string(),
    })
}

/// Refuses a folder that has weights as pickle only, by name.
///
/// # Errors
/// [`FileError::Pickle`] with the file's name.
pub fn refuse_pickle(dir: &Path) -> Result<(), FileError> {
    let mut entries: Vec<_> = std::fs::read_dir(dir)
        .map_err(FileError::io("list", dir))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().and_then(|e| e.to_str()).is_some_and(|e| PICKLES.contains(&e)))
        .collect();
    entries.sort();
    match entries.first() {
        Some(path) => Err(FileError::Pickle { file: file_name(path) }),
        None => Ok(()),
    }
}

/// Refuses pickles by content, whatever their name: protocol 2 and later begin with 0x80 and the version, PyTorch's are
/// a zip archive of one, its oldest ones begin with a pickled magic number of protocol 2.
pub(crate) fn refuse_pickle_content(file: &str, bytes: &[u8]) -> Result<(), FileError> {
    // A safetensors header may be 0x..0480 bytes long, but begins with a brace.
    let pickle = matches!(bytes, [0x80, 2..=5, ..]) && bytes.get(8) != Some(&b'{');
    let zip = bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"PK\x05\x06");
    if pickle || zip {
        return Err(FileError::Pickle { file: file.to_owned() });
    }
    Ok(())
}
