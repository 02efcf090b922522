//! FineTuneJobs that cannot be carried out.
use anyhow::Result;
use lathe_e2e::tune::job;
use serde_json::{Value, json};

use crate::{Bad, merged};

/// What a check of the rows finds.
const BAD_ROWS: &[(&str, &str)] = &[("DatasetValid", "False"), ("Succeeded", "Unknown"), ("Stalled", "True")];
/// What is seen before anything runs.
const BAD_PLAN: &[(&str, &str)] = &[("Planned", "False"), ("Succeeded", "Unknown"), ("Stalled", "True")];
const TAKEN: &[(&str, &str)] = &[("Succeeded", "Unknown"), ("Stalled", "True")];
/// What ends a training.
const BAD_END: &[(&str, &str)] = &[("Training", "False"), ("Succeeded", "False"), ("Stalled", "True")];

/// What is said of the dataset of the job `row`, once it is right but for one row that is too long.
pub const PUT_RIGHT: &str =
    "400 rows (Chat), * tokens, 40 held out, 1 cut, since they are longer than `training.sequenceLength`";

/// All of them.
pub fn bad() -> Result<Vec<Bad>> {
    let data = |file: &str| {
        let uri = format!("pvc://quickstart/{file}");
        json!({"spec": {"dataset": {"train": {"uri": uri}}}})
    };
    let training = |fields: Value| json!({"spec": {"training": fields}});
    Ok(vec![
        tune(
            "no-data",
            data("data/nothing.jsonl"),
            BAD_ROWS,
            "NotFound",
            "training data: pvc://quickstart/data/nothing.jsonl does not exist; check the path below the claim and that its writer has finished. Next: correct `uri` or put the files there.",
        )?,
        tune(
            "locked-data",
            data("bad/locked.jsonl"),
            BAD_ROWS,
            "Unauthorized",
            "training data: access to /lathe/volumes/quickstart/bad/locked.jsonl was refused. Next: let the pod's user or fsGroup read and write it.",
        )?,
        tune(
            "row",
            data("bad/row.jsonl"),
            BAD_ROWS,
            "MalformedRow",
            "row.jsonl line 3: `messages[1].content` must be a string (found a number). 1 of * rows of row.jsonl. Next: correct the row, and those like it.",
        )?,
        tune(
            "empty",
            data("bad/empty.jsonl"),
            BAD_ROWS,
            "EmptyDataset",
            "empty.jsonl has no rows. Next: put rows into the file.",
        )?,
        tune(
            "latin",
            data("bad/latin.jsonl"),
            BAD_ROWS,
            "NotUtf8",
            "latin.jsonl line 1: a row must be UTF-8 (byte 14 of the line is not). 1 of * rows of latin.jsonl. Next: convert the file to UTF-8.",
        )?,
        tune(
            "packed",
            data("bad/packed.jsonl"),
            BAD_ROWS,
            "MalformedDataset",
            "packed.jsonl must be JSON Lines in UTF-8, one object a line (found gzip). Next: convert the file to JSON Lines.",
        )?,
        tune(
            "cut-rows",
            training(json!({"sequenceLength": 8})),
            BAD_ROWS,
            "NothingToLearn",
            "train.jsonl: no row has an answer within the first 8 tokens; raise `sequenceLength` or shorten the prompts. Next: raise `training.sequenceLength`, or shorten the prompts.",
        )?,
        tune(
            "too-long",
            training(json!({"sequenceLength": 1024, "batchTokens": 1024})),
            BAD_PLAN,
            "InvalidSettings",
            "`sequenceLength` must be between 2 and the model's context of 512 tokens (found 1024). Next: make a new FineTuneJob with such a value.",
        )?,
        tune(
            "taken",
            json!({"spec": {"output": {"modelName": "shop-base"}}}),
            TAKEN,
            "OutputExists",
            "Model shop-base exists and was not made from the same inputs. Next: delete it, or make a new FineTuneJob with another `output.modelName`.",
        )?,
        tune(
            "tight",
            json!({"spec": {"pod": {"memory": "64Mi"}}}),
            BAD_PLAN,
            "DoesNotFit",
            "supervised/lora of 1.72M parameters with rows of 128 tokens needs at least *Mi (weights *, gradients *, optimizer *, activations *, workspace *, total *, and the process itself); `spec.pod.memory` allows 64Mi. Next: set `spec.pod.memory` to *Mi in a new FineTuneJob, or leave it out.",
        )?,
        tune(
            "decayed",
            training(json!({"weightDecay": "1e30"})),
            BAD_END,
            "NonFiniteLoss",
            "step *: loss * with gradient norm * is not finite; the step was not applied: lower the learning rate, or look at the rows of this step. Next: lower `training.learningRate` or raise `training.warmup`, and look at the rows of that step.",
        )?,
        tune(
            "poisoned",
            json!({"spec": {"baseModelRef": {"name": "poisoned"}}}),
            BAD_END,
            "MalformedModel",
            "base model `poisoned`: its loss is NaN before the first update: its weights hold NaN or infinity. Next: replace the model's files.",
        )?,
    ])
}

fn tune(
    name: &str,
    change: Value,
    conditions: &'static [(&'static str, &'static str)],
    reason: &'static str,
    message: &'static str,
) -> Result<Bad> {
    Ok(Bad { object: merged(job(name, 1)?, &change), conditions, reason, message })
}
