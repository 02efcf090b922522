//! Fine-tuning: from a base and rows to a measured artefact, with nothing lost when the pod goes in between.
pub mod artefact;
pub mod card;
pub mod checkpoint;
pub mod curve;
pub mod order;
pub mod progress;
pub mod record;
pub mod run;
pub mod settings;

use std::path::Path;

use lathe_contract::{Identity, Metric, Outcome, Phase, Score, SourceRef, TrainTask};
use lathe_engine::files::ModelWeights;
use lathe_engine::{Adapter, Model, Trainer};
use lathe_plan::{TrainMethod, TrainPlan, plan_training};
use lathe_source::{Digest, Location};

use crate::base::{Base, stored_precision};
use crate::context::Context;
use crate::data::Files;
use crate::dataset::Question;
use crate::evaluate::measure::{Exam, Measured};
use crate::evaluate::tells::can_be_told;
use crate::failure::{Done, Halt};
use crate::inspect;
use checkpoint::Store;
use order::Order;
use record::{Environment, FullReport, Sample};
use settings::Settings;

/// Note beside the checkpoints: what was measured of the base.
const BEFORE: &str = "before";

/// Tunes a model.
///
/// # Errors
/// The one cause; or [`Halt::Stopped`] after SIGTERM, when the next pod goes on from what was saved.
pub fn run(context: &Context, task: &TrainTask) -> Done<Outcome> {
    let settings = Settings::of(task)?;
    context.status.phase(Phase::Fetching, "fetching base and rows");
    let base = Base::fetch(context, &task.base)?;
    let files = Files::fetch(context, &task.dataset)?;
    let identity = Identity::of(task, &base.digest, &files.digest.to_string());
    as_checked(task, &identity)?;
    if let Some(outcome) = record::of_inputs(context, task, &identity)? {
        tracing::info!("an earlier run with equal inputs has done this already");
        return Ok(outcome);
    }

    context.status.phase(Phase::Loading, "reading rows and weights");
    settings.fits(&base.config.shape)?;
    let encoded = files.read(&task.dataset)?.encode(context, &base.encoder(settings.sequence_length))?;
    let exam = Exam::new(&encoded.held, &task.evaluation.metrics);
    can_be_told(&task.evaluation, &task.dataset, exam.held_out())?;
    let keep = task.checkpoint.keep.max(1) as usize;
    let token = format!("{:016x}", rand::random::<u64>());
    let store = context
        .folder(&task.checkpoint.destination)
        .and_then(|folder| Store::open(&folder, &identity.run, keep, &token, &context.who()))
        .map_err(|halt| halt.of("`checkpoint.destination`"))?;
    let weights = base.weights()?;
    let model = base.load(&weights, settings.precision.unwrap_or_else(|| stored_precision(&weights)))?;
    context.go_on()?;

    let lengths = encoded.train.iter().map(|row| row.tokens.len()).collect();
    let order = Order::new(lengths, settings.batch_tokens, settings.seed);
    let steps = order.steps(settings.extent);
    let request = settings.request(model.precision(), model.threads());
    let plan = plan_training(&base.config.shape, &request).map_err(lathe_engine::Error::from)?;
    let environment = Environment::of(&model);
    let story = Story { context, task, base: &base, exam: &exam };
    let (before, trainer) = story.prepare(model, &plan, &store, steps)?;
    let mut run = run::Run { context, task, store: &store, trainer, rows: &encoded.train, order, steps };
    let progress = run.to_the_end()?;

    context.status.phase(Phase::EvaluatingAfter, "measuring the tuned model");
    let (after, tuned) = story.measure_after(run.trainer, &plan.method)?;
    let scores = scores(&task.evaluation.metrics, &before, &after);

    context.status.phase(Phase::Saving, "writing the artefact");
    let (location, digest) = story.save(tuned, &weights, |dir| {
        artefact::write_card(dir, &base, task, &files.digest.to_string(), &progress, &scores)
    })?;
    let destination = task.output.destination.clone();
    let artefact = SourceRef { uri: location.uri().to_owned(), revision: None, digest: None, ..destination };
    let outcome = Outcome::Trained {
        uri: artefact.uri.clone(),
        digest: digest.to_string(),
        dataset_digest: files.digest.to_string(),
        scores: scores.clone(),
        measured: exam.size(),
        progress: progress.clone(),
        model: inspect::inspect(context, &artefact)?,
    };
    let report = FullReport {
        object: format!("{} {}/{}", context.object.kind, context.object.namespace, context.object.name),
        task,
        base_digest: &base.digest,
        dataset_digest: files.digest.to_string(),
        inputs: &identity.inputs,
        digest: digest.to_string(),
        training_rows: encoded.train.len(),
        cut_rows: encoded.cut,
        measured: exam.size(),
        scores: &scores,
        progress: &progress,
        answers: story.samples(&before, &after)?,
        environment,
        planned_bytes: plan.totals,
    };
    record::write(context, task, &identity, &outcome, &report)?;
    if let Err(Halt::Failed(trouble)) = store.clear() {
        tracing::warn!("checkpoints that nobody needs any more are still there: {}", trouble.cause);
    }
    Ok(outcome)
}

