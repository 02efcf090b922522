//! A FineTuneJob: its dataset is checked, its plan made, its worker followed, its result measured and kept as a Model.
use std::collections::BTreeSet;
use std::time::Instant;

use lathe_api::{FineTuneJob, ScoreStatus};
use lathe_contract::{CheckDataReport, Outcome, Phase, Task, TrainProgress};
use lathe_resolve::finetune::{self, Dataset, TrainFacts, Trained, Training, failed_gates};
use lathe_resolve::to_score;

use super::budget::Spent;
use super::show::{Event, table};
use super::{Run, name, reference, unexpected, worker};
use crate::failure::{Done, Problem};
use crate::output::{Output, say};

/// The words of the operator's status.
fn exceeded(progress: Option<&TrainProgress>, why: &str) -> Problem {
    let at = progress.filter(|progress| progress.steps > 0);
    let at = at.map_or(String::new(), |p| format!("at step {} of {} ", p.step, p.steps));
    Problem::user("BudgetExceeded", format!("stopped {at}{why}."))
}

impl Run {
    /// Tunes, or finds that it was done.
    pub(super) async fn tune(&mut self, job: &FineTuneJob) -> Done<()> {
        let what = worker::object_name(&reference("FineTuneJob", &job.metadata, &job.spec));
        self.tune_named(job, &what).await.map_err(|problem| match problem.reason.as_str() {
            "Stopped" => problem,
            _ => problem.of(&what),
        })
    }

    async fn tune_named(&mut self, job: &FineTuneJob, what: &str) -> Done<()> {
        let made = &job.spec.output.model_name;
        if job.spec.suspend {
            self.skip(&format!("FineTuneJob {}", name(&job.metadata)), "`spec.suspend` is true");
            return Ok(());
        }
        // What the plan refuses is told before anything is read.
        self.plan(job, None)?;
        let checked = self.check_data(job, what).await?;
        let dataset = Dataset { tokens: Some(checked.tokens), digest: &checked.digest };
        let training = self.plan(job, Some(dataset))?;
        if let Some(caveat) = finetune::caveat(&training.plan) {
            self.show.note(caveat);
        }
        let there = self.artefacts(job);
        let (outcome, trained) = self.train(job, &training, what).await?;
        let Outcome::Trained { uri, digest, dataset_digest, scores, model, .. } = outcome else {
            return Err(unexpected(what));
        };
        let scores: Vec<ScoreStatus> = scores.iter().filter_map(to_score).collect();
        let failed = failed_gates(&job.spec.evaluation.gates, &scores);
        let folder = self.place.path(&uri).map_or_else(|| uri.clone(), |path| path.display().to_string());
        let hex = digest.strip_prefix("sha256:").unwrap_or(&digest);
        let adopted = !trained && there.contains(hex);
        let did = if adopted { "an earlier run made it from the same inputs" } else { "tuned and measured" };
        self.show.done(&format!("{did}; Model {made} is {folder}"));
        if self.args.output == Output::Text && !scores.is_empty() {
            say(&table(&scores));
        }
        let object = what;
        self.show.event(&Event::Tuned { object, model: made, folder: &folder, adopted, scores: &scores });
        if !failed.is_empty() {
            let message = format!(
                "{}. The result is kept to look at, and not served. Next: tune longer or on more rows, or lower the gate.",
                failed.join("; ")
            );
            return Err(Problem::user("GateFailed", message));
        }
        let base = self.model(&job.spec.base_model_ref.name)?;
        let trained = Trained {
            uri,
            digest,
            dataset_digest,
            inputs_hash: training.inputs_hash,
            adapter: model.shape.hidden == 0,
            license: base.spec.license.clone(),
            failed_gates: failed,
        };
        self.know(finetune::model(job, &trained), &model).map(drop)
    }

    fn plan(&self, job: &FineTuneJob, dataset: Option<Dataset<'_>>) -> Done<Training> {
        let facts = TrainFacts {
            name: &name(&job.metadata),
            attempt: 1,
            base: self.model(&job.spec.base_model_ref.name)?,
            profiles: &self.profiles,
            images: &self.images,
            dataset,
        };
        Ok(finetune::training(&job.spec, &facts)?)
    }

    async fn check_data(&mut self, job: &FineTuneJob, what: &str) -> Done<CheckDataReport> {
        let checking = finetune::checking(&job.spec, self.model(&job.spec.base_model_ref.name)?)?;
        let object = reference("FineTuneJob", &job.metadata, &job.spec);
        let contract = self.workers.contract(object, &checking.mounts, Task::CheckData(checking.task));
        let mut running =
            self.workers.start(&self.place, &mut self.show, contract, job.spec.pod.as_ref(), None)?;
        let ended = self.workers.finish(&mut running, &mut self.show, &mut self.stop, |_| None).await?;
        let Outcome::DataChecked(report) = ended else { return Err(unexpected(what)) };
        let CheckDataReport { format, rows, tokens, evaluation_rows, over_long_rows, leaked_rows, .. } =
            &report;
        let mut said = format!("{rows} {format} rows with {tokens} tokens, {evaluation_rows} held out");
        if *over_long_rows > 0 {
            said.push_str(&format!(
                "; {over_long_rows} rows are longer than the sequence length and are cut"
            ));
        }
        if *leaked_rows > 0 {
            said.push_str(&format!("; {leaked_rows} held-out rows stand in the training rows too"));
        }
        self.show.done(&said);
        Ok(report)
    }

    /// Follows the training to its end, and says whether there was any.
    async fn train(&mut self, job: &FineTuneJob, training: &Training, what: &str) -> Done<(Outcome, bool)> {
        let mut spent = Spent::open(self.place.kept(what, "spent.json")?, job, training, Instant::now());
        if let Some(why) = spent.over(Instant::now()) {
            return Err(exceeded(None, &why));
        }
        let object = reference("FineTuneJob", &job.metadata, &job.spec);
        let task = Task::Train(Box::new(training.task.clone()));
        let contract = self.workers.contract(object, &training.mounts, task);
        let mut running =
            self.workers.start(&self.place, &mut self.show, contract, job.spec.pod.as_ref(), None)?;
        let (mut trained, mut progress) = (false, None);
        let seen = |report: Option<&lathe_contract::Report>| {
            if let Some(report) = report {
                trained |= report.phase == Phase::Training;
                progress = report.progress.clone();
            }
            let now = Instant::now();
            // A budget that cannot be remembered is none.
            spent.tick(now).err().or_else(|| spent.over(now).map(|why| exceeded(progress.as_ref(), &why)))
        };
        let ended = self.workers.finish(&mut running, &mut self.show, &mut self.stop, seen).await;
        // To find that it was done costs nothing.
        if trained || ended.is_err() {
            spent.keep(Instant::now())?;
        }
        Ok((ended?, trained))
    }

    /// Names of the artefacts that are there already, each its digest; none where they are not on this machine.
    fn artefacts(&self, job: &FineTuneJob) -> BTreeSet<String> {
        let folder = self.place.path(&finetune::output_folder(&job.spec).uri);
        let entries = folder.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    }
}
