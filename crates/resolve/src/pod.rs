//! The one shape of every pod that Lathe makes, for Jobs and Deployments.
//!
//! It meets the restricted pod security standard, holds no API token, sees nothing but the volumes and Secrets that its task
//! names, and takes from the user only what [`PodOverrides`] allows.
mod mounts;
mod placement;
mod volumes;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    LocalObjectReference, PodSecurityContext, PodSpec, PodTemplateSpec, ResourceRequirements, SeccompProfile,
    SecurityContext, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use lathe_api::{PodOverrides, names};
use lathe_contract::{CONTRACT_PATH, CONTROL_PORT, Contract, SERVE_PORT, Task};
use serde::Serialize;
use sha2::{Digest, Sha256};

pub use mounts::{CACHE, LocationError, Mounts, SECRETS, Use, VOLUMES, claim};
pub use placement::{Placement, matches, node_selector_terms};
pub use volumes::claim_of;

/// User and group of every worker.
pub const USER: i64 = 65532;
/// Name of the one container.
pub const CONTAINER: &str = "worker";
/// Volume of a pod with its contract.
pub const CONTRACT_VOLUME: &str = "contract";
/// Key of the contract in its ConfigMap.
pub const CONTRACT_KEY: &str = "contract.json";
/// Annotation: hash of what the pod read at its start, so that a change replaces it.
pub const CHECKSUM: &str = "lathe.dev/contract-checksum";

const TMP: &str = "/tmp";
const TMP_SIZE: &str = "1Gi";

/// What the pods of a task need.
#[derive(Clone, Debug)]
pub struct PodRequest<'a> {
    /// Labels of the owner, see [`labels`].
    pub labels: BTreeMap<String, String>,
    /// Image of the worker.
    pub image: &'a str,
    /// `Always`, `IfNotPresent` or `Never`; `None` leaves it to the cluster.
    pub pull_policy: Option<&'a str>,
    /// The task, whose name is the worker's one argument.
    pub task: &'a Task,
    /// ConfigMap with the contract, under [`CONTRACT_KEY`].
    pub contract: &'a str,
    /// Hash of the part of the contract that needs a new pod when it changes, see [`checksum`].
    pub checksum: &'a str,
    /// Claims and Secrets.
    pub mounts: &'a Mounts,
    /// Processor time, in thousandths of a core, at most.
    pub cpu_millis: i64,
    /// Processor time that a node must have free.
    pub least_cpu_millis: i64,
    /// Memory, in bytes.
    pub memory: i64,
    /// Size of the folder for downloads, in bytes.
    pub cache: i64,
    /// Where it may run; `None`: any node.
    pub placement: Option<Placement<'a>>,
    /// What the user says about the pods.
    pub overrides: Option<&'a PodOverrides>,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: i64,
    /// `Never` for Jobs, `Always` for Deployments.
    pub restart_policy: &'a str,
}

/// The pod template.
#[must_use]
pub fn template(request: &PodRequest<'_>) -> PodTemplateSpec {
    let none = PodOverrides::default();
    let user = request.overrides.unwrap_or(&none);
    let mut annotations = user.annotations.clone();
    annotations.insert(CHECKSUM.to_owned(), request.checksum.to_owned());
    let mut labels: BTreeMap<String, String> = user.labels.clone();
    labels.retain(|key, _| !is_own(key));
    labels.extend(request.labels.clone());
    labels.extend(volumes::labels(request.mounts));
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(spec(request, user)),
    }
}

/// Labels of everything that belongs to an object: `kind` in lower case, `task` as the worker calls it.
#[must_use]
pub fn labels(kind: &str, name: &str, task: Option<&str>) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([
        ("app.kubernetes.io/name".to_owned(), "lathe-worker".to_owned()),
        ("app.kubernetes.io/managed-by".to_owned(), "lathe".to_owned()),
        (names::LABEL_KIND.to_owned(), kind.to_owned()),
        (names::LABEL_NAME.to_owned(), name.to_owned()),
    ]);
    all.extend(task.map(|task| (names::LABEL_TASK.to_owned(), task.to_owned())));
    all
}

/// The worker's word for a task: its one argument, and the value of the label `lathe.dev/task`.
#[must_use]
pub fn task_name(task: &Task) -> &'static str {
    match task {
        Task::Train(_) => "train",
        Task::Serve(_) => "serve",
        Task::Evaluate(_) => "evaluate",
        Task::Inspect(_) => "inspect",
        Task::CheckData(_) => "check-data",
    }
}

/// Data of the contract's ConfigMap.
///
/// # Errors
/// Only where a number of the contract is not finite.
pub fn contract_data(contract: &Contract) -> Result<BTreeMap<String, String>, serde_json::Error> {
    Ok(BTreeMap::from([(CONTRACT_KEY.to_owned(), contract_text(contract)?)]))
}

/// A contract as its pod reads it.
///
/// # Errors
/// Only where a number of the contract is not finite.
pub fn contract_text(contract: &Contract) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(contract)
}

/// Hash of anything that is written as JSON, for [`CHECKSUM`].
///
/// # Errors
/// Only where a number is not finite.
pub fn checksum(value: &impl Serialize) -> Result<String, serde_json::Error> {
    Ok(hex::encode(Sha256::digest(serde_json::to_vec(value)?))[..32].to_owned())
}

