//! Which model ids there are, and who answers to each: a pure function of the objects that were seen.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{EndpointPort, EndpointSlice};
use kube::{Resource as _, ResourceExt as _};
use lathe_api::names::CANDIDATE;
use lathe_api::{InferenceService, InferenceServiceSpec};

use crate::canary::{Canary, User};

/// The label by which an EndpointSlice names its Service; a service's Service has the service's own name.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Name of the port on which workers serve users.
const PORT: &str = "http";

/// What there is.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// By namespace and name: whoever holds a namespace's map cannot name anything outside of it.
    models: BTreeMap<String, BTreeMap<String, Arc<Model>>>,
    /// By UID.
    services: BTreeMap<String, Arc<Service>>,
}

/// What a model id stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Its name in the namespace, which is the id that the workers know.
    pub name: String,
    /// Whether it is an adapter of the service, not its base.
    pub adapter: bool,
    /// Whether the service's status says that it answers.
    pub answers: bool,
    /// Who serves it.
    pub service: Arc<Service>,
}

/// One InferenceService.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whom tokens for its workers must name.
    pub uid: String,
    /// Unix time in seconds at which it was made.
    pub created: i64,
    /// Requests that each of its pods decodes at a time.
    pub slots: u32,
    /// Who says how many pods it has.
    pub scale: Scale,
    /// Whether its status names any model that answers: where it names none, no pod was ready when it was written.
    pub told: bool,
    /// Two revisions that share its users; `None`: there is one, or nobody is sent to the other yet.
    pub canary: Option<Canary>,
    /// Its pods.
    pub endpoints: Vec<Endpoint>,
}

/// Who says how many pods a service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// The operator, by what flows and what is held here: one that sleeps wakes when it is asked.
    Automatic,
    /// Its user, who wants some.
    Fixed,
    /// Its user, who wants none.
    Stopped,
}

/// One pod of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it serves users.
    pub address: SocketAddr,
    /// It takes new requests.
    pub ready: bool,
    /// It answers, perhaps for the last time.
    pub serving: bool,
    /// It is going.
    pub terminating: bool,
    /// Its revision is tried and may not stay.
    pub candidate: bool,
}

impl Model {
    /// `namespace/name`.
    pub fn id(&self) -> String {
        format!("{}/{}", self.service.namespace, self.name)
    }

    /// Whether it may be asked as soon as a pod is ready. Pods that became ready since the status was written are the newer word.
    pub fn may_answer(&self) -> bool {
        self.answers || !self.service.told
    }

    /// Whether whoever asks it is answered, perhaps after it has woken.
    pub fn is_offered(&self) -> bool {
        self.answers || (!self.service.told && self.service.scale == Scale::Automatic)
    }
}

impl Service {
    /// The pods that may be given something new: those of the stable revision, or where it has none, the candidate's.
    pub fn ready(&self) -> impl Iterator<Item = SocketAddr> {
        let stable = self.open().any(|endpoint| !endpoint.candidate);
        self.open().filter(move |endpoint| !(stable && endpoint.candidate)).map(|endpoint| endpoint.address)
    }

    /// The pods that may be given something new of this user's: those of his revision, and those of the other, for where none of his
    /// is left.
    pub fn sides(&self, user: User<'_>) -> Sides {
        let Some(canary) = &self.canary else {
            return Sides { own: self.ready().collect(), other: Vec::new() };
        };
        let takes = canary.takes(&self.uid, user);
        let (own, other): (Vec<_>, Vec<_>) = self.open().partition(|endpoint| endpoint.candidate == takes);
        let addresses = |side: Vec<&Endpoint>| side.into_iter().map(|endpoint| endpoint.address).collect();
        Sides { own: addresses(own), other: addresses(other) }
    }

    /// Whether the pod at this address is the candidate's, while it shares the users; `None`: it does not, or the pod is not known.
    pub fn is_candidate(&self, address: SocketAddr) -> Option<bool> {
        self.canary.as_ref()?;
        self.endpoints.iter().find(|endpoint| endpoint.address == address).map(|endpoint| endpoint.candidate)
    }

    fn open(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().filter(|e| e.ready && e.serving && !e.terminating)
    }
}

/// Pods that may be given a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sides {
    /// Asked first.
    pub own: Vec<SocketAddr>,
    /// Asked where none of those is left: no request is lost with a revision.
    pub other: Vec<SocketAddr>,
}

