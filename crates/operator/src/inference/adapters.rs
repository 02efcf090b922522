//! Tells running workers which adapters to hold, and remembers what they were told.
//!
//! The memory is a saving only: a worker that is told twice changes nothing, so an operator that starts anew tells each once.
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use lathe_api::InferenceService;
use lathe_contract::{AdapterState, AdapterStatus, DesiredAdapters, Task};
use lathe_resolve::{inference::Serving, pod};

use super::observe::{ASKING, Observed, ip};
use crate::{channel::Channel, pods};

/// A worker that could not load an adapter is asked to try again after this time.
const AGAIN: Duration = Duration::from_secs(60);

/// What was told and written, by the service's UID.
#[derive(Debug, Default)]
pub struct Told(Mutex<HashMap<String, Memory>>);

#[derive(Debug, Default)]
struct Memory {
    /// The set that each worker was told, by pod and start of its container.
    workers: HashMap<String, (String, Instant)>,
    throughput: Option<Instant>,
}

impl Told {
    /// Tells each ready worker of the wanted revision its adapters, and gives what workers say of theirs, by pod.
    pub async fn tell(
        &self,
        service: &InferenceService,
        serving: Option<&Serving>,
        seen: &Observed,
        channel: &Channel,
    ) -> BTreeMap<String, AdapterStatus> {
        let mut said: BTreeMap<String, AdapterStatus> =
            seen.reports.iter().map(|(pod, report)| (pod.clone(), report.adapters.clone())).collect();
        let Some((serving, wanted)) = serving.and_then(|s| Some((s, wanted(s)?))) else { return said };
        let Ok(hash) = pod::checksum(&wanted) else { return said };
        let uid = service.uid().unwrap_or_default();
        let current = |pod: &&Pod| pods::checksum(Some(&pod.metadata)) == Some(&serving.checksum);
        let ready: Vec<&Pod> = seen.pods.iter().filter(|pod| pods::is_ready(pod)).filter(current).collect();
        self.forget_others(&uid, &ready);
        let begun = Instant::now();
        for pod in ready {
            // The rest is told in the next round.
            if begun.elapsed() >= ASKING {
                break;
            }
            let failed = said.get(&pod.name_any()).is_some_and(has_failed);
            let key = worker(pod);
            if self.knows(&uid, &key, &hash, failed) {
                continue;
            }
            let Some(ip) = ip(pod) else { continue };
            match channel.put_adapters(&ip, &uid, &wanted).await {
                Ok(status) => {
                    said.insert(pod.name_any(), status);
                    self.lock()
                        .entry(uid.clone())
                        .or_default()
                        .workers
                        .insert(key, (hash.clone(), Instant::now()));
                }
                Err(error) => {
                    tracing::info!(pod = pod.name_any(), %error, "a worker could not be told its adapters")
                }
            }
        }
        said
    }

    /// True where throughput was not written within `pause`.
    pub fn throughput_is_due(&self, service: &InferenceService, pause: Duration) -> bool {
        let uid = service.uid().unwrap_or_default();
        self.lock().get(&uid).and_then(|memory| memory.throughput).is_none_or(|at| at.elapsed() >= pause)
    }

    /// Throughput was written now.
    pub fn throughput_was_written(&self, service: &InferenceService) {
        self.lock().entry(service.uid().unwrap_or_default()).or_default().throughput = Some(Instant::now());
    }

    fn knows(&self, uid: &str, worker: &str, hash: &str, failed: bool) -> bool {
        let memory = self.lock();
        let told = memory.get(uid).and_then(|memory| memory.workers.get(worker));
        told.is_some_and(|(told, at)| told == hash && !(failed && at.elapsed() >= AGAIN))
    }

    fn forget_others(&self, uid: &str, ready: &[&Pod]) {
        let mut memory = self.lock();
        if let Some(memory) = memory.get_mut(uid) {
            memory.workers.retain(|key, _| ready.iter().any(|pod| worker(pod) == *key));
        }
        // A service that is gone is not told of; what it left is small, and bounded here.
        if memory.len() > 10_000 {
            memory.clear();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wanted(serving: &Serving) -> Option<DesiredAdapters> {
    match &serving.contract.task {
        Task::Serve(task) => Some(DesiredAdapters { adapters: task.adapters.clone() }),
        _ => None,
    }
}

/// A restarted worker read its contract again, which may be older than what its predecessor was told.
fn worker(pod: &Pod) -> String {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let restarts: i32 = statuses.map(|status| status.restart_count).sum();
    format!("{}/{restarts}", pod.uid().unwrap_or_default())
}

fn has_failed(status: &AdapterStatus) -> bool {
    status.adapters.iter().any(|adapter| adapter.state == AdapterState::Failed)
}
