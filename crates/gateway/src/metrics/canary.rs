//! Numbers of requests to services of which two revisions are compared.
use lathe_contract::Ended;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::table::Service;

/// What is counted.
#[derive(Debug, Default)]
pub struct CanaryMetrics {
    requests: Family<Revision, Counter>,
    errors: Family<Revision, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Revision {
    namespace: String,
    model: String,
    revision: &'static str,
}

const REVISIONS: [&str; 2] = ["stable", "candidate"];

impl CanaryMetrics {
    /// Puts them where they are read.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "canary_requests",
            "Requests that ended while two revisions shared a service's users, by revision",
            self.requests.clone(),
        );
        registry.register(
            "canary_errors",
            "Of those, requests with an error of the server or a lost replica",
            self.errors.clone(),
        );
    }

    /// A request ended at a replica of the candidate, or of the stable revision.
    pub fn ended(&self, service: &Service, candidate: bool, ended: Ended) {
        let label = label(&service.namespace, &service.name, REVISIONS[usize::from(candidate)]);
        self.requests.get_or_create(&label).inc_by(ended.requests);
        self.errors.get_or_create(&label).inc_by(ended.errors);
    }

    /// The service is no more.
    pub fn forget(&self, namespace: &str, model: &str) {
        for revision in REVISIONS {
            let label = label(namespace, model, revision);
            self.requests.remove(&label);
            self.errors.remove(&label);
        }
    }
}

fn label(namespace: &str, model: &str, revision: &'static str) -> Revision {
    Revision { namespace: namespace.to_owned(), model: model.to_owned(), revision }
}
