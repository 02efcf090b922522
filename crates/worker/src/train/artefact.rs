//! The tuned model as files: a PEFT adapter, or whole weights in Hugging Face's layout. The same training gives the same
//! bytes, so the same digest.
use std::collections::BTreeMap;
use std::path::Path;

use lathe_contract::{Score, TrainProgress, TrainTask};
use lathe_engine::files::{
    ModelWeights, SafetensorsFile, StoredDtype, TensorLayout, read_adapter, write_adapter, write_safetensors,
};
use lathe_engine::plan::ModelShape;
use lathe_engine::{Adapter, Dtype, Model};
use lathe_source::card_license;

use super::card::Card;
use crate::base::Base;
use crate::failure::{Done, Halt, io};

/// Key in the header of an adapter's weights: [`Base::weights_digest`] of the base that it was made for.
pub const BASE_WEIGHTS: &str = "lathe.base_weights";

const CARD: &str = "README.md";

/// Files of the base that describe it and hold no weights.
const COPIED: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// Files of the base that go with everything that is made of it.
const LICENCES: [&str; 4] = ["LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"];

/// Writes an adapter of `base` into an empty folder.
///
/// # Errors
/// A failed write.
pub fn write_lora(dir: &Path, adapter: &Adapter, base: &Base, task: &TrainTask) -> Done<()> {
    let metadata = BTreeMap::from([(BASE_WEIGHTS.to_owned(), base.weights_digest.clone())]);
    Ok(write_adapter(dir, adapter, Some(base_name(task)), &metadata)?)
}

/// Where PEFT looks for the base: the hub's name where there is one.
fn base_name(task: &TrainTask) -> &str {
    let uri = &task.base.source.uri;
    uri.strip_prefix("hf://").unwrap_or(&task.base.name)
}

/// Writes the model card, and the licence of the base where it has one.
///
/// # Errors
/// A failed read or write.
pub fn write_card(
    dir: &Path,
    base: &Base,
    task: &TrainTask,
    dataset_digest: &str,
    progress: &TrainProgress,
    scores: &[Score],
) -> Done<()> {
    copy(&LICENCES, base, dir)?;
    let theirs = std::fs::read(base.dir.join(CARD)).ok();
    let card = Card {
        base: base_name(task),
        base_digest: &base.digest,
        license: theirs.and_then(|card| card_license(&card)),
        dataset_digest,
        task,
        steps: progress.step,
        tokens: progress.tokens,
        scores,
    };
    let path = dir.join(CARD);
    std::fs::write(&path, card.text())
        .map_err(|error| io(&error, &format!("cannot write {}", path.display())))
}

/// Copies those of the named files that the base has.
fn copy(names: &[&str], base: &Base, dir: &Path) -> Done<()> {
    for name in names {
        let (from, to) = (base.dir.join(name), dir.join(name));
        match std::fs::copy(&from, &to) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(io(&error, &format!("cannot copy {} to {}", from.display(), to.display())));
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

/// Writes whole weights into an empty folder, each tensor as wide as it was stored, with the base's other files.
///
/// # Errors
/// A failed read or write.
pub fn write_whole(dir: &Path, model: &mut Model, stored: &ModelWeights, base: &Base) -> Done<()> {
    copy(&COPIED, base, dir)?;
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

/// Reads an adapter for a base of this shape whose weights have this digest. Another base is refused, where the adapter
/// says for which one it was made; one that says nothing (made elsewhere) is told by its shapes alone.
///
/// # Errors
/// `AdapterBaseMismatch`, or the files cannot be read.
pub fn read_lora(dir: &Path, shape: &ModelShape, weights_digest: &str) -> Done<Adapter> {
    // The shapes first: where they differ, they say more.
    let (_, adapter) = read_adapter(dir, shape)?;
    let file = SafetensorsFile::open(&dir.join("adapter_model.safetensors"))?;
    match file.header().metadata.get(BASE_WEIGHTS) {
        Some(made_for) if made_for != weights_digest => {
            let made_for: String = made_for.chars().take(80).flat_map(char::escape_debug).collect();
            let cause = format!(
                "it was made for a base with the weights {made_for}, this one's are {weights_digest}"
            );
            Err(Halt::user(
                "AdapterBaseMismatch",
                cause,
                "use the adapter with the base that it was made for",
            ))
        }
        _ => Ok(adapter),
    }
}
