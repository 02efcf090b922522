//! What the page shows of FineTuneJobs, kept small: a cluster may hold many, and their plans are long.
mod curve;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

use futures::StreamExt as _;
use futures::stream::{BoxStream, select_all};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::DeserializeGuard;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use lathe_api::conditions::{self, SUCCEEDED};
use lathe_api::{FineTuneJob, ProgressStatus, ScoreStatus};

pub use curve::Curve;

use crate::discovery::Failing;
use crate::metrics::Metrics;
use crate::tasks::Tasks;

/// Jobs of a namespace that are kept, the newest: as many as are shown.
pub const MOST: usize = 100;

/// A job, as far as it is shown.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    uid: String,
    /// Unix time in seconds at which it was made.
    pub created: i64,
    /// The Model that it begins with.
    pub base: String,
    /// The Model that it makes.
    pub output: String,
    /// The summary.
    pub succeeded: Option<Condition>,
    /// How far it is.
    pub progress: Option<ProgressStatus>,
    /// Measurements before and after.
    pub scores: Vec<ScoreStatus>,
    /// Its losses, as far as they were seen by this gateway.
    pub curve: Curve,
}

type ByName = BTreeMap<String, Arc<Job>>;

/// The jobs that there are, by namespace and name.
#[derive(Clone, Debug, Default)]
pub struct Jobs(Arc<RwLock<BTreeMap<String, ByName>>>);

impl Jobs {
    /// Jobs of one namespace or of all.
    pub fn list(&self, namespace: Option<&str>) -> Vec<Arc<Job>> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match namespace {
            Some(namespace) => all.get(namespace).into_iter().flat_map(ByName::values).cloned().collect(),
            None => all.values().flat_map(ByName::values).cloned().collect(),
        }
    }

    /// The job of this very name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Job>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(namespace)?.get(name).cloned()
    }

    /// A job as it is now: its loss becomes a point of its curve.
    pub fn saw(&self, object: &FineTuneJob) {
        let Some(mut job) = Job::of(object) else { return };
        self.change(|all| {
            let jobs = all.entry(job.namespace.clone()).or_default();
            if let Some(known) = jobs.get(&job.name).filter(|known| known.uid == job.uid) {
                job.curve = known.curve.clone();
            }
            let loss = job.progress.as_ref().and_then(|p| Some((p.step, p.loss.as_ref()?.parse().ok()?)));
            if let Some((step, loss)) = loss {
                job.curve.add(step, loss);
            }
            jobs.insert(job.name.clone(), Arc::new(job));
            if jobs.len() > MOST {
                let oldest = jobs.values().min_by_key(|job| job.created).map(|job| job.name.clone());
                oldest.and_then(|name| jobs.remove(&name));
            }
        });
    }

    /// A job that is no more.
    fn lost(&self, namespace: &str, name: &str) {
        self.change(|all| {
            if let Some(jobs) = all.get_mut(namespace) {
                jobs.remove(name);
            }
            all.retain(|_, jobs| !jobs.is_empty());
        });
    }

    /// These are all that `scope` has: a namespace, or the cluster.
    fn listed(&self, scope: Option<&str>, there: &BTreeSet<(String, String)>) {
        let gone = |job: &Arc<Job>| !there.contains(&(job.namespace.clone(), job.name.clone()));
        for job in self.list(scope).into_iter().filter(gone) {
            self.lost(&job.namespace, &job.name);
        }
    }

    /// Every change is whole.
    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, ByName>)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Job {
    fn of(object: &FineTuneJob) -> Option<Self> {
        let status = object.status.clone().unwrap_or_default();
        Some(Self {
            namespace: object.namespace()?,
            name: object.name_any(),
            uid: object.uid()?,
            created: object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            base: object.spec.base_model_ref.name.clone(),
            output: object.spec.output.model_name.clone(),
            succeeded: conditions::find(&status.conditions, SUCCEEDED).cloned(),
            progress: status.progress,
            scores: status.scores,
            curve: Curve::default(),
        })
    }
}

type Event = Result<watcher::Event<DeserializeGuard<FineTuneJob>>, watcher::Error>;

