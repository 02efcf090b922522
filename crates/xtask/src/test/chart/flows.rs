//! Network policies by their meaning: who may talk to whom, evaluated as a network plugin would.

use serde_json::{Value, json};

use super::objects::{RELEASE_NAMESPACE, kinds, matches, named};

/// Somebody on the network.
struct Peer<'a> {
    /// Namespace and labels of a pod; none for what is no pod (a node, the API server, the internet).
    pod: Option<(&'a str, Value)>,
}

/// From whom, to whom, on which port by which protocol, and whether the design allows it.
type Flow<'a> = (&'a str, &'a Peer<'a>, &'a Peer<'a>, u16, &'a str, bool);

/// Flows of the design that the policies of these objects get wrong; `traces`: a collector is named.
pub fn violations(all: &[Value], traces: bool) -> Vec<String> {
    let Some(deployment) = named(all, "Deployment", "lathe-operator") else { return Vec::new() };
    let pods = |of: &Value| Peer {
        pod: Some((RELEASE_NAMESPACE, of["spec"]["template"]["metadata"]["labels"].clone())),
    };
    let operator = pods(deployment);
    let gateway = named(all, "Deployment", "lathe-gateway").map(pods);
    let worker =
        json!({"lathe.dev/kind": "inferenceservice", "lathe.dev/name": "shop", "lathe.dev/task": "serve"});
    let worker = Peer { pod: Some(("team", worker)) };
    let tenant = Peer { pod: Some(("team", json!({"app": "web"}))) };
    let prometheus = Peer { pod: Some(("monitoring", json!({"app": "prometheus"}))) };
    let outside = Peer { pod: None };
    let mut flows: Vec<Flow<'_>> = vec![
        ("the operator asks a worker for its report", &operator, &worker, 8081, "TCP", true),
        ("the operator uses a model", &operator, &worker, 8080, "TCP", false),
        ("the operator asks the API server", &operator, &outside, 443, "TCP", true),
        ("the operator asks the API server behind its Service", &operator, &outside, 6443, "TCP", true),
        ("the operator looks a name up", &operator, &outside, 53, "UDP", true),
        ("the operator looks a long name up", &operator, &outside, 53, "TCP", true),
        ("the operator sends traces", &operator, &outside, 4318, "TCP", traces),
        ("the operator asks a cloud for credentials", &operator, &outside, 80, "TCP", false),
        ("the operator asks a tenant's pod", &operator, &tenant, 8081, "TCP", false),
        ("Prometheus reads metrics", &prometheus, &operator, 8080, "TCP", true),
        ("a node asks the probes", &outside, &operator, 8080, "TCP", true),
        ("a tenant asks the operator for anything else", &tenant, &operator, 9090, "TCP", false),
    ];
    if let Some(gateway) = &gateway {
        flows.extend::<[Flow<'_>; 15]>([
            ("the gateway asks a model", gateway, &worker, 8080, "TCP", true),
            ("the gateway controls a worker", gateway, &worker, 8081, "TCP", false),
            ("the gateway asks the API server", gateway, &outside, 443, "TCP", true),
            ("the gateway sends traces", gateway, &outside, 4318, "TCP", traces),
            ("the gateway looks a name up", gateway, &outside, 53, "UDP", true),
            ("the gateway asks a cloud for credentials", gateway, &outside, 80, "TCP", false),
            ("the gateway asks a tenant's pod", gateway, &tenant, 8080, "TCP", false),
            ("a tenant asks the gateway", &tenant, gateway, 8080, "TCP", true),
            ("somebody outside asks the gateway", &outside, gateway, 8080, "TCP", true),
            (
                "somebody whom no value names reads the gateway's metrics",
                &prometheus,
                gateway,
                8081,
                "TCP",
                false,
            ),
            ("a tenant reads the gateway's metrics", &tenant, gateway, 8081, "TCP", false),
            ("a tenant asks the gateway for anything else", &tenant, gateway, 9090, "TCP", false),
            ("the gateway asks the operator", gateway, &operator, 8080, "TCP", false),
            ("the operator asks the gateway what flows", &operator, gateway, 8081, "TCP", true),
            ("the operator uses the gateway as a client", &operator, gateway, 8080, "TCP", false),
        ]);
    }
    let policies: Vec<&Value> = kinds(all, "NetworkPolicy").collect();
    let containers = &deployment["spec"]["template"]["spec"]["containers"];
    let wrong = flows.into_iter().filter(|(_, from, to, port, protocol, wanted)| {
        allowed(&policies, containers, from, to, *port, protocol) != *wanted
    });
    wrong
        .map(|(what, .., wanted)| format!("{what}: {}", if wanted { "is cut off" } else { "is let through" }))
        .collect()
}

