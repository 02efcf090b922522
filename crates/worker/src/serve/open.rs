//! The files of what is served: fetched, read, and planned for.
use std::path::Path;
use std::sync::Arc;

use lathe_contract::{Precision, ServeTask};
use lathe_engine::Model;
use lathe_engine::files::{ChatTemplate, ModelConfig, ModelWeights, Tokenizer};
use lathe_engine::plan::{
    self, AdapterBudget, ModelShape, PlanError, SERVE_BATCH_TOKENS, SPARE_ADAPTERS, ServePlan, ServeRequest,
    Target, plan_serving,
};
use lathe_source::Fetched;

use super::adapters::MAX_ADAPTERS;
use crate::context::Context;
use crate::failure::{Done, Halt};

/// A model that is here and not in memory yet.
pub struct Opened {
    /// Its files; the cache keeps them as long as this is there.
    pub files: Fetched,
    /// [`crate::base::weights_digest`] of them.
    pub weights_digest: String,
    /// Its dimensions.
    pub shape: ModelShape,
    /// Every buffer.
    pub plan: ServePlan,
    /// How the matrices are held.
    pub precision: plan::Precision,
    /// How messages become a prompt; absent for a base model.
    pub template: Option<ChatTemplate>,
    /// Begins an empty prompt.
    pub bos: Option<u32>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// `system_fingerprint` of its answers.
    pub fingerprint: String,
}

/// Fetches the base, and plans for it and for the adapters that the contract has room for.
///
/// # Errors
/// A file that is missing, malformed or of an unknown architecture; a setting out of bounds; no memory.
pub fn open(task: &ServeTask, context: &Context) -> Done<Opened> {
    let what = format!("model `{}`", task.model.name);
    let (fetched, weights_digest) = context.fetch_model(&what, &task.model)?;
    let dir = fetched.dir.as_path();
    let read = || -> Result<_, lathe_engine::files::FileError> {
        Ok((ModelConfig::read(dir)?, ChatTemplate::read(dir)?))
    };
    let (config, template) = read().map_err(|error| Halt::from(error).of(&what))?;
    let precision = match task.weights {
        Precision::Float32 => plan::Precision::F32,
        Precision::BFloat16 => plan::Precision::BF16,
        Precision::Int8 => plan::Precision::Int8,
        Precision::Int4 => plan::Precision::Int4,
    };
    let request = request(task, precision, budget(task))?;
    let plan = plan_serving(&config.shape, &request).map_err(|error| refused(&error))?;
    let digest: String = fetched.digest.to_string().chars().rev().take(12).collect();
    Ok(Opened {
        weights_digest,
        shape: config.shape,
        plan,
        precision,
        template,
        bos: config.bos,
        eos: config.eos,
        fingerprint: format!("lathe-{}-{digest}", env!("CARGO_PKG_VERSION")),
        files: fetched,
    })
}

/// Reads what turns text into tokens: half a second of work where there are 150,000 of them, so that it is done beside the
/// weights.
///
/// # Errors
/// A file that is missing or malformed, or another model's.
pub fn tokenizer(dir: &Path, shape: &ModelShape, what: &str) -> Done<Arc<Tokenizer>> {
    let read = Tokenizer::read(dir, shape.vocab).map_err(|error| Halt::from(error).of(what))?;
    Ok(Arc::new(read))
}

/// Reads the weights into memory, on the thread that will own them.
///
/// # Errors
/// Missing or malformed tensors, no memory.
pub fn weights(dir: &Path, shape: &ModelShape, precision: plan::Precision, threads: usize) -> Done<Model> {
    let weights = ModelWeights::open(dir)?;
    Ok(Model::load(shape, precision, &weights, threads)?)
}

fn request(task: &ServeTask, weights: plan::Precision, adapters: AdapterBudget) -> Done<ServeRequest> {
    let positive = |field: &str, value: i64| {
        usize::try_from(value).ok().filter(|&value| value > 0).ok_or_else(|| {
            let cause = format!("`{field}` must be at least 1 (found {value})");
            Halt::user("InvalidSettings", cause, "correct that field")
        })
    };
    let max_sequences = positive("maxSequences", task.max_sequences.into())?;
    let context = positive("contextLength", task.context_length)?;
    Ok(ServeRequest {
        weights,
        context,
        max_sequences,
        max_batch_tokens: SERVE_BATCH_TOKENS.max(max_sequences),
        cache_tokens: Some(positive("cacheTokens", task.cache_tokens)?),
        adapters,
        threads: Model::default_threads(),
        memory_limit: None,
    })
}

/// The room that the contract names; at least for its own adapters. Their files are not looked at: what is wrong with one
/// must not keep the base from answering.
fn budget(task: &ServeTask) -> AdapterBudget {
    let size = |number: i32| usize::try_from(number).unwrap_or(0);
    let slots = size(task.adapter_room.slots).max(task.adapters.len()).min(MAX_ADAPTERS);
    AdapterBudget {
        slots: slots + SPARE_ADAPTERS,
        max_rank: size(task.adapter_room.rank),
        targets: Target::ALL.into_iter().collect(),
    }
}

fn refused(error: &PlanError) -> Halt {
    match error {
        PlanError::DoesNotFit { .. } => {
            Halt::user("DoesNotFit", error, "give the pod more memory, or lower `serving.contextLength`")
        }
        _ => Halt::user("InvalidSettings", error, "correct that field"),
    }
}
