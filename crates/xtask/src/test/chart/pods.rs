//! Pods of the release: under the `restricted` standard, and found by what selects them.

use serde_json::{Value, json};

use super::objects::{key, kinds, matches, named};

/// Everything that is wrong with the release's pods, and with what points at them.
pub fn violations(all: &[Value]) -> Vec<String> {
    let mut wrong = Vec::new();
    for owner in kinds(all, "Deployment").chain(kinds(all, "Job")) {
        let spec = &owner["spec"]["template"]["spec"];
        wrong.extend(unrestricted(spec).into_iter().map(|what| format!("{}: {what}", key(owner))));
        let account = spec["serviceAccountName"].as_str().unwrap_or("default");
        if named(all, "ServiceAccount", account).is_none() {
            wrong.push(format!("{}: no ServiceAccount {account}", key(owner)));
        }
    }
    let Some(operator) = named(all, "Deployment", "lathe-operator") else {
        wrong.push("there is no Deployment lathe-operator".to_owned());
        return wrong;
    };
    let labels = &operator["spec"]["template"]["metadata"]["labels"];
    for (kind, path) in [
        ("Deployment", "/spec/selector/matchLabels"),
        ("Service", "/spec/selector"),
        ("PodDisruptionBudget", "/spec/selector/matchLabels"),
        ("NetworkPolicy", "/spec/podSelector/matchLabels"),
    ] {
        for object in kinds(all, kind) {
            let selector = object.pointer(path).unwrap_or(&Value::Null);
            let cleanup = kinds(all, "Job").map(|job| &job["spec"]["template"]["metadata"]["labels"]);
            if !selector.is_object() || !matches(selector, labels) {
                wrong.push(format!("{} does not select the operator's pods: {selector}", key(object)));
            }
            if cleanup.into_iter().any(|labels| matches(selector, labels)) {
                wrong.push(format!("{} selects the clean-up's pod too: {selector}", key(object)));
            }
        }
    }
    for monitor in kinds(all, "ServiceMonitor") {
        let selector = &monitor["spec"]["selector"]["matchLabels"];
        if !kinds(all, "Service").any(|service| matches(selector, &service["metadata"]["labels"])) {
            wrong.push(format!("{} selects no Service: {selector}", key(monitor)));
        }
    }
    wrong
}

/// What the `restricted` standard would refuse, and what else our pods never do.
fn unrestricted(spec: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut require = |what: &str, is: bool| {
        if !is {
            wrong.push(what.to_owned());
        }
    };
    for field in ["hostNetwork", "hostPID", "hostIPC", "volumes"] {
        require(&format!("{field} is set"), spec[field].is_null());
    }
    let pod = &spec["securityContext"];
    require("runAsNonRoot is not set", pod["runAsNonRoot"] == true);
    require("no seccomp profile", pod["seccompProfile"]["type"] == "RuntimeDefault");
    let containers = spec["containers"].as_array().cloned().unwrap_or_default();
    require("no container", !containers.is_empty());
    for container in &containers {
        let security = &container["securityContext"];
        let mut require = |what: &str, is: bool| require(&format!("{what} ({})", name_of(container)), is);
        require("privileges may grow", security["allowPrivilegeEscalation"] == false);
        require("the root is writable", security["readOnlyRootFilesystem"] == true);
        require("capabilities are kept", security["capabilities"] == json!({"drop": ["ALL"]}));
        require("no memory limit", !container["resources"]["limits"]["memory"].is_null());
        require("no memory request", !container["resources"]["requests"]["memory"].is_null());
    }
    wrong
}

fn name_of(container: &Value) -> &str {
    container["name"].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment() -> Value {
        json!({"kind": "Deployment", "metadata": {"name": "lathe-operator"}, "spec": {
            "selector": {"matchLabels": {"app": "a"}},
            "template": {"metadata": {"labels": {"app": "a"}}, "spec": {
                "serviceAccountName": "s",
                "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{"name": "c",
                    "resources": {"requests": {"memory": "1Mi"}, "limits": {"memory": "1Mi"}},
                    "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}}}],
            }},
        }})
    }

    fn account() -> Value {
        json!({"kind": "ServiceAccount", "metadata": {"name": "s"}})
    }

    #[test]
    fn a_pod_that_is_less_than_restricted_is_found() {
        assert_eq!(violations(&[deployment(), account()]), Vec::<String>::new());
        for (path, value) in [
            ("/spec/template/spec/securityContext/runAsNonRoot", json!(false)),
            ("/spec/template/spec/containers/0/securityContext/capabilities", json!({})),
            ("/spec/template/spec/serviceAccountName", json!("other")),
            ("/spec/selector/matchLabels", json!({"app": "b"})),
        ] {
            let mut changed = deployment();
            *changed.pointer_mut(path).unwrap_or(&mut Value::Null) = value;
            assert_eq!(violations(&[changed, account()]).len(), 1, "{path}");
        }
    }

    #[test]
    fn a_monitor_without_a_service_is_found() {
        let monitor = json!({"kind": "ServiceMonitor", "metadata": {"name": "m"}, "spec": {"selector": {"matchLabels": {"app": "a"}}}});
        let service = json!({"kind": "Service", "metadata": {"name": "v", "labels": {"app": "a"}}, "spec": {"selector": {"app": "a"}}});
        assert_eq!(violations(&[deployment(), account(), monitor.clone()]).len(), 1);
        assert_eq!(violations(&[deployment(), account(), monitor, service]), Vec::<String>::new());
    }
}
