//! Identity of everything that decides a job's result.
use lathe_contract::TrainTask;
use sha2::{Digest, Sha256};

/// Where the files lie, how a step is cut into passes and how often it is saved changes no bit, so it is not part of it.
/// `None` only where a number is not finite.
pub(super) fn hash(task: &TrainTask, base_digest: &str, dataset_digest: &str) -> Option<String> {
    let TrainTask { attempt: _, base: _, dataset, method, training, checkpoint: _, evaluation, output: _ } =
        task;
    let mut training = training.clone();
    training.micro_batch_tokens = 0;
    let rows = (dataset.format, dataset.holdout, dataset_digest);
    let json = serde_json::to_vec(&(1, base_digest, rows, method, &training, &evaluation.metrics)).ok()?;
    Some(hex::encode(&Sha256::digest(json)[..16]))
}
