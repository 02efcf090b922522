//! The files of a base model, opened for tuning or measuring.
use std::path::{Path, PathBuf};

use lathe_contract::ModelInput;
use lathe_engine::Model;
use lathe_engine::files::{ChatTemplate, ModelConfig, ModelWeights, StoredDtype, Tokenizer};
use lathe_plan::Precision;
use lathe_source::{Fetched, FileEntry, digest_of};

use crate::context::Context;
use crate::dataset::Encoder;
use crate::failure::{Done, Halt};

/// Chat templates may print today's date. Rows must not differ from day to day, so it is always this one, which Llama's
/// templates print where they are told none: 26 July 2024.
const TEMPLATE_DATE: jiff::Timestamp = jiff::Timestamp::constant(1_721_952_000, 0);

/// A base model's files; its weights are read by [`Base::load`].
#[derive(Debug)]
pub struct Base {
    /// For messages, e.g. "base model `x`".
    pub what: String,
    /// Where the files are.
    pub dir: PathBuf,
    /// `sha256:<hex>` over them.
    pub digest: String,
    /// [`weights_digest`] of them.
    pub weights_digest: String,
    /// `config.json`.
    pub config: ModelConfig,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// Keeps the files in the cache.
    _fetched: Fetched,
}

impl Base {
    /// Brings the files here and reads the small ones.
    ///
    /// # Errors
    /// They cannot be fetched, or are not those of a model that is supported.
    pub fn fetch(context: &Context, model: &ModelInput) -> Done<Self> {
        let what = format!("base model `{}`", model.name);
        let (fetched, weights_digest) = context.fetch_model(&what, model)?;
        Self::open(what.clone(), fetched, weights_digest).map_err(|halt| halt.of(&what))
    }

    fn open(what: String, fetched: Fetched, weights_digest: String) -> Done<Self> {
        let digest = fetched.digest.to_string();
        let dir = fetched.dir.clone();
        let config = ModelConfig::read(&dir)?;
        let tokenizer = Tokenizer::read(&dir, config.shape.vocab)?;
        let template = ChatTemplate::read(&dir)?;
        Ok(Base { what, dir, digest, weights_digest, config, tokenizer, template, _fetched: fetched })
    }

    /// Makes tokens of rows for this model.
    pub fn encoder(&self, max_tokens: usize) -> Encoder<'_> {
        encoder_of(&self.config, &self.tokenizer, self.template.as_ref(), max_tokens)
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Opens the weights.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn weights(&self) -> Done<ModelWeights> {
        ModelWeights::open(&self.dir).map_err(|error| Halt::from(error).of(&self.what))
    }

    /// Reads the weights into memory.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape, no memory.
    pub fn load(&self, weights: &ModelWeights, precision: Precision) -> Done<Model> {
        Model::load(&self.config.shape, precision, weights, Model::default_threads())
            .map_err(|error| Halt::from(error).of(&self.what))
    }
}

/// Makes tokens of rows, always the same ones.
pub fn encoder_of<'a>(
    config: &ModelConfig,
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    max_tokens: usize,
) -> Encoder<'a> {
    Encoder { tokenizer, template, eos: config.eos.first().copied(), now: TEMPLATE_DATE, max_tokens }
}

/// `sha256:<hex>` over the files of weights alone: a new model card does not make another base of it.
pub fn weights_digest(files: &[FileEntry]) -> String {
    let weights = files.iter().filter(|file| file.path.ends_with(".safetensors"));
    digest_of(&weights.cloned().collect::<Vec<_>>()).to_string()
}

/// The precision that loses nothing of what is stored and takes no more room than it.
pub fn stored_precision(weights: &ModelWeights) -> Precision {
    let single = weights.names().filter_map(|name| weights.get(name)).any(|t| t.dtype == StoredDtype::F32);
    if single { Precision::F32 } else { Precision::BF16 }
}

/// Bytes that this process may hold: nine tenths of its cgroup's limit, where there is one.
pub fn memory_limit() -> Option<u64> {
    let text = std::fs::read_to_string(Path::new("/sys/fs/cgroup/memory.max")).ok()?;
    let limit: u64 = text.trim().parse().ok()?;
    Some(limit / 10 * 9)
}
