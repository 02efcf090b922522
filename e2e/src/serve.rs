//! Asking an InferenceService as its clients do.
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};

use crate::{Session, poll, quickstart, tune};

/// Longer than a connection inside of one machine takes.
const REACHABLE: Duration = Duration::from_secs(5);

/// The quick-start's service with these adapters, one replica on half a core, which answers without a key.
///
/// # Errors
/// The quick-start cannot be read.
pub fn service(name: &str, adapters: &[&str]) -> Result<Value> {
    let all = quickstart()?;
    let found = all.into_iter().find(|object| object["kind"] == "InferenceService");
    let mut service = found.context("the quick-start has no InferenceService")?;
    service["metadata"]["name"] = name.into();
    let adapters: Vec<Value> = adapters.iter().map(|name| json!({"name": name})).collect();
    service["spec"]["adapterRefs"] = adapters.into();
    service["spec"]["access"] = "Direct".into();
    service["spec"].as_object_mut().context("a service without a spec")?.remove("autoscaling");
    // So that a training fits beside it on a machine of two cores.
    service["spec"]["pod"] = json!({"cpu": "500m"});
    Ok(service)
}

/// As [`service`], on a quarter of a core each, for those who ask through the gateway.
///
/// # Errors
/// As [`service`].
pub fn behind_gateway(name: &str, adapters: &[&str]) -> Result<Value> {
    let mut service = service(name, adapters)?;
    service["spec"]["access"] = "GatewayOnly".into();
    service["spec"]["pod"] = json!({"cpu": "250m"});
    Ok(service)
}

/// Waits until a service has so many replicas, and all of them are ready.
///
/// # Errors
/// It does not come to that.
pub async fn until_replicas(session: &Session, service: &str, wanted: i64) -> Result<()> {
    let what = format!("there are not {wanted} ready replicas");
    let count = |object: &Value, field: &str| object["status"][field].as_i64().unwrap_or(0);
    let there =
        |object: &Value| count(object, "replicas") == wanted && count(object, "readyReplicas") == wanted;
    session.until("InferenceService", service, &what, there).await.map(drop)
}

/// Streams one chat completion of `model` from the service and returns the text.
///
/// # Errors
/// It is refused (the text has the answer), or the stream has no end.
pub async fn ask(session: &Session, service: &str, model: &str, question: &str) -> Result<String> {
    let body = json!({"model": model, "stream": true, "temperature": 0, "max_tokens": 64,
        "messages": [{"role": "user", "content": question}]});
    let (status, text) = post(session, service, &body).await?;
    ensure!(status == 200, "{status}: {text}");
    whole(&text)
}

/// The text of a streamed chat completion.
///
/// # Errors
/// The stream has no end, or an event is no JSON.
pub fn whole(stream: &str) -> Result<String> {
    ensure!(stream.trim_end().ends_with("data: [DONE]"), "the stream does not end with [DONE]: {stream}");
    let events =
        stream.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    events
        .map(|data| {
            let event: Value = serde_json::from_str(data)?;
            Ok(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned())
        })
        .collect()
}

/// Posts a chat completion, and returns the status and body of the answer.
///
/// # Errors
/// There is no answer.
pub async fn post(session: &Session, service: &str, body: &Value) -> Result<(u16, String)> {
    post_as(session, service, body, None).await
}

/// As [`post`], with this bearer token.
///
/// # Errors
/// There is no answer.
pub async fn post_as(
    session: &Session,
    service: &str,
    body: &Value,
    token: Option<&str>,
) -> Result<(u16, String)> {
    let services: Api<Service> = Api::namespaced(session.client.clone(), &session.namespace);
    let address = services.get(service).await?.spec.and_then(|s| s.cluster_ip).context("no address")?;
    let url = format!("http://{address}:8080/v1/chat/completions");
    let client = reqwest::Client::builder().connect_timeout(REACHABLE).build()?;
    poll(&format!("a connection to {service}"), || async {
        let mut request = client.post(&url).json(body);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        match request.send().await {
            // The node has not heard of the address yet, and a connection that was begun then is never answered.
            Err(error) if error.is_connect() && error.is_timeout() => Ok(None),
            sent => {
                let response = sent?;
                Ok(Some((response.status().as_u16(), response.text().await?)))
            }
        }
    })
    .await
}

/// Requests that each replica has answered, by its own count.
///
/// # Errors
/// The API server does not answer.
pub async fn answered(session: &Session) -> Result<BTreeMap<String, f64>> {
    let pods = tune::pods(session, "lathe.dev/task=serve").await?;
    let mut all = BTreeMap::new();
    for pod in pods {
        let Some(ip) = pod.status.as_ref().and_then(|status| status.pod_ip.as_ref()) else { continue };
        let metrics = match reqwest::get(format!("http://{ip}:8081/metrics")).await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            // It does not listen yet.
            Err(_) => String::new(),
        };
        let ours = metrics.lines().filter(|line| line.starts_with("vllm:request_success_total{"));
        let counts = ours.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        all.insert(pod.name_any(), counts.sum());
    }
    Ok(all)
}
