//! Commands that look into a cluster, with the user's own rights and nothing more.
pub mod chat;
mod forward;
mod gateway;
pub mod logs;
pub mod status;
mod stream;

use std::time::Duration;

use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _, api::ListParams};
use lathe_api::{GROUP, VERSION, names};

use crate::failure::{Done, Problem};

/// Which cluster, and where in it.
#[derive(Args, Clone, Debug, Default)]
pub struct Target {
    /// Namespace [default: the context's].
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Context of the kubeconfig [default: the current one].
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
}

/// A kind of Lathe's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Model,
    FineTuneJob,
    InferenceService,
    AcceleratorProfile,
}

impl Kind {
    /// As manifests write it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Model => "Model",
            Kind::FineTuneJob => "FineTuneJob",
            Kind::InferenceService => "InferenceService",
            Kind::AcceleratorProfile => "AcceleratorProfile",
        }
    }

    /// In labels, and before the slash.
    pub fn lower(self) -> String {
        self.name().to_lowercase()
    }

    /// What people type: the kind, its plural or its short name, in any case.
    fn parse(text: &str) -> Option<Self> {
        let text = text.to_lowercase();
        let singular = text.strip_suffix('s').unwrap_or(&text);
        Some(match singular {
            "model" => Kind::Model,
            "finetunejob" | "ftj" | "job" => Kind::FineTuneJob,
            "inferenceservice" | "lsvc" | "service" => Kind::InferenceService,
            "acceleratorprofile" | "profile" => Kind::AcceleratorProfile,
            _ => return None,
        })
    }
}

/// `KIND` or `KIND/NAME`, as the command line takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub kind: Kind,
    pub name: Option<String>,
}

impl std::str::FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, name) = match text.split_once('/') {
            Some((kind, name)) => (kind, Some(name)),
            None => (text, None),
        };
        let Some(kind) = Kind::parse(kind) else {
            return Err("must be KIND or KIND/NAME; KIND is model, finetunejob (ftj), inferenceservice (lsvc) or acceleratorprofile".to_owned());
        };
        match name {
            Some("") => Err(format!("has no name after {}/", kind.lower())),
            name => Ok(Self { kind, name: name.map(str::to_owned) }),
        }
    }
}

/// A client, and the namespace that is looked at.
pub struct Connection {
    pub client: Client,
    pub namespace: String,
}

/// Connects as kubectl would: KUBECONFIG, `~/.kube/config`, or the pod's own account.
///
/// # Errors
/// There is no such context or no usable configuration.
pub async fn connect(target: &Target) -> Done<Connection> {
    // A second call is no error: both are ring.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let unusable = |error: &dyn std::fmt::Display| {
        let message = format!(
            "no cluster can be asked: {error}. Next: does `kubectl get namespaces` work? It uses the same configuration."
        );
        Problem::user("NoCluster", message)
    };
    let options = KubeConfigOptions { context: target.context.clone(), ..KubeConfigOptions::default() };
    let config = match target.context {
        Some(_) => {
            let kubeconfig = Kubeconfig::read().map_err(|error| unusable(&error))?;
            Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| unusable(&error))?
        }
        None => Config::infer().await.map_err(|error| unusable(&error))?,
    };
    let namespace = target.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config).map_err(|error| unusable(&error))?;
    Ok(Connection { client, namespace })
}

/// Why a call failed, and what to do.
pub fn refused(doing: &str, error: &kube::Error) -> Problem {
    match error {
        kube::Error::Api(status)
            if status.code == 404 && status.details.as_ref().is_none_or(|d| d.name.is_empty()) =>
        {
            let message = format!(
                "cannot {doing}: this cluster does not know {GROUP}/{VERSION}. Next: install Lathe (`helm upgrade --install lathe charts/lathe`), or choose another --context."
            );
            Problem::user("NotInstalled", message)
        }
        kube::Error::Api(status) if status.code == 403 => {
            let message = format!(
                "cannot {doing}: {}. Next: ask for the role `view` (reading) or `edit` in this namespace.",
                status.message
            );
            Problem::user("Forbidden", message)
        }
        kube::Error::Api(status) if status.code < 500 => {
            Problem::user("Refused", format!("cannot {doing}: {}", status.message))
        }
        other => {
            let mut message = format!("cannot {doing}: {other}");
            let mut source = std::error::Error::source(other);
            while let Some(cause) = source {
                message.push_str(&format!(": {cause}"));
                source = cause.source();
            }
            Problem::transient("Unreachable", format!("{message}. Next: is the cluster up?"))
        }
    }
}

/// The pods that work for an object, the newest first.
///
/// # Errors
/// The cluster does not tell them.
pub async fn pods(connection: &Connection, kind: Kind, name: &str) -> Done<Vec<Pod>> {
    let api: Api<Pod> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let labels = format!("{}={},{}={name}", names::LABEL_KIND, kind.lower(), names::LABEL_NAME);
    let list = api.list(&ListParams::default().labels(&labels)).await;
    let mut pods = list.map_err(|error| refused("list pods", &error))?.items;
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.creation_timestamp().map(|time| time.0)));
    Ok(pods)
}

/// True where a pod takes requests.
fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready =
        conditions.filter(|condition| condition.type_ == "Ready").any(|condition| condition.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

/// `4m`, `3h12m`, `5d`: as kubectl tells an age.
pub fn age(seconds: i64) -> String {
    let whole = Duration::from_secs(u64::try_from(seconds).unwrap_or(0)).as_secs();
    match whole {
        0..120 => format!("{whole}s"),
        120..7_200 => format!("{}m", whole / 60),
        7_200..172_800 => format!("{}h", whole / 3_600),
        _ => format!("{}d", whole / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("model/base", Some((Kind::Model, Some("base"))))]
    #[case("FineTuneJobs", Some((Kind::FineTuneJob, None)))]
    #[case("ftj/a", Some((Kind::FineTuneJob, Some("a"))))]
    #[case("lsvc/shop", Some((Kind::InferenceService, Some("shop"))))]
    #[case("acceleratorprofiles", Some((Kind::AcceleratorProfile, None)))]
    #[case("model/", None)]
    #[case("pod/x", None)]
    #[case("", None)]
    fn objects_are_named_as_kubectl_names_them(
        #[case] text: &str,
        #[case] expected: Option<(Kind, Option<&str>)>,
    ) {
        let expected = expected.map(|(kind, name)| Named { kind, name: name.map(str::to_owned) });
        assert_eq!(text.parse::<Named>().ok(), expected);
    }

    #[rstest]
    #[case(-5, "0s")]
    #[case(119, "119s")]
    #[case(120, "2m")]
    #[case(7_200, "2h")]
    #[case(172_800, "2d")]
    fn ages(#[case] seconds: i64, #[case] expected: &str) {
        assert_eq!(age(seconds), expected);
    }
}
