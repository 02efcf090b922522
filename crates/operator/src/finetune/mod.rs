//! `FineTuneJob`: check the dataset, run the worker, record what it made.
//!
//! observe (what is there) -> plan (what stage that is, and the writes it needs) -> build (the objects) -> apply -> status.
//! A stage is decided from what is there now, so a round that was cut anywhere is taken up by the next one.
mod build;
mod fallback;
mod observe;
mod plan;
mod rivals;
mod status;
#[cfg(test)]
mod tests;
mod usage;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, PersistentVolumeClaim, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    ResourceExt as _,
    runtime::{controller::Action, reflector::Store, watcher},
};
use lathe_api::{AcceleratorProfile, FineTuneJob, FineTuneJobStatus, Model, conditions, names};
use lathe_resolve::finetune;
use serde_json::json;

use crate::{
    apply::Happened,
    claims,
    context::{Context, Scope},
    error::{Error, told},
    job::{Owner, Run, State},
    memory::Memory,
    runtime::{Guard, Reconcile, Stop, Watches, labelled_owner},
};
use observe::Observed;
use plan::{Plan, Write};

/// Value of the label `lathe.dev/kind`.
const KIND: &str = "finetunejob";
/// Condition: the dataset is what the job needs.
const DATASET_VALID: &str = "DatasetValid";
/// Progress alone is written this often, at most.
const PROGRESS_PERIOD: Duration = Duration::from_secs(10);

/// Unfinished jobs are looked at this often, whatever happens.
const IDLE: Duration = Duration::from_secs(600);

/// The controller of FineTuneJobs.
struct FineTuneJobs {
    context: Arc<Context>,
    tunes: Store<Guard<FineTuneJob>>,
    jobs: Store<Job>,
    pods: Store<Pod>,
    models: Store<Guard<Model>>,
    profiles: Store<Guard<AcceleratorProfile>>,
    claims: Store<PersistentVolumeClaim>,
    contracts: Store<ConfigMap>,
    policies: Store<NetworkPolicy>,
    /// When the status of each unfinished job was last written.
    written: Memory<Option<Instant>>,
}

/// Looks after the FineTuneJobs of `scope` until `stop`.
pub fn controller(context: &Arc<Context>, scope: &Scope, stop: &Stop) -> BoxFuture<'static, ()> {
    let client = &context.client;
    let mut watches = Watches::<FineTuneJob>::new(scope, client);
    let ours = watcher::Config::default().labels(&format!("{}={KIND}", names::LABEL_KIND));
    let all = watcher::Config::default();
    let jobs = FineTuneJobs {
        context: context.clone(),
        tunes: watches.objects(),
        jobs: watches.also(scope.api(client), ours.clone(), |job: &Job, _| labelled_owner(job)),
        contracts: watches.also(scope.api(client), ours.clone(), |map: &ConfigMap, _| labelled_owner(map)),
        policies: watches
            .also(scope.api(client), ours.clone(), |policy: &NetworkPolicy, _| labelled_owner(policy)),
        pods: watches.also(scope.api(client), ours, |pod: &Pod, _| labelled_owner(pod)),
        models: watches.also(scope.api(client), all.clone(), observe::woken_by_model),
        profiles: watches.also(kube::Api::all(client.clone()), all, observe::woken_by_profile),
        claims: watches.also(
            scope.api(client),
            watcher::Config::default(),
            |_: &PersistentVolumeClaim, _| Vec::new(),
        ),
        written: Memory::default(),
    };
    watches.run(jobs, stop.clone()).boxed()
}

impl Reconcile for FineTuneJobs {
    type Object = FineTuneJob;
    const NAME: &'static str = "FineTuneJob";
    const SUMMARY: &'static str = conditions::SUCCEEDED;

    fn context(&self) -> &Context {
        &self.context
    }

    async fn reconcile(&self, job: &FineTuneJob) -> Result<Action, Error> {
        let mut observed = observe::observe(self, job, Timestamp::now()).await?;
        self.plot(job, &observed);
        let mut plan = plan::plan(job, &observed, &self.context.config.images);
        if plan.starts() {
            // The watch may not have brought a job yet that is ahead of this one.
            observed.rivals = observe::rivals(self, job).await?;
            plan = plan::plan(job, &observed, &self.context.config.images);
        }
        let applied = self.apply(job, &plan).await;
        // A write that is refused is no reason to leave pods without their policy, nor the other way round.
        let kept = self.keep(job, &observed).await;
        // What could not be cleaned up hides no refusal.
        let (refusal, done) = told(kept.and(applied))?;
        let fresh = status::status(job, &observed, &plan, refusal.as_ref());
        self.record(job, &fresh).await?;
        if let Some(profile) = &plan.passed_over {
            let message = format!("{profile} had no room within `accelerator.fallbackAfter`");
            self.tell(job, false, "FellBack", &message).await;
        }
        done?;
        if fresh.completion_time.is_none() {
            // A watch that lost an event must not leave a job standing.
            return Ok(Action::requeue(plan.next.unwrap_or(IDLE)));
        }
        Ok(plan.next.map_or_else(Action::await_change, Action::requeue))
    }

