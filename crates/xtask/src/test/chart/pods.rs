//! Pods of the release: under the `restricted` standard, and found by what selects them.

use serde_json::{Value, json};

use super::objects::{key, kinds, matches, name, named};

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
    let pods = |owner: &Value| owner["spec"]["template"]["metadata"]["labels"].clone();
    for (kind, path) in [
        ("Deployment", "/spec/selector/matchLabels"),
        ("Service", "/spec/selector"),
        ("PodDisruptionBudget", "/spec/selector/matchLabels"),
        ("NetworkPolicy", "/spec/podSelector/matchLabels"),
    ] {
        for object in kinds(all, kind) {
            let selector = object.pointer(path).unwrap_or(&Value::Null);
            // What has the name of a Deployment is for its pods, and for no others of the release; so is a Service of its metrics.
            let whose = name(object).trim_end_matches("-metrics");
            let own = named(all, "Deployment", whose).map(pods);
            if !selector.is_object() || !own.is_some_and(|labels| matches(selector, &labels)) {
                wrong.push(format!("{} does not select the pods of its name: {selector}", key(object)));
            }
            let others = kinds(all, "Deployment").chain(kinds(all, "Job"));
            for other in others.filter(|other| name(other) != whose) {
                if matches(selector, &pods(other)) {
                    wrong.push(format!("{} selects pods of {} too: {selector}", key(object), key(other)));
                }
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
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        require(&format!("{field} is set"), spec[field].is_null());
    }
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        require(&format!("volume {} is no Secret", name_of(volume)), volume["secret"].is_object());
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
    fn a_budget_that_holds_pods_of_another_program_is_found() {
        let mut gateway = deployment();
        gateway["metadata"]["name"] = json!("lathe-gateway");
        let budget = json!({"kind": "PodDisruptionBudget", "metadata": {"name": "lathe-gateway"}, "spec": {"selector": {"matchLabels": {"app": "a"}}}});
        let found = violations(&[deployment(), gateway, account(), budget]);
        // Both Deployments select each other's pods as well.
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[2].starts_with("PodDisruptionBudget"), "{found:?}");
    }

    #[test]
    fn a_monitor_without_a_service_is_found() {
        let monitor = json!({"kind": "ServiceMonitor", "metadata": {"name": "m"}, "spec": {"selector": {"matchLabels": {"app": "a"}}}});
        let service = json!({"kind": "Service", "metadata": {"name": "lathe-operator", "labels": {"app": "a"}}, "spec": {"selector": {"app": "a"}}});
        assert_eq!(violations(&[deployment(), account(), monitor.clone()]).len(), 1);
        assert_eq!(violations(&[deployment(), account(), monitor, service]), Vec::<String>::new());
    }
}
