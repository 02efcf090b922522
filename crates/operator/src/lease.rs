//! Leader election by a Lease, as client-go does it: clocks of different machines are never compared, and every write
//! names the version that it read, so that two replicas cannot both take it.
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease as Object, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, sleep};

use crate::health::Health;

/// A holder that was silent for so long has lost it.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for so long stops working, well before others begin.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two looks.
const PERIOD: Duration = Duration::from_secs(2);
const NAME: &str = "lathe-operator";
/// Of the readiness.
const PART: &str = "lease";

/// This replica's view of the Lease.
pub struct Lease {
    api: Api<Object>,
    namespace: String,
    identity: String,
    seen: Option<Seen>,
    health: Health,
}

/// The last version that was read, and when this process saw it first.
struct Seen {
    object: Object,
    since: Instant,
}

/// What to do about the Lease.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// There is none.
    Create,
    /// It is ours.
    Renew,
    /// Nobody holds it, or its holder is silent.
    Take,
    /// Somebody else holds it.
    Wait,
}

impl Lease {
    /// Nothing is read yet.
    pub fn new(client: Client, namespace: &str, identity: String, health: Health) -> Self {
        health.lacks(PART, "not looked at yet");
        Self {
            api: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            identity,
            seen: None,
            health,
        }
    }

    /// Resolves when this replica holds it.
    pub async fn acquire(&mut self) {
        loop {
            match self.look().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    self.health.lacks(PART, format!("it cannot be read or taken: {error}"));
                    tracing::warn!(%error, "the lease could not be read or taken");
                }
            }
            sleep(PERIOD).await;
        }
    }

    /// Renews it; resolves when it is lost.
    pub async fn keep(&mut self) {
        let mut renewed = Instant::now();
        while renewed.elapsed() < RENEW_DEADLINE {
            sleep(PERIOD).await;
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.renew()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(error)) => tracing::warn!(%error, "the lease could not be renewed"),
                Err(_) => return,
            }
        }
    }

    /// Gives it to whoever waits, at once.
    pub async fn release(&mut self) {
        let Some(Seen { object, .. }) = self.seen.take() else { return };
        let mut free = object;
        if let Some(spec) = &mut free.spec {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
        }
        if let Err(error) = self.api.replace(NAME, &PostParams::default(), &free).await {
            tracing::warn!(%error, "the lease was not released; it runs out by itself");
        }
    }

    /// Renews it by the version that was written last; reads it only where somebody wrote it since.
    async fn renew(&mut self) -> Result<bool, kube::Error> {
        match self.write(Step::Renew).await? {
            true => Ok(true),
            false => self.look().await,
        }
    }

    /// Reads it and does what is to be done; true while it is ours.
    async fn look(&mut self) -> Result<bool, kube::Error> {
        let found = self.api.get_opt(NAME).await?;
        // Whoever can read it can work, or stand by.
        self.health.has(PART);
        let now = Instant::now();
        self.seen = found.map(|object| match self.seen.take() {
            Some(seen) if seen.object.metadata.resource_version == object.metadata.resource_version => seen,
            _ => Seen { object, since: now },
        });
        let current = self.seen.as_ref().and_then(|seen| seen.object.spec.as_ref());
        let silent = self.seen.as_ref().map_or(Duration::ZERO, |seen| now - seen.since);
        match if self.seen.is_none() { Step::Create } else { step(current, &self.identity, silent) } {
            Step::Wait => Ok(false),
            step => self.write(step).await,
        }
    }

    /// False where another replica was faster, or it is gone: then it is to be read.
    async fn write(&mut self, step: Step) -> Result<bool, kube::Error> {
        let wanted = self.wanted(&step, Timestamp::now());
        let params = PostParams::default();
        let written = match step {
            Step::Create => self.api.create(&params, &wanted).await,
            _ => self.api.replace(NAME, &params, &wanted).await,
        };
        match written {
            Ok(object) => {
                self.seen = Some(Seen { object, since: Instant::now() });
                Ok(true)
            }
            Err(kube::Error::Api(status))
                if status.is_conflict() || status.is_already_exists() || status.is_not_found() =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn wanted(&self, step: &Step, now: Timestamp) -> Object {
        let old = self.seen.as_ref().map(|seen| &seen.object);
        let spec = old.and_then(|o| o.spec.clone()).unwrap_or_default();
        let took = *step != Step::Renew;
        Object {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                namespace: Some(self.namespace.clone()),
                resource_version: old.and_then(|o| o.metadata.resource_version.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: if took { Some(MicroTime(now)) } else { spec.acquire_time },
                renew_time: Some(MicroTime(now)),
                lease_transitions: Some(spec.lease_transitions.unwrap_or(0) + i32::from(*step == Step::Take)),
                ..LeaseSpec::default()
            }),
        }
    }
}

