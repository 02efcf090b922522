//! Jobs and their contracts: how they are built, and where one stands, read from the Job and its pods.
use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::{
        batch::v1::{
            Job, JobCondition, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
            PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
        },
        core::v1::{ConfigMap, Pod, PodTemplateSpec},
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
        },
    },
    apimachinery::pkg::{
        apis::meta::v1::{Condition, LabelSelector, ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};
use kube::{Client, Resource, ResourceExt as _};
use lathe_api::conditions;
use lathe_contract::{
    CONTRACT_VERSION, CONTROL_PORT, Contract, Mounts, ObjectRef, Outcome, Summary, Task, Trust, exit,
};
use lathe_resolve::pod;

use crate::{
    beside,
    drift::stamp,
    error::Error,
    mounting,
    pods::{self, Trouble},
};

/// A pod that failed is replaced so often.
const RETRIES: i32 = 3;

/// A Job that is made once and never changed.
pub struct JobRequest {
    /// Its name; its contract's ConfigMap is named after it.
    pub name: String,
    /// The object that it works for.
    pub owner: Owner,
    /// Of the Job.
    pub labels: BTreeMap<String, String>,
    /// Of the Job.
    pub annotations: BTreeMap<String, String>,
    /// Its pods.
    pub template: PodTemplateSpec,
    /// Somebody else (Kueue) lets it start.
    pub suspended: bool,
}

/// Everything that a Job's pod needs, in the order in which it is applied.
pub struct Objects {
    /// The ConfigMap with the contract.
    pub contract: ConfigMap,
    /// Who may talk to the object's pods.
    pub policy: NetworkPolicy,
    /// The Job.
    pub job: Job,
}

/// The object that children belong to.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Its namespace, which is the children's.
    pub namespace: String,
    /// For the children's metadata: garbage collection removes them with it.
    pub reference: OwnerReference,
}

impl Owner {
    /// The children's owner. Without `blockOwnerDeletion`: that would need a right on finalizers.
    pub fn of<K: Resource<DynamicType = ()>>(object: &K) -> Self {
        let reference = OwnerReference {
            api_version: K::api_version(&()).into_owned(),
            kind: K::kind(&()).into_owned(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: None,
        };
        Self { namespace: object.namespace().unwrap_or_default(), reference }
    }

    /// True where `child` belongs to this object and not to an earlier one of the same name.
    pub fn controls<K: Resource>(&self, child: &K) -> bool {
        child.owner_references().iter().any(|o| o.controller == Some(true) && o.uid == self.reference.uid)
    }

    /// The object in contracts.
    pub fn object_ref(&self) -> ObjectRef {
        ObjectRef {
            kind: self.reference.kind.clone(),
            namespace: self.namespace.clone(),
            name: self.reference.name.clone(),
            uid: self.reference.uid.clone(),
        }
    }

    /// What a worker is told.
    pub fn contract(&self, trust: &Trust, mounts: Mounts, task: Task) -> Contract {
        Contract { version: CONTRACT_VERSION, object: self.object_ref(), trust: trust.clone(), mounts, task }
    }

    /// Metadata of a child.
    pub fn meta(&self, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
        ObjectMeta {
            name: Some(name),
            namespace: Some(self.namespace.clone()),
            labels: Some(labels),
            owner_references: Some(vec![self.reference.clone()]),
            ..ObjectMeta::default()
        }
    }
}

impl Objects {
    /// A Job with its contract, which the Job keeps too, so that a ConfigMap that is lost is made again as it was.
    ///
    /// # Errors
    /// One of them cannot be written as JSON.
    pub fn new(
        mut request: JobRequest,
        kind: &str,
        contract: &Contract,
        policy: NetworkPolicy,
    ) -> Result<Self, Error> {
        let text =
            pod::contract_text(contract).map_err(|source| Error::Build { what: "contract", source })?;
        let task = Some(pod::task_name(&contract.task));
        let contract = beside::contract_map(&request.owner, kind, &request.name, task, &text)?;
        request.annotations.insert(beside::CONTRACT.to_owned(), text);
        Ok(Self { contract, policy, job: build(request) })
    }
}

/// Nobody but the operator, and who reads metrics, may talk to the pods of an object's Jobs, and they to the control port alone.
///
/// # Errors
/// It cannot be written as JSON.
pub fn policy(
    owner: &Owner,
    name: String,
    kind: &str,
    control_peers: Vec<NetworkPolicyPeer>,
) -> Result<NetworkPolicy, Error> {
    let labels = pod::labels(kind, &owner.reference.name, None);
    let mut own = labels.clone();
    own.retain(|key, _| key.starts_with("lathe.dev/"));
    let select = |labels: BTreeMap<String, String>| LabelSelector {
        match_labels: Some(labels),
        match_expressions: None,
    };
    let control = NetworkPolicyPort {
        port: Some(IntOrString::Int(CONTROL_PORT.into())),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    };
    stamp(NetworkPolicy {
        metadata: owner.meta(name, labels),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(select(own)),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                ports: Some(vec![control]),
                from: Some(control_peers),
            }]),
            egress: None,
        }),
    })
    .map_err(|source| Error::Build { what: "policy", source })
}

