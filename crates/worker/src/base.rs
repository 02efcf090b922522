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
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(least_limit(Path::new("/sys/fs/cgroup"), &cgroups)? / 10 * 9)
}

/// The least limit on the way from the root to the process's own cgroup, of version 2 or 1: `cgroups` are the lines
/// `number:controllers:path` of `/proc/self/cgroup`. A container sees its own cgroup as the root, whatever the path says.
fn least_limit(root: &Path, cgroups: &str) -> Option<u64> {
    let places = cgroups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (top, file) = match controllers {
            "" => (root.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|one| one == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        Some((top, path.trim_start_matches('/').to_owned(), file))
    });
    let limits = places.flat_map(|(top, path, file)| {
        let on_the_way =
            Path::new(&path).ancestors().map(|part| top.join(part).join(file)).collect::<Vec<_>>();
        // "max" is no number, and no limit.
        on_the_way
            .into_iter()
            .filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok())
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::none("0::/\n", &[], None)]
    #[case::no_limit("0::/\n", &[("memory.max", "max\n")], None)]
    #[case::of_a_container("0::/\n", &[("memory.max", "1000\n")], Some(1000))]
    #[case::seen_from_outside("0::/pods/a\n", &[("memory.max", "1000\n")], Some(1000))]
    #[case::own("0::/pods/a\n", &[("pods/a/memory.max", "500\n"), ("pods/memory.max", "1000\n")], Some(500))]
    #[case::of_one_above("0::/pods/a\n", &[("pods/a/memory.max", "max\n"), ("pods/memory.max", "700\n")], Some(700))]
    #[case::version_1(
        "3:cpu,cpuacct:/a\n2:memory:/a\n",
        &[("memory/a/memory.limit_in_bytes", "600\n"), ("memory/memory.limit_in_bytes", "9223372036854771712\n")],
        Some(600)
    )]
    #[case::not_its_lines("x\n::\n\n", &[("memory.max", "1000\n")], Some(1000))]
    fn the_least_limit_on_the_way_counts(
        #[case] cgroups: &str,
        #[case] files: &[(&str, &str)],
        #[case] limit: Option<u64>,
    ) {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, text).expect("a file");
        }
        assert_eq!(least_limit(root.path(), cgroups), limit);
    }
}
