//! What the pods of a Job need beside it: their contract, and the policy that says who may talk to them. What is lost of it, or
//! was changed by somebody else, is made again while the Job lives; the Job itself is never changed.
use std::sync::Arc;

use k8s_openapi::api::{batch::v1::Job, core::v1::ConfigMap, networking::v1::NetworkPolicy};
use kube::{Resource, ResourceExt as _, runtime::reflector::Store};
use lathe_api::names;
use lathe_resolve::pod;

use crate::{
    apply::Writer,
    drift::{differs, stamp},
    error::Error,
    job::{Owner, Run},
};

/// Annotation of a Job: its contract as it was made. What it was made from (Models, profiles, this version) may have changed.
pub const CONTRACT: &str = "lathe.dev/contract";

/// The children of an object, as the watches last saw them.
#[derive(Default)]
pub struct Beside {
    /// With contracts.
    pub contracts: Vec<Arc<ConfigMap>>,
    /// Who may talk to its pods.
    pub policies: Vec<Arc<NetworkPolicy>>,
}

/// What is to be applied again.
#[derive(Debug, Default, PartialEq)]
pub struct Lacking {
    /// With contracts.
    pub contracts: Vec<ConfigMap>,
    /// Who may talk to its pods.
    pub policies: Vec<NetworkPolicy>,
}

impl Beside {
    /// Those of `owner`.
    pub fn of(owner: &Owner, contracts: &Store<ConfigMap>, policies: &Store<NetworkPolicy>) -> Self {
        Self { contracts: controlled(owner, contracts), policies: controlled(owner, policies) }
    }

    /// What the live ones among these Jobs need and do not have as it was made.
    pub fn lacks(
        &self,
        owner: &Owner,
        kind: &str,
        policy: NetworkPolicy,
        runs: &[&Run],
    ) -> Result<Lacking, Error> {
        let live = |job: &&Arc<Job>| job.metadata.deletion_timestamp.is_none();
        let jobs = runs.iter().filter(|run| run.ended().is_none()).filter_map(|run| run.job.as_ref());
        let jobs: Vec<&Arc<Job>> = jobs.filter(live).collect();
        if jobs.is_empty() {
            return Ok(Lacking::default());
        }
        let mut contracts = Vec::new();
        for job in jobs {
            let Some(text) = job.annotations().get(CONTRACT) else { continue };
            let task = job.labels().get(names::LABEL_TASK).map(String::as_str);
            let wanted = contract_map(owner, kind, &job.name_any(), task, text)?;
            if differs(&wanted, named(&self.contracts, &wanted)) {
                contracts.push(wanted);
            }
        }
        let policies =
            if differs(&policy, named(&self.policies, &policy)) { vec![policy] } else { Vec::new() };
        Ok(Lacking { contracts, policies })
    }
}

impl Lacking {
    /// Makes it again.
    pub async fn apply(&self, writer: &Writer) -> Result<(), Error> {
        for policy in &self.policies {
            writer.apply(policy, None).await?;
        }
        for contract in &self.contracts {
            writer.apply(contract, None).await?;
        }
        Ok(())
    }
}

/// The ConfigMap with the contract of the Job `job`.
pub fn contract_map(
    owner: &Owner,
    kind: &str,
    job: &str,
    task: Option<&str>,
    contract: &str,
) -> Result<ConfigMap, Error> {
    let labels = pod::labels(kind, &owner.reference.name, task);
    stamp(ConfigMap {
        metadata: owner.meta(names::contract(job), labels),
        data: Some([(pod::CONTRACT_KEY.to_owned(), contract.to_owned())].into()),
        ..ConfigMap::default()
    })
    .map_err(|source| Error::Build { what: "contract", source })
}

fn controlled<K: Resource<DynamicType = ()> + Clone + 'static>(
    owner: &Owner,
    store: &Store<K>,
) -> Vec<Arc<K>> {
    store.state().into_iter().filter(|child| owner.controls(&**child)).collect()
}

fn named<'a, K: Resource>(there: &'a [Arc<K>], wanted: &K) -> Option<&'a K> {
    there.iter().find(|child| child.meta().name == wanted.meta().name).map(|child| &**child)
}