/// The Job.
fn build(request: JobRequest) -> Job {
    let JobRequest { name, owner, labels, annotations, template, suspended } = request;
    let mut metadata = owner.meta(name, labels);
    metadata.annotations = (!annotations.is_empty()).then_some(annotations);
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(RETRIES),
            completions: Some(1),
            parallelism: Some(1),
            pod_failure_policy: Some(failure_policy()),
            // Two pods never write one checkpoint.
            pod_replacement_policy: Some("Failed".to_owned()),
            suspend: Some(suspended),
            template,
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// The first rule that matches counts.
fn failure_policy() -> PodFailurePolicy {
    let codes = |code: i32| PodFailurePolicyOnExitCodesRequirement {
        container_name: Some(pod::CONTAINER.to_owned()),
        operator: "In".to_owned(),
        values: vec![code],
    };
    let rule =
        |action: &str| PodFailurePolicyRule { action: action.to_owned(), ..PodFailurePolicyRule::default() };
    let disrupted = PodFailurePolicyOnPodConditionsPattern {
        type_: "DisruptionTarget".to_owned(),
        status: "True".to_owned(),
    };
    PodFailurePolicy {
        rules: vec![
            // Eviction, preemption, a drained or lost node: nobody's failure.
            PodFailurePolicyRule { on_pod_conditions: Some(vec![disrupted]), ..rule("Ignore") },
            // Stopped by SIGTERM: the next pod goes on.
            PodFailurePolicyRule { on_exit_codes: Some(codes(exit::STOPPED)), ..rule("Ignore") },
            // The user's input is wrong: trying again cannot help.
            PodFailurePolicyRule { on_exit_codes: Some(codes(exit::USER)), ..rule("FailJob") },
        ],
    }
}

/// A Job and its pods, as they are.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// The Job.
    pub job: Option<Arc<Job>>,
    /// Its pods, the newest first.
    pub pods: Vec<Arc<Pod>>,
    /// What the node says of the newest one.
    pub told: Option<Trouble>,
}

/// Where a Job stands.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// There is none.
    Absent,
    /// It is held back; no pod runs.
    Suspended,
    /// No pod works yet; the trouble is what keeps the newest one, or ended the one before.
    Waiting(Option<Trouble>),
    /// A pod works.
    Running,
    /// It is done, with the worker's last words, or why they are not known.
    Complete(Result<Box<Outcome>, Trouble>),
    /// It failed for good; the trouble is stalled where another Job would fail in the same way.
    Failed(Trouble),
}

impl Run {
    /// The Job `name` of `owner` among those that are known, with its pods.
    pub fn find(owner: &Owner, name: &str, jobs: &[Arc<Job>], pods: &[Arc<Pod>]) -> Self {
        let job = jobs.iter().find(|job| job.name_any() == name && owner.controls(&***job)).cloned();
        job.map_or_else(Self::default, |job| Self::of(job, pods))
    }

