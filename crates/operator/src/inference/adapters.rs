//! Tells running workers which adapters to hold, and remembers what they were told.
//!
//! The memory is a saving only: a worker that is told twice changes nothing, so an operator that starts anew tells each once.
use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use lathe_api::InferenceService;
use lathe_contract::{AdapterState, AdapterStatus, DesiredAdapters, Task};
use lathe_resolve::{inference::Serving, pod};

use super::observe::{ASKING, Observed, ip};
use crate::{channel::Channel, memory::Memory, pods};

/// A worker that could not load an adapter is asked to try again after this time.
const AGAIN: Duration = Duration::from_secs(60);

/// What was told and written of each service.
#[derive(Debug, Default)]
pub struct Told(Memory<Said>);

#[derive(Debug, Default, PartialEq)]
struct Said {
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
        let current = |pod: &&Pod| pods::is_of(pod, Some(&serving.checksum));
        let ready: Vec<&Pod> = seen.pods.iter().filter(|pod| pods::is_ready(pod)).filter(current).collect();
        self.forget_others(service, &ready);
        let begun = Instant::now();
        for pod in ready {
            // The rest is told in the next round.
            if begun.elapsed() >= ASKING {
                break;
            }
            let failed = said.get(&pod.name_any()).is_some_and(has_failed);
            let key = worker(pod);
            if self.knows(service, &key, &hash, failed) {
                continue;
            }
            let Some(ip) = ip(pod) else { continue };
            match channel.put_adapters(&ip, &uid, &wanted).await {
                Ok(status) => {
                    said.insert(pod.name_any(), status);
                    let now = (hash.clone(), Instant::now());
                    self.0.with(service, |told| told.workers.insert(key, now));
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
        self.0.with(service, |told| told.throughput).is_none_or(|at| at.elapsed() >= pause)
    }

    /// Throughput was written now.
    pub fn throughput_was_written(&self, service: &InferenceService) {
        self.0.with(service, |told| told.throughput = Some(Instant::now()));
    }

    /// The service is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.0.forget(namespace, name);
    }

    fn knows(&self, service: &InferenceService, worker: &str, hash: &str, failed: bool) -> bool {
        let told = self.0.with(service, |told| told.workers.get(worker).cloned());
        told.is_some_and(|(told, at)| told == hash && !(failed && at.elapsed() >= AGAIN))
    }

    fn forget_others(&self, service: &InferenceService, ready: &[&Pod]) {
        let is_there = |key: &String| ready.iter().any(|pod| worker(pod) == *key);
        self.0.with(service, |told| told.workers.retain(|key, _| is_there(key)));
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