fn is_own(label: &str) -> bool {
    let prefix = label.split_once('/').map_or("", |(prefix, _)| prefix);
    prefix == lathe_api::GROUP || prefix.ends_with(".lathe.dev") || prefix == "app.kubernetes.io"
}

fn spec(request: &PodRequest<'_>, user: &PodOverrides) -> PodSpec {
    let (volumes, volume_mounts) = volumes(request);
    let placement = request.placement;
    let mut tolerations = placement.map(|p| p.tolerations()).unwrap_or_default();
    tolerations.extend(user.tolerations.iter().map(Toleration::from));
    let secret = |r: &lathe_api::NameRef| LocalObjectReference { name: r.name.clone() };
    let node_affinity = placement.and_then(|p| p.affinity());
    let pod_affinity = volumes::affinity(request.mounts);
    let affinity = (node_affinity.is_some() || pod_affinity.is_some()).then_some(Affinity {
        node_affinity,
        pod_affinity,
        pod_anti_affinity: None,
    });
    PodSpec {
        affinity,
        automount_service_account_token: Some(false),
        containers: vec![container(request, user, volume_mounts)],
        enable_service_links: Some(false),
        image_pull_secrets: some(user.image_pull_secrets.iter().map(secret).collect()),
        node_selector: (!user.node_selector.is_empty()).then(|| user.node_selector.clone()),
        priority_class_name: user.priority_class_name.clone(),
        restart_policy: Some(request.restart_policy.to_owned()),
        scheduler_name: user.scheduler_name.clone(),
        security_context: Some(PodSecurityContext {
            fs_group: Some(USER),
            // A large volume is not walked at every start.
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            run_as_group: Some(USER),
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                localhost_profile: None,
            }),
            ..PodSecurityContext::default()
        }),
        service_account_name: user.service_account_name.clone(),
        termination_grace_period_seconds: Some(request.grace_seconds),
        tolerations: some(tolerations),
        volumes: Some(volumes),
        ..PodSpec::default()
    }
}

fn container(request: &PodRequest<'_>, user: &PodOverrides, mounts: Vec<VolumeMount>) -> Container {
    let env = |e: &lathe_api::EnvVar| EnvVar {
        name: e.name.clone(),
        value: Some(e.value.clone()),
        ..EnvVar::default()
    };
    let port = |name: &str, number: u16| ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(number),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let mut ports = vec![port("control", CONTROL_PORT)];
    if matches!(request.task, Task::Serve(_)) {
        ports.push(port("http", SERVE_PORT));
    }
    Container {
        name: CONTAINER.to_owned(),
        image: Some(request.image.to_owned()),
        image_pull_policy: request.pull_policy.map(str::to_owned),
        args: Some(vec![task_name(request.task).to_owned()]),
        env: some(user.env.iter().map(env).collect()),
        ports: Some(ports),
        resources: Some(resources(request, user)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        // The worker's last words only: a log's tail would not be its Summary.
        termination_message_policy: Some("File".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

/// Memory is requested as it is limited, so that a pod is never killed for what another one takes. Of processor time a pod may
/// get less than its limit: it is slower then, and nothing worse.
fn resources(request: &PodRequest<'_>, user: &PodOverrides) -> ResourceRequirements {
    let chosen = |own: &Option<lathe_api::Quantity>, planned: String| {
        Quantity(own.as_ref().map_or(planned, |quantity| quantity.0.clone()))
    };
    let mut all = request.placement.map(|p| p.devices()).unwrap_or_default();
    all.insert("memory".to_owned(), chosen(&user.memory, mebibytes(request.memory)));
    let with = |millis: i64| {
        let mut all = all.clone();
        all.insert("cpu".to_owned(), chosen(&user.cpu, cpu(millis)));
        Some(all)
    };
    let least = request.least_cpu_millis.min(request.cpu_millis);
    ResourceRequirements { limits: with(request.cpu_millis), requests: with(least), claims: None }
}

fn volumes(request: &PodRequest<'_>) -> (Vec<Volume>, Vec<VolumeMount>) {
    let folder = CONTRACT_PATH.rsplit_once('/').map_or("/", |(folder, _)| folder);
    let mount = |name: &str, path: &str, read_only: Option<bool>| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only,
        ..VolumeMount::default()
    };
    let empty = |name: &str, size: String| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource { size_limit: Some(Quantity(size)), medium: None }),
        ..Volume::default()
    };
    let mut volumes = vec![
        Volume {
            name: CONTRACT_VOLUME.to_owned(),
            config_map: Some(ConfigMapVolumeSource {
                name: request.contract.to_owned(),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        },
        empty("cache", mebibytes(request.cache)),
        empty("tmp", TMP_SIZE.to_owned()),
    ];
    let mut mounts = vec![
        mount(CONTRACT_VOLUME, folder, Some(true)),
        mount("cache", CACHE, None),
        mount("tmp", TMP, None),
    ];
    let (more, more_mounts) = request.mounts.volumes();
    volumes.extend(more);
    mounts.extend(more_mounts);
    (volumes, mounts)
}

/// In the form in which the API server gives it back, so that it is never different from what is stored.
fn cpu(millis: i64) -> String {
    if millis % 1000 == 0 { (millis / 1000).to_string() } else { format!("{millis}m") }
}

fn mebibytes(bytes: i64) -> String {
    format!("{}Mi", (bytes.max(1) - 1) / (1 << 20) + 1)
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

#[cfg(test)]
mod tests;