    /// A Job with its pods.
    pub fn of(job: Arc<Job>, pods: &[Arc<Pod>]) -> Self {
        let uid = job.uid();
        let own = |pod: &&Arc<Pod>| pod.owner_references().iter().any(|o| Some(&o.uid) == uid.as_ref());
        let mut pods: Vec<_> = pods.iter().filter(own).cloned().collect();
        pods.sort_by_key(|pod| std::cmp::Reverse((pod.metadata.creation_timestamp.clone(), pod.name_any())));
        Self { job: Some(job), pods, told: None }
    }

    /// The pod that works now.
    pub fn working(&self) -> Option<&Pod> {
        let works = |pod: &&Arc<Pod>| pods::phase(pod) == Some("Running");
        self.pods.iter().find(works).map(|pod| &**pod)
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        let Some(job) = &self.job else { return State::Absent };
        if condition(job, "Complete").is_some() {
            // The Job may be seen to its end before its pod is.
            return match self.result() {
                Err(_) if !self.pods.iter().all(|pod| pods::is_over(pod)) => State::Running,
                words => State::Complete(words.map(Box::new)),
            };
        }
        if let Some(failed) = condition(job, "Failed") {
            return State::Failed(self.cause(failed));
        }
        if self.working().is_some() {
            return State::Running;
        }
        if job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true) {
            return State::Suspended;
        }
        State::Waiting(self.waits())
    }

    /// Asks what the node says of the newest pod, where nothing of its status says why it does not start, and why there is none.
    pub async fn ask(&mut self, client: &Client, now: Timestamp) {
        let (State::Waiting(_), Some(job)) = (self.state(), &self.job) else { return };
        self.told = match self.pods.first() {
            Some(pod) if pods::trouble(pod).is_some() => return,
            Some(pod) => {
                let told = mounting::trouble(client, pod, now).await;
                told.map(|trouble| mounting::without_copy(trouble, job))
            }
            None => mounting::no_pod(client, job, now).await,
        };
    }

    /// When it ended, well or not.
    pub fn ended(&self) -> Option<Timestamp> {
        let job = self.job.as_ref()?;
        let end = condition(job, "Complete").or_else(|| condition(job, "Failed"))?;
        end.last_transition_time.as_ref().map(|time| time.0)
    }

    /// An annotation of the Job.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.job.as_ref()?.annotations().get(key).map(String::as_str)
    }

    /// Time until a look that failed is repeated, where it has been failing since then; `None`: now.
    pub fn again(&self, since: Option<Timestamp>, now: Timestamp) -> Option<Duration> {
        wait(again_at(since, self.ended().unwrap_or(now)), now)
    }

    /// When to look at a pod that waits again, where nothing of it changes before.
    pub fn look_again(&self, now: Timestamp) -> Duration {
        let pod = self.pods.first().and_then(|pod| pod.metadata.creation_timestamp.as_ref());
        let job = self.job.as_ref().and_then(|job| job.metadata.creation_timestamp.as_ref());
        look_again(pod.or(job).map(|time| time.0), now)
    }

    /// What the pod said that did it; those before it were stopped or failed.
    fn result(&self) -> Result<Outcome, Trouble> {
        let mut why = lost();
        for pod in &self.pods {
            match pods::last_words(pod) {
                Some(Ok(Summary { outcome: Outcome::Stopped { .. } | Outcome::Failed(_) })) | None => {}
                Some(Ok(Summary { outcome })) => return Ok(outcome),
                Some(Err(error)) if has_succeeded(pod) => why = unexpected(&error.to_string()),
                Some(Err(_)) => {}
            }
        }
        Err(why)
    }

    /// What keeps the newest pod, or ended one before: that one is tried again, whatever it was.
    fn waits(&self) -> Option<Trouble> {
        let newest = self.pods.first().filter(|pod| !pods::is_over(pod)).and_then(|pod| pods::trouble(pod));
        let newest = newest.or_else(|| self.told.clone());
        newest.or_else(|| self.trouble().map(|trouble| Trouble { stalled: false, ..trouble }))
    }

    fn trouble(&self) -> Option<Trouble> {
        let stopped = |pod: &Pod| {
            matches!(pods::last_words(pod), Some(Ok(Summary { outcome: Outcome::Stopped { .. } })))
        };
        self.pods.iter().filter(|pod| !stopped(pod)).find_map(|pod| pods::trouble(pod))
    }

    fn cause(&self, failed: &JobCondition) -> Trouble {
        if let Some(trouble) = self.trouble() {
            return trouble;
        }
        let said = failed.message.as_deref().unwrap_or("the Job failed");
        let next = "Next: `kubectl describe job` has the cluster's words; then make the object again.";
        let message = format!("{} and no pod is left to say why. {next}", said.trim_end_matches('.'));
        Trouble { reason: "WorkerFailed".to_owned(), message, stalled: false }
    }
}

