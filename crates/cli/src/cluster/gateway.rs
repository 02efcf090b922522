//! The way to the gateway of a cluster: an address that the user names, or a port-forward to one of its pods.
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Api, Client, ResourceExt as _, api::ListParams};

use super::{forward, is_ready, refused};
use crate::failure::{Done, Problem};

/// Opens a port of localhost that leads to the gateway whose address a service's `status.url` is.
///
/// # Errors
/// The address is no Service's, none of its pods is ready, or the user may not forward to it; `--gateway` is named as the way
/// without such rights.
pub async fn open(client: &Client, url: &str) -> Done<(u16, forward::Guard)> {
    let other_way = |problem: Problem| Problem {
        message: format!(
            "{} Or, without rights in the gateway's namespace: `--gateway URL` with an address of it that you reach.",
            problem.message
        ),
        ..problem
    };
    let Some((name, namespace)) = service_of(url) else {
        let message = format!("`status.url` of the service is {url}, which is no address of a Service.");
        return Err(other_way(Problem::user("NoEndpoint", message)));
    };
    forward_to(client, name, namespace).await.map_err(other_way)
}

async fn forward_to(client: &Client, name: &str, namespace: &str) -> Done<(u16, forward::Guard)> {
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    let service = services.get(name).await;
    let service = service.map_err(|error| refused(&format!("read Service {namespace}/{name}"), &error))?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let labels = service.spec.iter().flat_map(|spec| spec.selector.iter().flatten());
    let labels: Vec<String> = labels.map(|(key, value)| format!("{key}={value}")).collect();
    let found = pods.list(&ListParams::default().labels(&labels.join(","))).await;
    let found = found.map_err(|error| refused(&format!("list the pods of {namespace}/{name}"), &error))?;
    let ready = found.iter().find(|pod| is_ready(pod)).and_then(|pod| Some((pod, port_of(&service, pod)?)));
    let Some((pod, port)) = ready.filter(|_| !labels.is_empty()) else {
        let message = format!(
            "the gateway {namespace}/{name} has no pod that is ready. Next: `kubectl --namespace {namespace} get pods`, and ask again."
        );
        return Err(Problem::transient("NotReady", message));
    };
    forward::open(pods, pod.name_any(), port).await
}

/// Name and namespace of the Service in `http://<name>.<namespace>.svc...`.
fn service_of(url: &str) -> Option<(&str, &str)> {
    let host = url.strip_prefix("http://")?.split(['/', ':']).next()?;
    let mut labels = host.split('.');
    let (name, namespace) = (labels.next()?, labels.next()?);
    (labels.next() == Some("svc") && !name.is_empty() && !namespace.is_empty()).then_some((name, namespace))
}

/// The pod's port behind the Service's port `http`.
fn port_of(service: &Service, pod: &Pod) -> Option<u16> {
    let ports = service.spec.as_ref()?.ports.as_ref()?;
    let port = ports.iter().find(|port| port.name.as_deref() == Some("http"))?;
    let number = match &port.target_port {
        None => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => {
            let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
            let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
            ports.find(|port| port.name.as_deref() == Some(name))?.container_port
        }
    };
    u16::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    #[rstest]
    #[case("http://lathe-gateway.lathe-system.svc/v1", Some(("lathe-gateway", "lathe-system")))]
    #[case("http://gate.ml.svc.cluster.local:80/v1", Some(("gate", "ml")))]
    #[case("https://models.example.com/v1", None)]
    #[case("http://models.example.com/v1", None)]
    #[case("http://.x.svc", None)]
    #[case("", None)]
    fn an_address_names_a_service_of_a_namespace(#[case] url: &str, #[case] expected: Option<(&str, &str)>) {
        assert_eq!(service_of(url), expected);
    }

    #[rstest]
    #[case::by_name(json!("http"), Some(8080))]
    #[case::by_number(json!(9000), Some(9000))]
    #[case::the_same(Value::Null, Some(80))]
    #[case::nothing_has_it(json!("other"), None)]
    fn the_pods_port_is_found_as_the_service_finds_it(#[case] target: Value, #[case] expected: Option<u16>) {
        let service = json!({"spec": {"ports": [
            {"name": "admin", "port": 8081}, {"name": "http", "port": 80, "targetPort": target}]}});
        let pod = json!({"spec": {"containers": [{"name": "gateway", "ports": [
            {"name": "http", "containerPort": 8080}, {"name": "admin", "containerPort": 8081}]}]}});
        let (service, pod) = (serde_json::from_value(service).unwrap(), serde_json::from_value(pod).unwrap());
        assert_eq!(port_of(&service, &pod), expected);
    }
}
