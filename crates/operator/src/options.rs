//! Command line and environment.
use std::net::SocketAddr;

use clap::{Parser, ValueEnum};
use k8s_openapi::api::networking::v1::NetworkPolicyPeer;
use lathe_resolve::inference::Images;
use lathe_telemetry::CollectorOptions;

use crate::context::{ArtifactVolume, Config, Tracing, peer};

/// Tunes, measures and serves language models on Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "lathe-operator", version)]
pub struct Options {
    /// Namespace of this installation: its Lease and its key Secret are here.
    #[arg(long, env = "LATHE_NAMESPACE", default_value = "lathe-system")]
    pub release_namespace: String,
    /// Namespaces to look after; none: all of them.
    #[arg(long, env = "LATHE_NAMESPACES", value_delimiter = ',')]
    pub namespaces: Vec<String>,
    /// This installation has a gateway, in its namespace; without one no service with `access: GatewayOnly` is served.
    #[arg(long, env = "LATHE_GATEWAY")]
    pub gateway: bool,
    /// Image of the worker for processors.
    #[arg(long, env = "LATHE_WORKER_IMAGE")]
    pub worker_image: String,
    /// Image of the worker for NVIDIA devices; without it such a profile needs its own `image`.
    #[arg(long, env = "LATHE_WORKER_IMAGE_CUDA")]
    pub worker_image_cuda: Option<String>,
    /// When nodes pull the worker's image: Always, IfNotPresent or Never; absent: the cluster's default.
    #[arg(long, env = "LATHE_IMAGE_PULL_POLICY")]
    pub image_pull_policy: Option<String>,
    /// Size of the artefact volume that a namespace gets on first need.
    #[arg(long, env = "LATHE_ARTIFACTS_SIZE", default_value = "20Gi")]
    pub artifacts_size: String,
    /// Its storage class; absent: the cluster's default.
    #[arg(long, env = "LATHE_ARTIFACTS_STORAGE_CLASS")]
    pub artifacts_storage_class: Option<String>,
    /// Its access mode: ReadWriteMany, ReadWriteOnce or ReadWriteOncePod.
    #[arg(long, env = "LATHE_ARTIFACTS_ACCESS_MODE", default_value = "ReadWriteOnce")]
    pub artifacts_access_mode: String,
    /// Work only while holding the Lease; needed for more than one replica.
    #[arg(long, env = "LATHE_LEADER_ELECT")]
    pub leader_elect: bool,
    /// Name of this replica in the Lease.
    #[arg(long, env = "POD_NAME")]
    pub identity: Option<String>,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, env = "LATHE_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Labels (`key=value`, with commas) of the namespaces whose pods may read metrics at the control port of workers; absent,
    /// as those of the pods: nobody but the operator reaches it.
    #[arg(long, env = "LATHE_METRICS_FROM_NAMESPACES", value_delimiter = ',', value_parser = label)]
    pub metrics_from_namespaces: Vec<(String, String)>,
    /// Labels of those pods.
    #[arg(long, env = "LATHE_METRICS_FROM_PODS", value_delimiter = ',', value_parser = label)]
    pub metrics_from_pods: Vec<(String, String)>,
    /// The collector of traces.
    #[command(flatten)]
    pub collector: CollectorOptions,
    /// Collector of the traces of services' replicas that are made from now on, unless `spec.pod.env` names one; absent: none are sent.
    #[arg(long, env = "LATHE_WORKER_OTLP_ENDPOINT", hide_env_values = true)]
    pub worker_otlp_endpoint: Option<String>,
    /// Share of the requests that those replicas trace, of those that do not say so themselves (`traceparent`), unless `spec.pod.env`
    /// names a sampler: 0 to 1.
    #[arg(long, env = "LATHE_WORKER_TRACES_SAMPLING", default_value = "1", value_parser = share)]
    pub worker_traces_sampling: String,
    /// Form of the log; what is logged is chosen by RUST_LOG, e.g. `info,kube=warn`.
    #[arg(long, env = "LATHE_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

impl Options {
    /// What the controllers need of it.
    pub fn config(&self) -> Config {
        let given = |text: &Option<String>| text.clone().filter(|t| !t.is_empty());
        Config {
            release_namespace: self.release_namespace.clone(),
            namespaces: self.namespaces.iter().filter(|n| !n.is_empty()).cloned().collect(),
            gateway: self.gateway,
            images: Images { cpu: self.worker_image.clone(), cuda: given(&self.worker_image_cuda) },
            scraper: self.scraper(),
            pull_policy: given(&self.image_pull_policy),
            tracing: given(&self.worker_otlp_endpoint)
                .map(|endpoint| Tracing { endpoint, sampling: self.worker_traces_sampling.clone() }),
            artifacts: ArtifactVolume {
                size: self.artifacts_size.clone(),
                storage_class: given(&self.artifacts_storage_class),
                access_mode: self.artifacts_access_mode.clone(),
            },
        }
    }