    fn forget(&self, namespace: &str, name: &str) {
        self.written.forget(namespace, name);
        self.context.curves.forget(namespace, name);
    }
}

impl FineTuneJobs {
    /// The writes of a plan, in their order.
    async fn apply(&self, job: &FineTuneJob, plan: &Plan) -> Result<(), Error> {
        let mut cleaned = Ok(());
        let writer = &self.context.writer;
        let namespace = job.namespace().unwrap_or_default();
        let one_node = claims::one_node(&self.claims, &namespace, &self.context.config.artifacts);
        for write in &plan.writes {
            match write {
                Write::Check(checking) => {
                    writer.start(&build::check(job, &self.context, &one_node, checking)?).await?;
                }
                Write::Claim => {
                    let claim = build::claim(job, &self.context.config.artifacts);
                    drop(writer.create_once(&claim, build::is_for_artifacts).await?)
                }
                Write::Start { attempt, training } => {
                    let train = build::train(job, &self.context, &one_node, *attempt, training)?;
                    writer.start(&train).await?;
                    self.tell(job, true, "AttemptStarted", &format!("made Job {}", train.job.name_any()))
                        .await;
                }
                Write::Suspend(attempt, suspend) => {
                    writer.merge(&**attempt, &json!({"spec": {"suspend": suspend}})).await?;
                    let (reason, verb) =
                        if *suspend { ("Suspended", "suspended") } else { ("Resumed", "resumed") };
                    self.tell(job, true, reason, &format!("{verb} Job {}", attempt.name_any())).await;
                }
                Write::Delete(gone) => writer.delete(&**gone).await?,
                // What is left of it keeps nothing else from being done.
                Write::CleanUp(over) => cleaned = cleaned.and(writer.clean_up(&**over).await),
                Write::Summarise => {
                    writer.start(&build::summary(job, &self.context, &one_node)?).await?;
                }
                Write::MakeModel(trained, scores) => {
                    let is_it = |there: &Model| plan::is_same(there, trained);
                    let made = writer.create_once(&finetune::model(job, trained), is_it).await?;
                    if !scores.is_empty() {
                        writer.merge_status(&made, &json!({"status": {"scores": scores}})).await?;
                    }
                    self.tell(job, true, "ModelMade", &format!("made Model {}", made.name_any())).await;
                }
                Write::Pass(model) => {
                    writer.merge(&**model, &json!({"spec": {"derivedFrom": {"failedGates": null}}})).await?;
                }
                Write::Scores(model, scores) => {
                    writer.merge_status(&**model, &json!({"status": {"scores": scores}})).await?;
                }
            }
        }
        cleaned
    }

    /// Keeps the losses that the worker tells, for those who plot them.
    fn plot(&self, job: &FineTuneJob, observed: &Observed) {
        if let Some(report) = &observed.report {
            self.context.curves.reported(job, report);
        }
        if let Some(State::Complete(Ok(outcome))) =
            observed.attempt.as_ref().map(|attempt| attempt.run.state())
        {
            self.context.curves.ended(job, &outcome);
        }
    }

    /// Makes again what the pods of live Jobs need and have lost.
    async fn keep(&self, job: &FineTuneJob, observed: &Observed) -> Result<(), Error> {
        let attempt = observed.attempt.iter().map(|attempt| &attempt.run);
        let runs: Vec<&Run> = [&observed.check, &observed.summary].into_iter().chain(attempt).collect();
        let policy = build::policy(job, &self.context)?;
        let lacking = observed.beside.lacks(&Owner::of(job), KIND, policy, &runs)?;
        lacking.apply(&self.context.writer).await
    }

    async fn tell(&self, job: &FineTuneJob, good: bool, reason: &str, message: &str) {
        self.context.writer.event(job, &Happened { good, reason, action: "Reconcile", message }).await;
    }

    /// Writes the status; progress alone only now and then. An end is told as an event too.
    async fn record(&self, job: &FineTuneJob, fresh: &FineTuneJobStatus) -> Result<(), Error> {
        let old = job.status.as_ref();
        if old.is_some_and(|old| status::only_progress(old, fresh)) {
            let last = self.written.with(job, |at| *at);
            if last.is_some_and(|last| last.elapsed() < PROGRESS_PERIOD) {
                return Ok(());
            }
        }
        if !self.context.writer.status(job, old, fresh).await? {
            return Ok(());
        }
        let ended = fresh.completion_time.is_some();
        self.written.with(job, |at| *at = (!ended).then(Instant::now));
        let just_ended = ended && old.is_none_or(|old| old.completion_time.is_none());
        if let Some(end) = conditions::find(&fresh.conditions, conditions::SUCCEEDED).filter(|_| just_ended) {
            self.tell(job, end.status == "True", &end.reason, &end.message).await;
        }
        Ok(())
    }
}