impl Table {
    /// Who answers to which id. Where two services of a namespace claim one name, the older keeps it.
    ///
    /// Pods are taken at the workers' `port` alone: whoever may write an EndpointSlice could name any other.
    pub fn build<'a>(
        port: u16,
        services: impl IntoIterator<Item = &'a InferenceService>,
        slices: impl IntoIterator<Item = &'a EndpointSlice>,
    ) -> Self {
        let mut endpoints = endpoints(port, slices);
        let mut services: Vec<_> =
            services.into_iter().filter(|s| s.meta().deletion_timestamp.is_none()).collect();
        services.sort_by_key(|s| (s.meta().creation_timestamp.as_ref().map(|t| t.0), s.uid()));
        let mut table = Self::default();
        for object in services {
            let (Some(namespace), Some(uid)) = (object.namespace(), object.uid()) else { continue };
            let name = object.name_any();
            let created = object.meta().creation_timestamp.as_ref().map_or(0, |t| t.0.as_second());
            let endpoints = endpoints.remove(&(namespace.clone(), name.clone())).unwrap_or_default();
            let slots = u32::try_from(object.spec.serving.max_sequences).unwrap_or(1);
            let answering: BTreeSet<&str> =
                object.status.iter().flat_map(|status| &status.model_ids).map(String::as_str).collect();
            let service = Arc::new(Service {
                namespace: namespace.clone(),
                name: name.clone(),
                uid: uid.clone(),
                created,
                slots,
                scale: Scale::of(&object.spec),
                told: !answering.is_empty(),
                canary: Canary::of(object),
                endpoints,
            });
            table.services.insert(uid, Arc::clone(&service));
            let adapters = object.spec.adapter_refs.iter().map(|adapter| (adapter.name.clone(), true));
            let names = table.models.entry(namespace).or_default();
            for (name, adapter) in std::iter::once((name, false)).chain(adapters) {
                let answers = answering.contains(name.as_str());
                let service = Arc::clone(&service);
                let model = Model { name: name.clone(), adapter, answers, service };
                names.entry(name).or_insert_with(|| Arc::new(model));
            }
        }
        table
    }

    /// The model of this very name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<&Arc<Model>> {
        self.models.get(namespace)?.get(name)
    }

    /// All models, of one namespace or of all, by id.
    pub fn models(&self, namespace: Option<&str>) -> impl Iterator<Item = &Arc<Model>> {
        let chosen = move |own: &&String| namespace.is_none_or(|wanted| *own == wanted);
        self.models.iter().filter(move |(own, _)| chosen(own)).flat_map(|(_, models)| models.values())
    }

    /// The service of this UID.
    pub fn service(&self, uid: &str) -> Option<&Arc<Service>> {
        self.services.get(uid)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The pods of every service, by its UID.
    pub fn replicas(&self) -> BTreeMap<String, BTreeSet<SocketAddr>> {
        let pods = |service: &Service| service.endpoints.iter().map(|e| e.address).collect();
        self.services.iter().map(|(uid, service)| (uid.clone(), pods(service))).collect()
    }
}

impl Scale {
    fn of(spec: &InferenceServiceSpec) -> Self {
        match (spec.autoscaling.is_some(), spec.replicas) {
            (true, _) => Scale::Automatic,
            (false, 1..) => Scale::Fixed,
            (false, _) => Scale::Stopped,
        }
    }
}