fn has_succeeded(pod: &Pod) -> bool {
    pods::phase(pod) == Some("Succeeded")
}

/// The pod went before its words were read, or it said none.
fn lost() -> Trouble {
    let message = "the pod is gone, and its last words with it; another one repeats them. Next: nothing.";
    Trouble { reason: "ReportLost".to_owned(), message: message.to_owned(), stalled: false }
}

/// Last words that are no words of this task: they would be the same again.
pub fn unexpected(why: &str) -> Trouble {
    let next = "Next: check that operator and worker image are of the same version.";
    let message = format!("the worker's last words cannot be used: {}. {next}", pods::shown(why));
    Trouble { reason: "WorkerFailed".to_owned(), message, stalled: true }
}

fn condition<'a>(job: &'a Job, type_: &str) -> Option<&'a JobCondition> {
    job.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == type_ && c.status == "True")
}

/// The scheduler's words with a next step, for the small pods that inspect and check.
pub fn advised(trouble: Option<Trouble>) -> Option<Trouble> {
    trouble.map(|trouble| match trouble.reason.as_str() {
        pods::UNSCHEDULABLE => {
            let next = "Next: free a node, or check the claims (`kubectl get pvc`).";
            Trouble { message: format!("no node takes the pod: {}. {next}", trouble.message), ..trouble }
        }
        _ => trouble,
    })
}

/// What was said of a user's files, while a pod reads them once more: it stands until the pod has found otherwise.
pub fn stands(conditions: &[Condition], verdict: &str) -> Option<Trouble> {
    let said = conditions::find(conditions, verdict).filter(|c| c.status == "False")?;
    let (reason, message) = (said.reason.clone(), said.message.clone());
    conditions::is_true(conditions, conditions::STALLED).then_some(Trouble { reason, message, stalled: true })
}

/// Since when a look at an object's files may have been failing: the last turn of one of these conditions, or its making.
pub fn failing_since(meta: &ObjectMeta, conditions: &[Condition], turns: &[&str]) -> Option<Timestamp> {
    let turns = turns.iter().filter_map(|type_| conditions::find(conditions, type_));
    let turned = turns.map(|condition| condition.last_transition_time.0);
    turned.chain(meta.creation_timestamp.as_ref().map(|made| made.0)).max()
}

/// What a failed look at a user's files is repeated after: they may be put there any minute.
fn again_at(since: Option<Timestamp>, failed: Timestamp) -> Timestamp {
    failed.checked_add(pause(since, failed)).unwrap_or(failed)
}

/// When to look again at something that waits since then and whose own changes wake its object anyway.
pub fn look_again(since: Option<Timestamp>, now: Timestamp) -> Duration {
    // Between ten seconds and ten minutes: never negative.
    Duration::try_from(pause(since, now)).unwrap_or_default()
}

/// A quarter of the time that it has been so, between ten seconds and ten minutes, so nothing needs to be remembered.
fn pause(since: Option<Timestamp>, now: Timestamp) -> SignedDuration {
    let been = since.map_or(SignedDuration::ZERO, |since| now.duration_since(since));
    (been / 4).clamp(SignedDuration::from_secs(10), SignedDuration::from_mins(10))
}

/// Time until `due`; `None` where it has come.
pub fn wait(due: Timestamp, now: Timestamp) -> Option<Duration> {
    Duration::try_from(due.duration_since(now)).ok().filter(|wait| !wait.is_zero())
}

#[cfg(test)]
mod tests;
