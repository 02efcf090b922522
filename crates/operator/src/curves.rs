//! Loss curves of the jobs that this leader has heard of, for the gateways, whose page shows them.
//!
//! They are numbered by their last change, so that each gateway is told what it does not know, as it tells seconds itself. Nothing is
//! stored: a new leader hears the whole curve of a job that runs with its next report, and a shorter one of a job that is over from the
//! last words of its pod.
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use kube::ResourceExt as _;
use lathe_api::FineTuneJob;
use lathe_contract::{JobCurve, JobCurves, MAX_CURVES, MAX_POINTS, Outcome, Report, thinned};

/// The curves, by namespace and name.
#[derive(Debug, Default)]
pub struct Curves(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The number of the newest change.
    newest: u64,
    jobs: HashMap<(String, String), (u64, JobCurve)>,
}

impl Curves {
    /// What the worker of a job says, which has all of its losses.
    pub fn reported(&self, job: &FineTuneJob, report: &Report) {
        if let Some(progress) = report.progress.as_ref().filter(|progress| !progress.curve.is_empty()) {
            self.lock().set(job, thinned(&progress.curve, MAX_POINTS));
        }
    }

    /// The last words of a worker, which have fewer points than its reports had, but the last one.
    pub fn ended(&self, job: &FineTuneJob, outcome: &Outcome) {
        let (Outcome::Trained { progress, .. } | Outcome::Stopped { progress: Some(progress) }) = outcome
        else {
            return;
        };
        let Some(last) = progress.curve.last() else { return };
        let mut all = self.lock();
        let points = match all.of(job) {
            None => thinned(&progress.curve, MAX_POINTS),
            Some(known) if known.points.last().is_some_and(|(step, _)| *step >= last.0) => return,
            Some(known) => {
                let mut points = known.points.clone();
                points.truncate(MAX_POINTS - 1);
                points.push(*last);
                points
            }
        };
        all.set(job, points);
    }

    /// The job is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.lock().jobs.remove(&(namespace.to_owned(), name.to_owned()));
    }

    /// Those that changed after the change of this number, as many as one call may hold, and the number of the last one of them.
    pub fn after(&self, change: u64) -> Option<(u64, JobCurves)> {
        let all = self.lock();
        let mut newer: Vec<_> = all.jobs.values().filter(|(number, _)| *number > change).collect();
        newer.sort_unstable_by_key(|(number, _)| *number);
        newer.truncate(MAX_CURVES);
        let (last, _) = newer.last()?;
        Some((*last, JobCurves { curves: newer.iter().map(|(_, curve)| curve.clone()).collect() }))
    }

    /// Every change is whole.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn of(&self, job: &FineTuneJob) -> Option<&JobCurve> {
        let (_, curve) = self.jobs.get(&key(job))?;
        (Some(&curve.uid) == job.metadata.uid.as_ref()).then_some(curve)
    }

    fn set(&mut self, job: &FineTuneJob, points: Vec<(i64, f64)>) {
        if self.of(job).is_some_and(|known| known.points == points) {
            return;
        }
        self.newest += 1;
        let (namespace, name) = key(job);
        let curve = JobCurve { namespace, name, uid: job.metadata.uid.clone().unwrap_or_default(), points };
        self.jobs.insert(key(job), (self.newest, curve));
    }
}

fn key(job: &FineTuneJob) -> (String, String) {
    (job.namespace().unwrap_or_default(), job.name_any())
}

#[cfg(test)]
pub mod tests {
    use lathe_contract::TrainProgress;
    use serde_json::json;

    use super::*;
    use crate::testing::object;

    pub fn job(name: &str, uid: &str) -> FineTuneJob {
        object(json!({
            "metadata": {"namespace": "n", "name": name, "uid": uid},
            "spec": {"baseModelRef": {"name": "b"}, "dataset": {"train": {"uri": "pvc://d/f"}},
                "output": {"modelName": "m"}},
        }))
    }

    fn progress(points: &[(i64, f64)]) -> Option<TrainProgress> {
        Some(TrainProgress { curve: points.to_vec(), ..TrainProgress::default() })
    }

    fn says(curves: &Curves, job: &FineTuneJob, points: &[(i64, f64)]) {
        curves.reported(job, &Report { progress: progress(points), ..Report::default() });
    }

    /// Curves by uid.
    type Told = Vec<(String, Vec<(i64, f64)>)>;

    fn told(curves: &Curves, after: u64) -> (u64, Told) {
        let (last, told) = curves.after(after).unwrap_or_default();
        (last, told.curves.into_iter().map(|curve| (curve.uid, curve.points)).collect())
    }

    #[test]
    fn each_change_is_told_once_and_the_oldest_first() {
        let curves = Curves::default();
        assert!(curves.after(0).is_none());
        says(&curves, &job("a", "1"), &[(1, 3.0)]);
        says(&curves, &job("b", "2"), &[(1, 5.0)]);
        says(&curves, &job("a", "1"), &[(1, 3.0), (2, 2.0)]);
        // Neither of these is news.
        says(&curves, &job("b", "2"), &[(1, 5.0)]);
        curves.reported(&job("b", "2"), &Report::default());
        let all = [("2".to_owned(), vec![(1, 5.0)]), ("1".to_owned(), vec![(1, 3.0), (2, 2.0)])];
        assert_eq!(told(&curves, 0), (3, all.to_vec()));
        assert_eq!(told(&curves, 2), (3, all[1..].to_vec()));
        assert!(curves.after(3).is_none());
        // One that begins anew from a checkpoint, and another one of the name.
        says(&curves, &job("a", "1"), &[(1, 3.0)]);
        says(&curves, &job("b", "3"), &[(1, 5.0)]);
        assert_eq!(told(&curves, 3).1, [("1".into(), vec![(1, 3.0)]), ("3".into(), vec![(1, 5.0)])]);
        curves.forget("n", "a");
        assert_eq!(told(&curves, 0).1.len(), 1);
    }

    #[test]
    fn many_are_told_in_several_calls() {
        let curves = Curves::default();
        for number in 0..=MAX_CURVES {
            says(&curves, &job(&format!("j{number}"), &number.to_string()), &[(1, 1.0)]);
        }
        let (last, first) = told(&curves, 0);
        let (_, rest) = told(&curves, last);
        assert_eq!((first.len(), rest.len(), rest[0].0.as_str()), (MAX_CURVES, 1, "50"));
    }

    #[test]
    fn last_words_add_the_last_loss_or_all_that_is_known() {
        let (curves, job) = (Curves::default(), job("a", "1"));
        let ends =
            |points: &[(i64, f64)]| curves.ended(&job, &Outcome::Stopped { progress: progress(points) });
        ends(&[]);
        assert!(curves.after(0).is_none());
        ends(&[(1, 4.0), (9, 2.0)]);
        assert_eq!(told(&curves, 0).1[0].1, [(1, 4.0), (9, 2.0)]);
        let many: Vec<_> = (1..=200).map(|step| (step, 1.0)).collect();
        says(&curves, &job, &many);
        ends(&[(1, 1.0), (100, 1.0), (200, 1.0)]);
        assert_eq!(told(&curves, 0).1[0].1, many);
        ends(&[(1, 1.0), (250, 0.5)]);
        let points = &told(&curves, 0).1[0].1;
        assert_eq!((points.len(), points[198], points[199]), (200, (199, 1.0), (250, 0.5)));
    }
}