/// `silent`: how long this process has seen the same version.
fn step(current: Option<&LeaseSpec>, identity: &str, silent: Duration) -> Step {
    let holder = current.and_then(|spec| spec.holder_identity.as_deref()).filter(|h| !h.is_empty());
    let promised = current.and_then(|spec| spec.lease_duration_seconds).and_then(|s| u64::try_from(s).ok());
    match holder {
        Some(holder) if holder == identity => Step::Renew,
        Some(_) if silent < promised.map_or(DURATION, Duration::from_secs) => Step::Wait,
        _ => Step::Take,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::testing::{Server, failure, object, paths};

    const ALL: &str = "/apis/coordination.k8s.io/v1/namespaces/ns/leases";
    const ONE: &str = "/apis/coordination.k8s.io/v1/namespaces/ns/leases/lathe-operator";

    /// One look at a server that answers so; whether the lease is ours then, and the calls.
    async fn look(answers: &[(&str, u16, serde_json::Value)]) -> (bool, Vec<String>) {
        let (client, server) = Server::start(answers);
        let mut lease = Lease::new(client, "ns", "me".to_owned(), Health::new(Arc::default()));
        let ours = lease.look().await.unwrap();
        drop(lease);
        let calls = server.calls().await;
        (ours, paths(&calls).into_iter().map(str::to_owned).collect())
    }

    fn held(by: &str) -> serde_json::Value {
        json!({"metadata": {"name": "lathe-operator", "namespace": "ns", "resourceVersion": "7"},
            "spec": {"holderIdentity": by, "leaseDurationSeconds": 15}})
    }

    #[tokio::test]
    async fn the_first_replica_makes_the_lease_and_a_slower_one_waits() {
        assert_eq!(look(&[]).await, (true, vec![format!("GET {ONE}"), format!("POST {ALL}")]));
        let create = format!("POST {ALL}");
        let (ours, _) = look(&[(&create, 409, failure(409, "AlreadyExists"))]).await;
        assert!(!ours);
    }

    #[tokio::test]
    async fn a_lease_that_somebody_holds_is_only_read() {
        let get = format!("GET {ONE}");
        assert_eq!(look(&[(&get, 200, held("other"))]).await, (false, vec![get]));
    }

    #[tokio::test]
    async fn a_write_names_the_version_that_was_read_and_a_conflict_is_a_loss() {
        let (get, put) = (format!("GET {ONE}"), format!("PUT {ONE}"));
        let (client, server) = Server::start(&[(&get, 200, held(""))]);
        let mut lease = Lease::new(client, "ns", "me".to_owned(), Health::new(Arc::default()));
        assert!(lease.look().await.unwrap());
        drop(lease);
        let calls = server.calls().await;
        assert_eq!(calls[1].0, put);
        assert_eq!(calls[1].1["metadata"]["resourceVersion"], "7");
        assert_eq!(calls[1].1["spec"]["holderIdentity"], "me");
        let (ours, _) = look(&[(&get, 200, held("")), (&put, 409, failure(409, "Conflict"))]).await;
        assert!(!ours);
    }

    /// A holder of version 7 renews it, which is answered so, while version 8 is there and held by `by`.
    async fn renewed(put: (u16, serde_json::Value), by: &str) -> (bool, Vec<(String, serde_json::Value)>) {
        let (get, replace) = (format!("GET {ONE}"), format!("PUT {ONE}"));
        let mut there = held(by);
        there["metadata"]["resourceVersion"] = json!("8");
        let (client, server) = Server::start(&[(&get, 200, there), (&replace, put.0, put.1)]);
        let mut lease = Lease::new(client, "ns", "me".to_owned(), Health::new(Arc::default()));
        lease.seen = Some(Seen { object: object(held("me")), since: Instant::now() });
        let ours = lease.renew().await.unwrap();
        drop(lease);
        let versions = server.calls().await.into_iter().map(|(call, body)| {
            let verb = call.split(' ').next().unwrap_or_default().to_owned();
            (verb, body["metadata"]["resourceVersion"].clone())
        });
        (ours, versions.collect())
    }

    #[tokio::test]
    async fn the_holder_renews_with_one_call_and_reads_only_what_somebody_wrote() {
        let put = |version: &str| ("PUT".to_owned(), json!(version));
        let get = || ("GET".to_owned(), serde_json::Value::Null);
        assert_eq!(renewed((200, held("me")), "me").await, (true, vec![put("7")]));
        let conflict = || (409, failure(409, "Conflict"));
        assert_eq!(renewed(conflict(), "other").await, (false, vec![put("7"), get()]));
        assert_eq!(renewed(conflict(), "me").await.1, [put("7"), get(), put("8")]);
        assert_eq!(renewed((404, failure(404, "NotFound")), "me").await.1, [put("7"), get(), put("8")]);
    }

    #[rstest]
    #[case::ours(Some("me"), 0, Step::Renew)]
    #[case::ours_after_a_pause(Some("me"), 99, Step::Renew)]
    #[case::held(Some("other"), 14, Step::Wait)]
    #[case::silent(Some("other"), 15, Step::Take)]
    #[case::released(Some(""), 0, Step::Take)]
    #[case::free(None, 0, Step::Take)]
    fn a_lease_is_taken_only_from_nobody_or_a_silent_holder(
        #[case] holder: Option<&str>,
        #[case] silent: u64,
        #[case] expected: Step,
    ) {
        let spec = LeaseSpec {
            holder_identity: holder.map(str::to_owned),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        };
        assert_eq!(step(Some(&spec), "me", Duration::from_secs(silent)), expected);
    }
}