fn endpoints<'a>(
    port: u16,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
) -> HashMap<(String, String), Vec<Endpoint>> {
    let mut found: HashMap<(String, String), BTreeMap<SocketAddr, Endpoint>> = HashMap::new();
    for slice in slices {
        let (Some(namespace), Some(service)) = (slice.namespace(), slice.labels().get(SERVICE_NAME)) else {
            continue;
        };
        let ports = slice.ports.iter().flatten();
        let wanted = |p: &EndpointPort| p.name.as_deref() == Some(PORT) && p.port == Some(port.into());
        if !ports.into_iter().any(wanted) {
            continue;
        }
        let of_service = found.entry((namespace, service.clone())).or_default();
        for endpoint in &slice.endpoints {
            // All addresses of an endpoint are one pod's; kube-proxy takes the first as well.
            let Some(ip) = endpoint.addresses.first().and_then(|a| a.parse::<IpAddr>().ok()) else {
                continue;
            };
            let conditions = endpoint.conditions.as_ref();
            // What is not said: ready, serving where ready, and not terminating (EndpointConditions).
            let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
            let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
            let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
            let address = SocketAddr::new(ip, port);
            let candidate = endpoint.hostname.as_deref() == Some(CANDIDATE);
            let seen = Endpoint { address, ready, serving, terminating, candidate };
            // While a pod moves between slices it stands in two; the one that takes requests is the newer word.
            of_service
                .entry(address)
                .and_modify(|had| *had = if had.ready { *had } else { seen })
                .or_insert(seen);
        }
    }
    found.into_iter().map(|(key, endpoints)| (key, endpoints.into_values().collect())).collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{object, service, slice};

    fn table(services: &[InferenceService], slices: &[EndpointSlice]) -> Table {
        Table::build(8080, services, slices)
    }

    #[test]
    fn a_service_and_its_adapters_share_its_ready_pods() {
        let services = [service("team-a", "support", &["tone", "late"], &["support", "tone"])];
        let conditions =
            [json!({"ready": true}), json!({"ready": false, "serving": true, "terminating": true})];
        let slices = [
            slice(
                "team-a",
                "support",
                &[("10.0.0.1", conditions[0].clone()), ("10.0.0.2", conditions[1].clone())],
            ),
            slice("team-a", "other", &[("10.0.0.3", json!({}))]),
            slice("team-b", "support", &[("10.0.0.4", json!({}))]),
        ];
        let table = table(&services, &slices);
        let ids: Vec<_> = table.models(None).map(|m| (m.id(), m.adapter, m.answers)).collect();
        let expected = [
            ("team-a/late".to_owned(), true, false),
            ("team-a/support".to_owned(), false, true),
            ("team-a/tone".to_owned(), true, true),
        ];
        assert_eq!(ids, expected);
        let tone = table.get("team-a", "tone").unwrap();
        assert_eq!(tone.service.ready().collect::<Vec<_>>(), ["10.0.0.1:8080".parse().unwrap()]);
        assert_eq!((tone.service.endpoints.len(), tone.service.uid.as_str()), (2, "uid-team-a-support"));
        assert!(table.get("team-b", "support").is_none());
    }

    #[rstest]
    #[case::nothing_said(json!({}), true)]
    #[case::ready(json!({"ready": true, "serving": true, "terminating": false}), true)]
    #[case::not_ready(json!({"ready": false}), false)]
    #[case::draining(json!({"ready": false, "serving": true, "terminating": true}), false)]
    #[case::published_although_terminating(json!({"ready": true, "serving": false, "terminating": true}), false)]
    fn only_a_pod_that_is_ready_and_stays_takes_requests(#[case] conditions: Value, #[case] takes: bool) {
        let services = [service("a", "s", &[], &["s"])];
        let table = table(&services, &[slice("a", "s", &[("10.0.0.1", conditions)])]);
        assert_eq!(table.get("a", "s").unwrap().service.ready().count(), usize::from(takes));
    }

    #[rstest]
    #[case::by_time("2026-01-02T00:00:00Z", "u1", "2026-01-01T00:00:00Z", "u2", "second")]
    #[case::by_uid_at_one_time("2026-01-01T00:00:00Z", "u2", "2026-01-01T00:00:00Z", "u1", "second")]
    #[case::first_is_older("2026-01-01T00:00:00Z", "u1", "2026-01-02T00:00:00Z", "u2", "first")]
    fn the_older_service_keeps_a_name_that_two_claim(
        #[case] first: &str,
        #[case] first_uid: &str,
        #[case] second: &str,
        #[case] second_uid: &str,
        #[case] keeps: &str,
    ) {
        let made = |name: &str, created: &str, uid: &str| -> InferenceService {
            let mut value = serde_json::to_value(service("a", name, &["tone"], &["tone"])).unwrap();
            value["metadata"]["creationTimestamp"] = json!(created);
            value["metadata"]["uid"] = json!(uid);
            object(value)
        };
        let mut services = [made("first", first, first_uid), made("second", second, second_uid)];
        assert_eq!(table(&services, &[]).get("a", "tone").unwrap().service.name, keeps);
        services.reverse();
        assert_eq!(table(&services, &[]).get("a", "tone").unwrap().service.name, keeps);
    }

    #[test]
    fn a_slice_without_our_port_at_another_or_with_names_for_addresses_gives_no_pod() {
        let services = [service("a", "s", &[], &["s"])];
        let mut no_port = serde_json::to_value(slice("a", "s", &[("10.0.0.1", json!({}))])).unwrap();
        no_port["ports"][0]["name"] = json!("metrics");
        let mut other_port = serde_json::to_value(slice("a", "s", &[("10.0.0.1", json!({}))])).unwrap();
        other_port["ports"][0]["port"] = json!(6443);
        let slices = [object(no_port), object(other_port), slice("a", "s", &[("example.com", json!({}))])];
        assert!(table(&services, &slices).get("a", "s").unwrap().service.endpoints.is_empty());
    }

    #[test]
    fn a_pod_in_two_slices_is_one_and_a_service_that_goes_is_none() {
        let mut going = service("a", "gone", &[], &["gone"]);
        going.metadata.deletion_timestamp = going.metadata.creation_timestamp.clone();
        let services = [service("a", "s", &[], &["s"]), going];
        let slices = [
            slice("a", "s", &[("10.0.0.1", json!({"ready": false}))]),
            slice("a", "s", &[("10.0.0.1", json!({"ready": true}))]),
        ];
        let table = table(&services, &slices);
        assert_eq!(table.get("a", "s").unwrap().service.endpoints.len(), 1);
        assert_eq!(table.get("a", "s").unwrap().service.ready().count(), 1);
        assert!(table.get("a", "gone").is_none());
    }
}
