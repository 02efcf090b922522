//! What the page shows of FineTuneJobs, kept small: a cluster may hold many, and their plans are long.
pub mod handed;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use futures::StreamExt as _;
use futures::stream::{BoxStream, select_all};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::DeserializeGuard;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use lathe_api::conditions::{self, SUCCEEDED};
use lathe_api::{FineTuneJob, ProgressStatus, ScoreStatus};
use lathe_contract::JobCurve;

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
    /// Steps and losses in nats a token, as the operator told them last.
    pub losses: Vec<(i64, f64)>,
}

/// Losses that wait for their job.
const EARLY: usize = 1000;

type ByName = BTreeMap<String, Arc<Job>>;

/// The jobs that there are, by namespace and name.
#[derive(Clone, Debug, Default)]
pub struct Jobs(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    jobs: RwLock<BTreeMap<String, ByName>>,
    /// Losses of jobs that no watch has told of yet, by namespace and name.
    early: Mutex<BTreeMap<(String, String), JobCurve>>,
    /// Whether each watch has told all that there are.
    listed: AtomicBool,
}

impl Jobs {
    /// Jobs of one namespace or of all.
    pub fn list(&self, namespace: Option<&str>) -> Vec<Arc<Job>> {
        let all = self.0.jobs.read().unwrap_or_else(PoisonError::into_inner);
        match namespace {
            Some(namespace) => all.get(namespace).into_iter().flat_map(ByName::values).cloned().collect(),
            None => all.values().flat_map(ByName::values).cloned().collect(),
        }
    }

    /// The job of this very name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Job>> {
        self.0.jobs.read().unwrap_or_else(PoisonError::into_inner).get(namespace)?.get(name).cloned()
    }

    /// Whether all that there are have been told once.
    pub fn are_listed(&self) -> bool {
        self.0.listed.load(Relaxed)
    }

    /// As before the first list.
    #[cfg(test)]
    pub fn forget_that_they_are_listed(&self) {
        self.0.listed.store(false, Relaxed);
    }

    /// These are all.
    #[cfg(test)]
    pub fn of(all: &[FineTuneJob]) -> Self {
        let jobs = Self::default();
        all.iter().for_each(|job| jobs.saw(job));
        jobs.0.listed.store(true, Relaxed);
        jobs
    }

    /// The losses of a job, or of one that will be known in a moment.
    pub fn plot(&self, curve: JobCurve) {
        let unknown = self.change(|all| {
            let job = all.get_mut(&curve.namespace).and_then(|jobs| jobs.get_mut(&curve.name));
            let Some(job) = job.filter(|job| job.uid == curve.uid) else { return Some(curve) };
            // A new leader knows fewer points of a job that is over.
            let last = |points: &[(i64, f64)]| points.last().map(|(step, _)| *step);
            if curve.points.len() >= job.losses.len() || last(&curve.points) != last(&job.losses) {
                Arc::make_mut(job).losses = curve.points;
            }
            None
        });
        let Some(curve) = unknown else { return };
        let mut early = self.early();
        if early.len() < EARLY {
            early.insert((curve.namespace.clone(), curve.name.clone()), curve);
        }
    }

    fn early(&self) -> MutexGuard<'_, BTreeMap<(String, String), JobCurve>> {
        self.0.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job as it is now.
    pub fn saw(&self, object: &FineTuneJob) {
        let Some(mut job) = Job::of(object) else { return };
        let early = self.early().remove(&(job.namespace.clone(), job.name.clone()));
        if let Some(curve) = early.filter(|curve| curve.uid == job.uid) {
            job.losses = curve.points;
        }
        self.change(|all| {
            let jobs = all.entry(job.namespace.clone()).or_default();
            let known = jobs.get(&job.name).filter(|known| known.uid == job.uid && job.losses.is_empty());
            if let Some(known) = known {
                job.losses.clone_from(&known.losses);
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
    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<String, ByName>) -> T) -> T {
        change(&mut self.0.jobs.write().unwrap_or_else(PoisonError::into_inner))
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
            losses: Vec::new(),
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
        let mut unlisted: BTreeSet<usize> = (0..scopes.len()).collect();
        while let Some((watch, event)) = events.next().await {
            failing.saw(&metrics, watch, event.as_ref().err());
            let Ok(event) = event else { continue };
            if matches!(event, watcher::Event::InitDone) {
                unlisted.remove(&watch);
            }
            seen.follow(event, scopes[watch].as_deref(), &mut listed[watch]);
            seen.0.listed.store(unlisted.is_empty(), Relaxed);
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
    fn losses_stay_with_their_job_and_another_one_of_the_name_begins_anew() {
        let jobs = Jobs::default();
        let plot = |namespace: &str, uid: Option<String>, points: &[(i64, f64)]| {
            let (uid, points) = (uid.unwrap_or_default(), points.to_vec());
            jobs.plot(JobCurve { namespace: namespace.to_owned(), name: "tone".to_owned(), uid, points });
        };
        let uid = || job("a", "tone", json!({})).uid();
        let losses = || jobs.get("a", "tone").unwrap().losses.clone();
        // Told before its watch told of it, and of another one of the name.
        plot("a", Some("another".to_owned()), &[(1, 9.0)]);
        plot("a", uid(), &[(1, 3.5)]);
        jobs.saw(&job("a", "tone", json!({})));
        assert_eq!(losses(), [(1, 3.5)]);
        plot("a", uid(), &[(1, 3.5), (5, 3.0), (10, 2.5)]);
        // As a new leader knows it.
        plot("a", uid(), &[(1, 3.5), (10, 2.5)]);
        assert_eq!(losses(), [(1, 3.5), (5, 3.0), (10, 2.5)]);
        // It goes on from a checkpoint.
        plot("a", uid(), &[(1, 3.5)]);
        plot("a", uid(), &[(1, 3.5), (10, 2.5)]);
        plot("b", uid(), &[(1, 7.0)]);
        plot("a", Some("another".to_owned()), &[(1, 7.0)]);
        jobs.saw(&job("a", "tone", json!({"progress": {"step": 20, "steps": 20, "loss": "1.5"}})));
        assert_eq!(losses(), [(1, 3.5), (10, 2.5)]);
        let mut other = serde_json::to_value(job("a", "tone", json!({}))).unwrap();
        other["metadata"]["uid"] = json!("another");
        jobs.saw(&object(other));
        assert_eq!(losses(), []);
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
        assert!(jobs.0.jobs.read().unwrap().is_empty());
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