/// Both ends must let it through; an end that no policy selects lets everything through.
fn allowed(
    policies: &[&Value],
    containers: &Value,
    from: &Peer<'_>,
    to: &Peer<'_>,
    port: u16,
    protocol: &str,
) -> bool {
    let end = |own: &Peer<'_>, other: &Peer<'_>, direction: &str, list: &str, peers: &str| {
        let selecting: Vec<&&Value> = policies
            .iter()
            .filter(|policy| {
                selects(policy, own)
                    && policy["spec"]["policyTypes"].as_array().is_some_and(|t| t.contains(&direction.into()))
            })
            .collect();
        let rules = |policy: &&&Value| policy["spec"][list].as_array().cloned().unwrap_or_default();
        selecting.is_empty()
            || selecting.iter().flat_map(rules).any(|rule| {
                let policy_namespace = RELEASE_NAMESPACE;
                let who = rule[peers]
                    .as_array()
                    .is_none_or(|all| all.iter().any(|peer| is(peer, other, policy_namespace)));
                let door = rule["ports"].as_array().is_none_or(|all| {
                    all.iter().any(|p| {
                        p["protocol"] == protocol && number(&p["port"], containers) == Some(port.into())
                    })
                });
                who && door
            })
    };
    end(from, to, "Egress", "egress", "to") && end(to, from, "Ingress", "ingress", "from")
}

fn selects(policy: &Value, peer: &Peer<'_>) -> bool {
    let Some((namespace, labels)) = &peer.pod else { return false };
    policy["metadata"]["namespace"] == *namespace && selector(&policy["spec"]["podSelector"], labels)
}

/// Whether a peer of a rule means this one.
fn is(peer: &Value, other: &Peer<'_>, policy_namespace: &str) -> bool {
    // An address block is none of ours.
    let Some((namespace, labels)) = &other.pod else { return false };
    let place = match &peer["namespaceSelector"] {
        Value::Null => *namespace == policy_namespace,
        of => selector(of, &json!({"kubernetes.io/metadata.name": namespace})),
    };
    place && (peer["podSelector"].is_null() || selector(&peer["podSelector"], labels))
}

fn selector(selector: &Value, labels: &Value) -> bool {
    let expression = |e: &Value| {
        let value = &labels[e["key"].as_str().unwrap_or_default()];
        match e["operator"].as_str() {
            Some("Exists") => !value.is_null(),
            Some("In") => e["values"].as_array().is_some_and(|values| values.contains(value)),
            // Nothing else is used.
            _ => false,
        }
    };
    matches(&selector["matchLabels"], labels)
        && selector["matchExpressions"].as_array().into_iter().flatten().all(expression)
}

/// A port's number; a name is looked up in the pod's containers.
fn number(port: &Value, containers: &Value) -> Option<u64> {
    let Some(name) = port.as_str() else { return port.as_u64() };
    let ports = containers.as_array()?.iter().flat_map(|c| c["ports"].as_array().into_iter().flatten());
    ports.into_iter().find(|p| p["name"] == name)?["containerPort"].as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(egress: &Value, ingress: &Value) -> Vec<Value> {
        vec![
            json!({"kind": "Deployment", "metadata": {"name": "lathe-operator"}, "spec": {"template": {
                "metadata": {"labels": {"app": "operator"}},
                "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]}}}}),
            json!({"kind": "NetworkPolicy", "metadata": {"name": "n", "namespace": RELEASE_NAMESPACE}, "spec": {
                "podSelector": {"matchLabels": {"app": "operator"}}, "policyTypes": ["Ingress", "Egress"],
                "egress": egress, "ingress": ingress}}),
        ]
    }

    fn good() -> (Value, Value) {
        let tcp = |port: u16| json!({"port": port, "protocol": "TCP"});
        let egress = json!([
            {"ports": [{"port": 53, "protocol": "UDP"}, tcp(53), tcp(443), tcp(6443)]},
            {"to": [{"namespaceSelector": {}, "podSelector": {"matchExpressions": [{"key": "lathe.dev/kind", "operator": "Exists"}]}}],
             "ports": [tcp(8081)]},
        ]);
        (egress, json!([{"ports": [{"port": "http", "protocol": "TCP"}]}]))
    }

    #[test]
    fn the_flows_of_the_design_pass() {
        let (egress, ingress) = good();
        assert_eq!(violations(&objects(&egress, &ingress), false), Vec::<String>::new());
    }

    #[test]
    fn a_flow_that_is_cut_off_or_let_through_by_mistake_is_told() {
        let (egress, ingress) = good();
        let with = |egress: &Value, ingress: &Value| violations(&objects(egress, ingress), false);
        let mut nobody = egress.clone();
        nobody[1]["to"][0]["podSelector"] = json!({"matchLabels": {"lathe.dev/kind": "model"}});
        assert_eq!(with(&nobody, &ingress), ["the operator asks a worker for its report: is cut off"]);
        let mut own_namespace = egress.clone();
        own_namespace[1]["to"][0]["namespaceSelector"] = Value::Null;
        assert_eq!(with(&own_namespace, &ingress), ["the operator asks a worker for its report: is cut off"]);
        let mut anyone = egress.clone();
        anyone[1]["to"] = Value::Null;
        assert_eq!(with(&anyone, &ingress), ["the operator asks a tenant's pod: is let through"]);
        assert_eq!(with(&json!([{}]), &ingress).len(), 4);
        assert_eq!(with(&egress, &json!([])).len(), 2);
        assert_eq!(
            with(&egress, &json!([{}])),
            ["a tenant asks the operator for anything else: is let through"]
        );
    }
}
