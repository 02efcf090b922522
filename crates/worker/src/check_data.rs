//! Is the dataset good? Asked before an accelerator is.
use lathe_contract::{CheckDataReport, CheckDataTask, Outcome, Phase};
use lathe_engine::files::{ChatTemplate, ModelConfig, Tokenizer};
use lathe_source::Headers;

use crate::base::encoder_of;
use crate::context::Context;
use crate::data::Files;
use crate::dataset::{self, DatasetError};
use crate::evaluate::tells::{HeldOut, can_be_told};
use crate::failure::{Done, Halt};
use crate::inspect::small;

/// Reads every row with the model's tokenizer and template, counts, and asks whether what shall be measured can be.
///
/// # Errors
/// The first thing that is wrong, with file, line and field.
pub fn run(context: &Context, task: &CheckDataTask) -> Done<Outcome> {
    context.status.phase(Phase::Fetching, "fetching the dataset");
    let files = Files::fetch(context, &task.dataset)?;
    let what = format!("base model `{}`", task.model.name);
    let headers = context.headers(&what, &task.model.source)?;
    let words = Words::of(&headers).map_err(|halt| halt.of(&what))?;
    context.status.phase(Phase::Loading, "reading every row");
    let max_tokens = usize::try_from(task.sequence_length).unwrap_or_default().max(2);
    if max_tokens > words.config.shape.max_position {
        let most = words.config.shape.max_position;
        let cause =
            format!("`sequenceLength` must be at most {most}, the context of {what} (found {max_tokens})");
        return Err(Halt::user("InvalidSettings", cause, "lower `training.sequenceLength`"));
    }
    let encoder = encoder_of(&words.config, &words.tokenizer, words.template.as_ref(), max_tokens);
    let report = dataset::check(&files.source(&task.dataset), &encoder)?;
    if let Some(malformed) = report.malformed.into_iter().next() {
        return Err(DatasetError::from(malformed).into());
    }
    let held = HeldOut { rows: report.measurable_rows > 0, questions: report.questions > 0 };
    can_be_told(&task.evaluation, &task.dataset, held)?;
    Ok(Outcome::DataChecked(CheckDataReport {
        format: report.format.map(|format| format.name()).unwrap_or_default().to_owned(),
        rows: count(report.rows),
        tokens: count(report.tokens),
        learned_tokens: count(report.learned_tokens),
        longest_row: count(report.longest_row),
        over_long_rows: count(report.over_long_rows),
        duplicate_rows: count(report.duplicate_rows),
        evaluation_rows: count(report.evaluation_rows),
        leaked_rows: count(report.leaked_rows),
        digest: files.digest.to_string(),
    }))
}

/// What makes tokens of text, read without fetching weights.
struct Words {
    config: ModelConfig,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

impl Words {
    fn of(headers: &Headers) -> Done<Self> {
        let text = |name: &str| headers.small.get(name).map(Vec::as_slice);
        let config =
            ModelConfig::parse(small(&headers.small, "config.json")?, text("generation_config.json"))?;
        let tokenizer = Tokenizer::parse(small(&headers.small, "tokenizer.json")?, config.shape.vocab)?;
        let template = ChatTemplate::parse(text("tokenizer_config.json"), text("chat_template.jinja"))?;
        Ok(Words { config, tokenizer, template })
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