    fn scraper(&self) -> Option<NetworkPolicyPeer> {
        let (namespaces, pods) = (&self.metrics_from_namespaces, &self.metrics_from_pods);
        let labels = |labels: &[(String, String)]| labels.iter().cloned().collect();
        let anybody = !namespaces.is_empty() || !pods.is_empty();
        anybody.then(|| peer(labels(namespaces), labels(pods)))
    }

    /// The pod's name; outside a pod, one that two processes of a machine do not share.
    pub fn identity(&self) -> String {
        self.identity.clone().unwrap_or_else(|| format!("lathe-operator-{}", std::process::id()))
    }
}

fn share(text: &str) -> Result<String, &'static str> {
    let share = text.parse().ok().filter(|share: &f64| (0.0..=1.0).contains(share));
    share.map(|_| text.to_owned()).ok_or("must be a number from 0 to 1")
}

fn label(text: &str) -> Result<(String, String), String> {
    let label = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let (key, value) = label.ok_or("must be `key=value`, as a label of a namespace or pod")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn peers(args: &[&str]) -> serde_json::Value {
        let given = [&["lathe-operator", "--worker-image", "w:1"], args].concat();
        json!(Options::try_parse_from(given).unwrap().config().control_peers())
    }

    #[test]
    fn who_reads_metrics_reaches_the_control_port_beside_the_operator() {
        let operator = json!({
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "lathe-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "lathe-operator"}},
        });
        assert_eq!(peers(&[]), json!([operator]));
        let scraper = json!({
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring", "a": "b"}},
            "podSelector": {},
        });
        let labels = "kubernetes.io/metadata.name=monitoring,a=b";
        assert_eq!(peers(&["--metrics-from-namespaces", labels]), json!([operator, scraper]));
        let scraper = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "prometheus"}}});
        assert_eq!(peers(&["--metrics-from-pods", "app=prometheus"]), json!([operator, scraper]));
    }

    #[test]
    fn the_gateway_is_beside_the_operator_or_nowhere() {
        let config = |args: &[&str]| {
            let given =
                [&["lathe-operator", "--worker-image", "w:1", "--release-namespace", "ml"], args].concat();
            Options::try_parse_from(given).unwrap().config()
        };
        assert_eq!(config(&[]).gateway_url(), None);
        let url = config(&["--gateway"]).gateway_url();
        assert_eq!(url.as_deref(), Some("http://lathe-gateway.ml.svc/v1"));
    }

    #[test]
    fn a_label_without_a_value_is_refused() {
        let given = ["lathe-operator", "--worker-image", "w:1", "--metrics-from-pods", "app"];
        let said = Options::try_parse_from(given).unwrap_err().to_string();
        assert!(said.contains("--metrics-from-pods") && said.contains("must be `key=value`"), "{said}");
    }
}
