//! The exchange of counts: every replica adds what it counted to one ConfigMap of the gateway's own namespace, and reads there what the
//! others did. The gateway makes it, so that nobody's manifests take its content back; `helm uninstall` removes it.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::Mutex;

use crate::counts::Page;
use crate::health::Health;
use crate::limits::{Now, Quotas};
use crate::metrics::Metrics;
use crate::month::Month;
use crate::table::SERVICE_NAME;
use crate::tasks::Tasks;

/// Where the counts live.
pub const CONFIG_MAP: &str = "lathe-gateway-usage";
/// The gateway's own Service, whose endpoints are its replicas.
const SERVICE: &str = "lathe-gateway";
const MANAGER: &str = "lathe-gateway";
/// Longest pause between two rounds; the shortest is less by a fifth, so that replicas do not meet again and again.
const PAUSE: Duration = Duration::from_secs(15);
/// For one round.
const PATIENCE: Duration = Duration::from_secs(5);
/// Writes of one round: each that met another's is prepared anew.
const ATTEMPTS: usize = 8;
/// Of the readiness.
const PART: &str = "counts";

/// One replica's part in it.
pub struct Exchange {
    maps: Api<ConfigMap>,
    slices: Api<EndpointSlice>,
    quotas: Arc<Quotas>,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
}

/// What was seen last time.
#[derive(Default)]
struct State {
    broken: BTreeMap<String, String>,
    failing: bool,
}

impl Exchange {
    /// Of the replica whose counts these are, in the namespace that the client is in.
    pub fn new(client: Client, quotas: Arc<Quotas>, metrics: Arc<Metrics>) -> Self {
        Self {
            maps: Api::default_namespaced(client.clone()),
            slices: Api::default_namespaced(client),
            quotas,
            metrics,
            state: Mutex::default(),
        }
    }

    /// Hears and tells, once. A failure is told in the log when it begins, and everything goes on with what is known.
    pub async fn round(&self) {
        let mut state = self.state.lock().await;
        let ended = tokio::time::timeout(PATIENCE, self.exchanged(&mut state)).await;
        let failed = match ended {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("the API server did not answer in time".to_owned()),
        };
        match &failed {
            Some(error) if !state.failing => tracing::error!(
                error,
                "the counts of keys could not be exchanged with the ConfigMap {CONFIG_MAP}; they are counted here, and this replica \
                 keeps to its share of each limit"
            ),
            None if state.failing => tracing::info!("the counts of keys are exchanged again"),
            _ => {}
        }
        state.failing = failed.is_some();
    }

    async fn exchanged(&self, state: &mut State) -> kube::Result<()> {
        // Also where the counts cannot be read: then this replica keeps to its share.
        self.quotas.are_shared_by(self.replicas().await?);
        for _ in 0..ATTEMPTS {
            let found = self.maps.get_opt(CONFIG_MAP).await?;
            let data = found.as_ref().and_then(|map| map.data.clone()).unwrap_or_default();
            let mut page = Page::read(&data);
            page.written = found.as_ref().and_then(written);
            warn(&mut state.broken, &page);
            self.metrics.counts_broken.set(page.broken.len() as i64);
            let now = Now::read();
            self.quotas.hear(&page, now.instant);
            let repeats = self.quotas.is_telling();
            let Some(told) = self.quotas.tell() else {
                self.in_touch(now);
                return Ok(());
            };
            let (data, forgotten) = page.with(&data, &told, Month::of(now.time));
            if forgotten > 0 {
                tracing::warn!(
                    forgotten,
                    "the ConfigMap {CONFIG_MAP} has no room for every key: those that used the least begin anew; make fewer keys"
                );
            }
            let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
            let written = match found {
                // With the version that was read: one that met another's write is refused.
                Some(map) => {
                    let map = ConfigMap { data: Some(data), ..map };
                    self.maps.replace(CONFIG_MAP, &params, &map).await
                }
                None => self.maps.create(&params, &made(data)).await,
            };
            match written {
                Ok(_) => {
                    self.quotas.was_told();
                    self.in_touch(now);
                    // What was counted since a write that came to nothing, or whose answer was lost, is not told yet; what was
                    // counted during this one is for the next round, or under traffic there would be no end.
                    if !repeats {
                        return Ok(());
                    }
                }
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(error),
            }
        }
        tracing::debug!("every write of this round met another's; the next round tells it");
        Ok(())
    }

    fn in_touch(&self, now: Now) {
        self.quotas.in_touch(now.instant);
        self.metrics.counts_exchanged.set(now.time.as_second());
    }

    /// How many replicas take requests.
    async fn replicas(&self) -> kube::Result<u32> {
        let ours = ListParams::default().labels(&format!("{SERVICE_NAME}={SERVICE}"));
        Ok(replicas(&self.slices.list(&ours).await?.items))
    }
}

/// Exchanges counts for as long as the program runs. This replica is not ready before it has heard of the others, or has failed to.
pub fn follow(tasks: &mut Tasks, exchange: Arc<Exchange>, health: Health) {
    health.lacks(PART, "what keys used before was not read yet");
    tasks.spawn(async move {
        loop {
            exchange.round().await;
            health.has(PART);
            tokio::time::sleep(PAUSE.mul_f64(rand::random_range(0.8..=1.0))).await;
        }
    });
}

fn made(data: BTreeMap<String, String>) -> ConfigMap {
    let labels = [("app.kubernetes.io/name", SERVICE), ("app.kubernetes.io/part-of", "lathe")];
    let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let metadata = ObjectMeta {
        name: Some(CONFIG_MAP.to_owned()),
        labels: Some(labels.into()),
        ..ObjectMeta::default()
    };
    ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }
}

/// The endpoints that are ready: of a Service with two families of addresses each is in a slice of either.
fn replicas(slices: &[EndpointSlice]) -> u32 {
    let mut ready: BTreeMap<&str, u32> = BTreeMap::new();
    for slice in slices {
        let takes = |conditions: Option<bool>| conditions.unwrap_or(true);
        let endpoints = slice.endpoints.iter();
        let count = endpoints.filter(|e| takes(e.conditions.as_ref().and_then(|c| c.ready))).count();
        let all = ready.entry(&slice.address_type).or_default();
        *all = all.saturating_add(count.try_into().unwrap_or(u32::MAX));
    }
    ready.into_values().max().unwrap_or(0).max(1)
}

/// The month of the last write by the API server's clock, which stamps every one.
fn written(map: &ConfigMap) -> Option<Month> {
    let writes = map.metadata.managed_fields.iter().flatten();
    writes.filter_map(|write| write.time.as_ref()).map(|time| Month::of(time.0)).max()
}

/// Tells of entries that are broken once, not every time.
fn warn(known: &mut BTreeMap<String, String>, page: &Page) {
    for (name, problem) in page.broken.iter().filter(|(name, problem)| known.get(*name) != Some(problem)) {
        tracing::error!(
            entry = name,
            "an entry of the ConfigMap {CONFIG_MAP} cannot be read and is passed over ({problem}); remove it to give the key its month anew"
        );
    }
    known.clone_from(&page.broken);
}

#[cfg(test)]
pub mod tests;
