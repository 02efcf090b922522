//! Replicas by somebody else's autoscaler: the cluster's own HorizontalPodAutoscaler over the scale subresource, on a metric that a
//! server of this test tells.
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use axum::extract::{Path, State};
use axum::routing::get;
use axum::serve::Listener;
use axum::{Json, Router};
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use lathe_e2e::{Session, kubectl, poll};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::server::TlsStream;

const API: &str = "v1beta1.external.metrics.k8s.io";
const GROUP: &str = "/apis/external.metrics.k8s.io/v1beta1";
/// Of one replica, in the autoscaler's target.
const TARGET: u64 = 70;

/// Tokens a second of `service`, a service without pods, ask for three replicas, then for two; what lies in Git without `replicas`
/// changes nothing of that.
pub async fn scales(session: &Session, service: &Value) -> Result<()> {
    let name = service["metadata"]["name"].as_str().context("no name")?;
    let metrics = Metrics::serve(&session.namespace).await?;
    session
        .apply(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "metrics"},
            // The API server runs on this machine.
            "spec": {"type": "ExternalName", "externalName": "localhost"},
        }))
        .await?;
    session.apply(&json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": API},
        "spec": {
            "group": "external.metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
            "insecureSkipTLSVerify": true,
            "service": {"name": "metrics", "namespace": session.namespace, "port": metrics.port},
        },
    }))
    .await?;
    let scaled = follows(session, name, service, &metrics).await;
    // A group that nobody answers for would hold up the end of every namespace.
    kubectl(&["delete", "apiservice", API])?;
    scaled
}

async fn follows(session: &Session, name: &str, service: &Value, metrics: &Metrics) -> Result<()> {
    metrics.tells(3 * TARGET);
    session.apply(&json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService", "name": name},
            "minReplicas": 1, "maxReplicas": 5,
            "metrics": [{"type": "External", "external": {
                "metric": {"name": "tokens_per_second"},
                "target": {"type": "AverageValue", "averageValue": TARGET.to_string()},
            }}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
        },
    }))
    .await?;
    replicas(session, name, 3).await?;
    // What a pipeline applies again and again.
    ensure!(service["spec"].get("replicas").is_none(), "{service:#}");
    session.apply(service).await?;
    replicas(session, name, 3).await?;
    metrics.tells(2 * TARGET);
    replicas(session, name, 2).await
}

/// Waits until the service and its Deployment both ask for so many.
async fn replicas(session: &Session, name: &str, wanted: i32) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(session.client.clone(), &session.namespace);
    let services = session.api("lathe.dev/v1alpha1", "InferenceService").await?;
    poll(&format!("{wanted} replicas by the autoscaler"), || async {
        let deployment = deployments.get(&format!("{name}-serve")).await?.spec.and_then(|spec| spec.replicas);
        let service = services.get_scale(name).await?.spec.and_then(|spec| spec.replicas);
        Ok((deployment == Some(wanted) && service == Some(wanted)).then_some(()))
    })
    .await
}

/// A server of the API `external.metrics.k8s.io` with one metric.
struct Metrics {
    port: u16,
    told: Arc<AtomicU64>,
}

impl Metrics {
    async fn serve(namespace: &str) -> Result<Self> {
        let listener = Tls::bind().await?;
        let port = listener.local_addr()?.port();
        let told = Arc::new(AtomicU64::new(0));
        let kinds = json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "external.metrics.k8s.io/v1beta1",
            "resources": [{"name": "externalmetrics", "singularName": "", "namespaced": true, "kind": "ExternalMetricValueList", "verbs": ["get"]}]});
        let router = Router::new()
            .route(GROUP, get(async move || Json(kinds)))
            .route(&format!("{GROUP}/namespaces/{namespace}/{{metric}}"), get(value))
            .with_state(told.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { port, told })
    }

    /// Tokens a second from now on.
    fn tells(&self, value: u64) {
        self.told.store(value, Ordering::Relaxed);
    }
}

async fn value(State(told): State<Arc<AtomicU64>>, Path(metric): Path<String>) -> Json<Value> {
    let item = json!({"metricName": metric, "metricLabels": {}, "timestamp": jiff::Timestamp::now().to_string(),
        "value": told.load(Ordering::Relaxed).to_string()});
    Json(
        json!({"kind": "ExternalMetricValueList", "apiVersion": "external.metrics.k8s.io/v1beta1", "metadata": {},
        "items": [item]}),
    )
}

/// Connections under a certificate that nobody knows.
struct Tls {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Tls {
    async fn bind() -> Result<Self> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let key = made.signing_key.serialize_der().try_into().map_err(anyhow::Error::msg)?;
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        Ok(Self { listener, acceptor: TlsAcceptor::from(Arc::new(config)) })
    }
}

impl Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (socket, address) = Listener::accept(&mut self.listener).await;
            if let Ok(stream) = self.acceptor.accept(socket).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}
