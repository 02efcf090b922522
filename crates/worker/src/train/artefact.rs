//! The tuned model as files: a PEFT adapter, or whole weights in Hugging Face's layout. The same training gives the same
//! bytes, so the same digest.
use std::collections::BTreeMap;
use std::path::Path;

use lathe_contract::TrainTask;
use lathe_engine::files::{
    ModelWeights, SafetensorsFile, StoredDtype, TensorLayout, write_adapter, write_safetensors,
};
use lathe_engine::{Adapter, Dtype, Model};

use crate::base::Base;
use crate::failure::{Done, Halt, io};

/// Key in the header of an adapter's weights: the digest of the base that it was made for.
pub const BASE_DIGEST: &str = "lathe.base_digest";

/// Files of the base that describe it and hold no weights.
const COPIED: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
];

/// Writes an adapter of `base` into an empty folder.
///
/// # Errors
/// A failed write.
pub fn write_lora(dir: &Path, adapter: &Adapter, base: &Base, task: &TrainTask) -> Done<()> {
    // Where PEFT looks for the base: the hub's name where there is one.
    let uri = &task.base.source.uri;
    let name = uri.strip_prefix("hf://").unwrap_or(&task.base.name);
    let metadata = BTreeMap::from([(BASE_DIGEST.to_owned(), base.digest.clone())]);
    Ok(write_adapter(dir, adapter, Some(name), &metadata)?)
}

/// Writes whole weights into an empty folder, each tensor as wide as it was stored, with the base's other files.
///
/// # Errors
/// A failed read or write.
pub fn write_whole(dir: &Path, model: &mut Model, stored: &ModelWeights, base: &Base) -> Done<()> {
    for name in COPIED {
        let (from, to) = (base.dir.join(name), dir.join(name));
        match std::fs::copy(&from, &to) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(io(&error, &format!("cannot copy {} to {}", from.display(), to.display())));
            }
            Ok(_) => {}
        }
    }
    let mut layouts: Vec<TensorLayout> = model
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let single = stored.get(&name).is_some_and(|tensor| tensor.dtype == StoredDtype::F32);
            TensorLayout { name, dtype: if single { Dtype::F32 } else { Dtype::BF16 }, shape }
        })
        .collect();
    layouts.sort_by(|a, b| a.name.cmp(&b.name));
    write_safetensors(&dir.join("model.safetensors"), &layouts, &BTreeMap::new(), |layout| {
        Ok(model.tensor(&layout.name, layout.dtype)?.data)
    })?;
    Ok(())
}

/// Refuses an adapter that says it was made for another base. One that says nothing is told by its shapes.
///
/// # Errors
/// `AdapterBaseMismatch`, or the file cannot be read.
pub fn check_base(adapter: &Path, base_digest: &str) -> Done<()> {
    let file = SafetensorsFile::open(&adapter.join("adapter_model.safetensors"))?;
    match file.header().metadata.get(BASE_DIGEST) {
        Some(made_for) if made_for != base_digest => Err(Halt::user(
            "AdapterBaseMismatch",
            format!("it was made for the base {made_for}, this one is {base_digest}"),
            "use the adapter with the base that it was made for",
        )),
        _ => Ok(()),
    }
}
