//! Asks every gateway of the installation what flows, each in a loop of its own.
//!
//! Beside that it is handed the loss curves that it does not know yet. A gateway answers as soon as a second is over, so there is one call a second to each, whatever the number of services and of
//! their pods. It is asked by its pod's IP with a token of the operator; what it says is bounded in bytes and time.
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, pin_mut};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    runtime::{WatchStreamExt as _, reflector::store, watcher},
};
use lathe_api::names;
use lathe_contract::TrafficQuery;
use lathe_scaling::Seconds;
use tokio::task::JoinHandle;

use super::{facts, ledger::Awaited};
use crate::{
    channel::ChannelError,
    context::Context,
    pods,
    runtime::{Stop, stopped},
};

/// Between two calls to one gateway, however soon it answers.
const PAUSE: Duration = Duration::from_millis(20);
/// After losses were not taken: a gateway that has just started does not know its jobs yet.
const NO_CURVES: Duration = Duration::from_secs(3);
/// After a call that failed.
const AGAIN: Duration = Duration::from_secs(1);
/// A pod on a node that is gone makes no event when its time is over.
const LOOK: Duration = Duration::from_secs(10);

/// Listens to the gateways until `stop`.
pub async fn listen(context: Arc<Context>, stop: Stop) {
    if !context.config.gateway {
        return;
    }
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &context.config.release_namespace);
    let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/name={}", names::GATEWAY));
    let (pods, writer) = store::<Pod>();
    let events = watcher(api, ours).default_backoff().reflect(writer).take_until(stopped(stop));
    pin_mut!(events);
    let (mut loops, mut listed) = (Loops::default(), false);
    loop {
        match tokio::time::timeout(LOOK, events.next()).await {
            Ok(None) => return,
            // Until the first list is whole, nobody is gone.
            Ok(Some(Ok(watcher::Event::Init | watcher::Event::InitApply(_)))) => continue,
            Ok(Some(Ok(_))) => listed = true,
            Ok(Some(Err(error))) => {
                tracing::warn!(%error, "the gateway's pods cannot be watched");
                continue;
            }
            Err(_) if !listed => continue,
            Err(_) => {}
        }
        let now = Timestamp::now().as_second();
        let there: Vec<Awaited> = pods.state().iter().filter_map(|pod| awaited(pod, now)).collect();
        loops.follow(&context, &there);
    }
}

/// The loop of each pod by its UID, with the address that it asks; they end with this.
#[derive(Default)]
struct Loops(HashMap<String, (String, JoinHandle<()>)>);

impl Loops {
    /// One loop for each of these pods and for no other.
    fn follow(&mut self, context: &Arc<Context>, pods: &[Awaited]) {
        context.traffic.ledger().expect(pods);
        let there: HashMap<&str, &str> = pods.iter().map(|pod| (&*pod.uid, &*pod.ip)).collect();
        self.0.retain(|uid, (ip, running)| {
            let stays = there.get(&**uid) == Some(&&**ip);
            if !stays {
                running.abort();
            }
            stays
        });
        for Awaited { uid, ip, .. } in pods {
            let begin = || (ip.clone(), tokio::spawn(ask(context.clone(), uid.clone(), ip.clone())));
            self.0.entry(uid.clone()).or_insert_with(begin);
        }
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        self.0.values().for_each(|(_, running)| running.abort());
    }
}

/// A pod that can be asked, and tells a part of what flows.
fn awaited(pod: &Pod, now: Seconds) -> Option<Awaited> {
    let runs = pods::phase(pod) == Some("Running") && !facts::is_lost(pod, now);
    let status = pod.status.as_ref().filter(|_| runs)?;
    let mut containers = status.container_statuses.iter().flatten();
    Some(Awaited {
        uid: pod.uid()?,
        ip: status.pod_ip.clone()?,
        ready: pods::is_ready(pod),
        restarted: containers.any(|container| container.restart_count > 0),
    })
}

/// Asks one gateway again and again.
async fn ask(context: Arc<Context>, uid: String, ip: String) {
    let (traffic, metrics) = (&context.traffic, &context.health.metrics.scaling);
    let (mut known, mut handed, mut next_try) = (TrafficQuery::default(), 0, Instant::now());
    loop {
        let answer = context.channel.traffic(&ip, &known).await;
        metrics.asked(answer.is_ok());
        match answer {
            Ok(answer) => {
                // One that started anew knows no curve.
                if answer.instance != known.instance {
                    (handed, next_try) = (0, Instant::now());
                }
                known = TrafficQuery { instance: answer.instance.clone(), after: answer.second };
                traffic.hear(&uid, answer);
                if next_try <= Instant::now() {
                    match hand_over(&context, &ip, handed).await {
                        Some(last) => handed = last,
                        None => next_try = Instant::now() + NO_CURVES,
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => {
                tracing::info!(%ip, %error, "a gateway does not say what flows");
                traffic.ledger().fail(&uid);
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Hands the curves to a gateway that changed after the change of number `handed`, and returns that of the last one that it need not
/// be handed any more; `None`: it takes none at the moment.
async fn hand_over(context: &Context, ip: &str, handed: u64) -> Option<u64> {
    let Some((last, curves)) = context.curves.after(handed) else { return Some(handed) };
    match context.channel.put_curves(ip, &curves).await {
        Ok(()) => Some(last),
        // It is of another version, or these are too much for it: others may not be.
        Err(ChannelError::Refused(_, 400 | 404 | 413)) => Some(last),
        Err(error) => {
            tracing::debug!(%ip, %error, "a gateway does not take loss curves");
            None
        }
    }
}

#[cfg(test)]
mod tests;