/// Refuses files that are not those that were planned with: what is made of them would bear a wrong name.
fn as_checked(task: &TrainTask, identity: &Identity) -> Done<()> {
    if task.inputs.as_ref().is_none_or(|inputs| *inputs == identity.inputs) {
        return Ok(());
    }
    let cause = "the rows have changed since they were checked";
    Err(Halt::user(
        "DatasetChanged",
        cause,
        "delete this FineTuneJob and make it again, so that they are checked",
    ))
}

/// What training made.
enum Tuned {
    Lora(Adapter),
    Whole(Box<Model>),
}

/// What every part of the story looks at.
struct Story<'a> {
    context: &'a Context,
    task: &'a TrainTask,
    base: &'a Base,
    exam: &'a Exam<'a>,
}

impl Story<'_> {
    /// Measures the base, unless an earlier worker did, and makes the trainer.
    fn prepare(
        &self,
        model: Model,
        plan: &TrainPlan,
        store: &Store,
        steps: u64,
    ) -> Done<(Measured, Trainer)> {
        let hyper = settings::hyper(self.task, steps);
        let metrics = &self.task.evaluation.metrics;
        let noted: Option<(Vec<Metric>, Measured)> = store.noted(BEFORE);
        if let Some((_, before)) = noted.filter(|(measured, _)| measured == metrics) {
            return Ok((before, Trainer::new(model, plan, hyper)?));
        }
        self.context.status.phase(Phase::EvaluatingBefore, "measuring the base");
        let (answers, model) = self.exam.answers(self.context, self.base, model, None)?;
        let mut trainer = Trainer::new(model, plan, hyper)?;
        let perplexity = self.exam.perplexity(self.context, |rows| trainer.log_probs(rows))?;
        let before = self.exam.measured(perplexity, answers);
        run::note(store, BEFORE, &(metrics, &before));
        Ok((before, trainer))
    }

    fn measure_after(&self, mut trainer: Trainer, method: &TrainMethod) -> Done<(Measured, Tuned)> {
        let perplexity = self.exam.perplexity(self.context, |rows| trainer.log_probs(rows))?;
        let adapter = match method {
            TrainMethod::Lora(_) => trainer.adapter()?,
            TrainMethod::Full => None,
        };
        let model = trainer.into_model();
        let (answers, model) = self.exam.answers(self.context, self.base, model, adapter.as_ref())?;
        let tuned = match adapter {
            Some(adapter) => Tuned::Lora(adapter),
            None => Tuned::Whole(Box::new(model)),
        };
        Ok((self.exam.measured(perplexity, answers), tuned))
    }

    /// Writes the files where they shall stay, and gives them the name of their digest.
    fn save(
        &self,
        tuned: Tuned,
        weights: &ModelWeights,
        describe: impl FnOnce(&Path) -> Done<()>,
    ) -> Done<(Location, Digest)> {
        let output = &self.task.output;
        let write = || {
            let draft = self.context.draft(&output.destination, &output.model_name)?;
            let filled = match tuned {
                Tuned::Lora(adapter) => artefact::write_lora(draft.dir(), &adapter, self.base, self.task),
                Tuned::Whole(mut model) => artefact::write_whole(draft.dir(), &mut model, weights, self.base),
            };
            // Whoever came meanwhile has taken the folder: that is the cause then.
            filled.and_then(|()| describe(draft.dir())).or_else(|halt| {
                draft.is_there()?;
                Err(halt)
            })?;
            self.context.go_on()?;
            self.context.settle(draft, &output.destination)
        };
        write().map_err(|halt: Halt| halt.of("`output.destination`"))
    }

    fn samples<'a>(&'a self, before: &'a Measured, after: &'a Measured) -> Done<Vec<Sample<'a>>> {
        let questions = self.exam.questions().iter().zip(before.answers.iter().zip(&after.answers));
        let sample = |(question, (before, after)): (&&'a Question, (&'a String, &'a String))| {
            let prompt = self.base.tokenizer().decode(&question.prompt, false)?;
            Ok(Sample { prompt, reference: &question.reference, before, after })
        };
        questions.map(sample).collect()
    }
}

fn scores(metrics: &[Metric], before: &Measured, after: &Measured) -> Vec<Score> {
    let score = |&metric| Score { metric, before: before.value(metric), after: after.value(metric) };
    metrics.iter().map(score).filter(|score| score.after.is_some()).collect()
}