/// Follows the jobs of these scopes. Nothing that is served waits for them: an older chart gives no right to read them.
pub fn follow(tasks: &mut Tasks, client: &Client, scopes: &[Option<&str>], metrics: Arc<Metrics>) -> Jobs {
    let jobs = Jobs::default();
    let mut watches: Vec<BoxStream<'static, (usize, Event)>> = Vec::new();
    for (watch, scope) in scopes.iter().enumerate() {
        let api = match scope {
            None => Api::all(client.clone()),
            Some(namespace) => Api::namespaced(client.clone(), namespace),
        };
        let events = watcher(api, watcher::Config::default()).default_backoff();
        watches.push(events.map(move |event| (watch, event)).boxed());
    }
    let scopes: Vec<Option<String>> = scopes.iter().map(|scope| scope.map(str::to_owned)).collect();
    let seen = jobs.clone();
    tasks.spawn(async move {
        let mut events = select_all(watches);
        let mut failing = Failing::default();
        let mut listed = vec![BTreeSet::new(); scopes.len()];
        while let Some((watch, event)) = events.next().await {
            failing.saw(&metrics, watch, event.as_ref().err());
            if let Ok(event) = event {
                seen.follow(event, scopes[watch].as_deref(), &mut listed[watch]);
            }
        }
        "the watches of jobs"
    });
    jobs
}

impl Jobs {
    fn follow(
        &self,
        event: watcher::Event<DeserializeGuard<FineTuneJob>>,
        scope: Option<&str>,
        listed: &mut BTreeSet<(String, String)>,
    ) {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let place = |object: &DeserializeGuard<FineTuneJob>| {
            (object.namespace().unwrap_or_default(), object.name_any())
        };
        match event {
            Init => listed.clear(),
            InitDone => {
                self.listed(scope, listed);
                listed.clear();
            }
            Apply(object) => self.take(&object),
            InitApply(object) => {
                listed.insert(place(&object));
                self.take(&object);
            }
            Delete(object) => {
                let (namespace, name) = place(&object);
                self.lost(&namespace, &name);
            }
        }
    }

    /// One that cannot be read is passed over.
    fn take(&self, object: &DeserializeGuard<FineTuneJob>) {
        if let Ok(job) = &object.0 {
            self.saw(job);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{job, object};

    fn seen(jobs: &Jobs) -> Vec<String> {
        jobs.list(None).iter().map(|job| format!("{}/{}", job.namespace, job.name)).collect()
    }

    fn guarded(job: FineTuneJob) -> DeserializeGuard<FineTuneJob> {
        DeserializeGuard(Ok(job))
    }

    #[test]
    fn each_loss_that_is_told_is_a_point_and_another_job_of_the_name_begins_anew() {
        let jobs = Jobs::default();
        for (step, loss) in [(1, "3.5"), (10, "2.5"), (10, "2.5"), (20, "nonsense")] {
            jobs.saw(&job("a", "tone", json!({"progress": {"step": step, "steps": 20, "loss": loss}})));
        }
        // The last words have no loss.
        jobs.saw(&job("a", "tone", json!({})));
        assert_eq!(jobs.get("a", "tone").unwrap().curve.points(), [(1, 3.5), (10, 2.5)]);
        let mut other = serde_json::to_value(job("a", "tone", json!({}))).unwrap();
        other["metadata"]["uid"] = json!("another");
        jobs.saw(&object(other));
        assert!(jobs.get("a", "tone").unwrap().curve.points().is_empty());
    }

    #[test]
    fn a_list_and_a_deletion_take_away_what_is_gone_and_nothing_of_another_namespace() {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let (jobs, mut listed) = (Jobs::default(), BTreeSet::new());
        let mut follow = |scope: Option<&str>, event| jobs.follow(event, scope, &mut listed);
        let of = |namespace: &str, name: &str| guarded(job(namespace, name, json!({})));
        for (namespace, name) in [("a", "one"), ("a", "two"), ("b", "one")] {
            follow(None, Apply(of(namespace, name)));
        }
        for event in [Init, InitApply(of("a", "two")), InitDone] {
            follow(Some("a"), event);
        }
        assert_eq!(seen(&jobs), ["a/two", "b/one"]);
        follow(None, Delete(of("b", "one")));
        assert_eq!(seen(&jobs), ["a/two"]);
        for event in [Init, InitDone] {
            follow(None, event);
        }
        assert!(jobs.0.read().unwrap().is_empty());
    }

    #[test]
    fn the_newest_of_a_namespace_are_kept() {
        let jobs = Jobs::default();
        jobs.saw(&job("b", "old", json!({})));
        for number in 0..=MOST {
            let mut value = serde_json::to_value(job("a", &format!("job-{number:03}"), json!({}))).unwrap();
            value["metadata"]["creationTimestamp"] =
                json!(format!("2026-01-01T00:{:02}:{:02}Z", number / 60, number % 60));
            jobs.saw(&object(value));
        }
        assert_eq!(jobs.list(Some("a")).len(), MOST);
        assert!(jobs.get("a", "job-000").is_none() && jobs.get("b", "old").is_some());
    }
}
