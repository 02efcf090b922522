//! What roles grant: never more than one name of a Secret, never everything, nothing that goes unsaid.

use serde_json::Value;

use super::objects::{RELEASE_NAMESPACE, key, kinds, name, strings};

/// Kinds that users may write by the aggregated roles.
const USERS_KINDS: [&str; 4] = ["models", "finetunejobs", "inferenceservices", "inferenceservices/scale"];
/// Resources that are named one by one, but for making them.
const BY_NAME: [&str; 2] = ["secrets", "leases"];
const READING: [&str; 3] = ["get", "list", "watch"];
/// Whoever holds one of these can take more.
const ESCALATING: [&str; 4] = ["*", "escalate", "bind", "impersonate"];

/// True where a role speaks of this resource.
pub fn grants(role: &Value, resource: &str) -> bool {
    rules(role).any(|rule| strings(&rule["resources"]).contains(&resource))
}

/// Everything that is wrong with the roles and bindings.
pub fn violations(all: &[Value], namespaced: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for role in kinds(all, "ClusterRole").chain(kinds(all, "Role")) {
        for rule in rules(role) {
            let problems = problems(role, rule, namespaced);
            wrong.extend(problems.into_iter().map(|problem| format!("{}: {problem}: {rule}", key(role))));
        }
    }
    for binding in kinds(all, "ClusterRoleBinding").chain(kinds(all, "RoleBinding")) {
        let subjects = binding["subjects"].as_array().cloned().unwrap_or_default();
        let account = |subject: &Value| {
            subject["kind"] == "ServiceAccount"
                && subject["namespace"] == RELEASE_NAMESPACE
                && kinds(all, "ServiceAccount").any(|account| subject["name"] == name(account))
        };
        if subjects.len() != 1 || !subjects.iter().all(account) {
            wrong.push(format!("{}: not for one account of the release: {subjects:?}", key(binding)));
        }
        let role = &binding["roleRef"];
        let same = |found: &&Value| {
            found["kind"] == role["kind"]
                && found["metadata"]["name"] == role["name"]
                && (found["kind"] == "ClusterRole"
                    || found["metadata"]["namespace"] == binding["metadata"]["namespace"])
        };
        if !all.iter().any(|object| same(&object)) {
            wrong.push(format!("{}: no such role: {role}", key(binding)));
        }
    }
    wrong
}

fn problems(role: &Value, rule: &Value, namespaced: bool) -> Vec<&'static str> {
    let (groups, resources) = (strings(&rule["apiGroups"]), strings(&rule["resources"]));
    let (verbs, names) = (strings(&rule["verbs"]), rule["resourceNames"].as_array());
    let mut found = Vec::new();
    let mut deny = |is: bool, what| {
        if is {
            found.push(what);
        }
    };
    let cluster = role["kind"] == "ClusterRole";
    deny(cluster && resources.contains(&"secrets"), "a right on Secrets of every namespace");
    deny(groups.contains(&"*") || resources.iter().any(|r| r.contains('*')), "a right on everything");
    deny(verbs.iter().any(|verb| ESCALATING.contains(verb)), "a verb that gives more than it says");
    deny(resources.iter().any(|r| r.ends_with("/finalizers")), "a right that nothing needs");
    deny(
        resources.iter().any(|r| ["pods/exec", "pods/attach", "serviceaccounts/token"].contains(r)),
        "a way into pods",
    );
    // An empty list of names means all of them.
    deny(names.is_some_and(Vec::is_empty), "an empty resourceNames, which means every name");
    let nameless = names.is_none_or(Vec::is_empty);
    let by_name = resources.iter().any(|r| BY_NAME.contains(r));
    deny(by_name && nameless && verbs != ["create"], "a right on every name of what is named one by one");
    let aggregated = role["metadata"]["labels"]
        .as_object()
        .is_some_and(|labels| labels.keys().any(|label| label.contains("/aggregate-to-")));
    let reads = verbs.iter().all(|verb| READING.contains(verb));
    deny(
        aggregated && !reads && !resources.iter().all(|r| USERS_KINDS.contains(r)),
        "users would write what is not theirs",
    );
    let shared = resources.iter().all(|r| ["acceleratorprofiles", "nodes"].contains(r));
    deny(
        namespaced && cluster && !aggregated && !(reads && shared),
        "an operator of some namespaces would reach beyond them",
    );
    deny(resources.is_empty() || verbs.is_empty(), "a rule that grants nothing");
    found
}

/// Rules of the text without a comment on the line before.
pub fn uncommented(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let rule = |at: &usize| lines[*at].trim_start().starts_with("- apiGroups:");
    let explained = |at: &usize| *at > 0 && lines[at - 1].trim_start().starts_with("# ");
    (0..lines.len())
        .filter(|at| rule(at) && !explained(at))
        .map(|at| {
            format!(
                "line {}: a rule without a reason: {}",
                at + 1,
                lines[at..].iter().take(3).copied().collect::<Vec<_>>().join(" ")
            )
        })
        .collect()
}

fn rules(role: &Value) -> impl Iterator<Item = &Value> {
    role["rules"].as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn role(kind: &str, rule: &Value) -> Value {
        json!({"kind": kind, "metadata": {"name": "r", "labels": {}}, "rules": [rule]})
    }

    fn wrong(kind: &str, rule: &Value, namespaced: bool) -> bool {
        !violations(&[role(kind, rule)], namespaced).is_empty()
    }

    #[test]
    fn rights_that_reach_too_far_are_found() {
        let secrets = |verbs: &[&str], names: Value| json!({"apiGroups": [""], "resources": ["secrets"], "verbs": verbs, "resourceNames": names});
        assert!(wrong("ClusterRole", &secrets(&["get"], json!(["one"])), false));
        assert!(wrong("Role", &secrets(&["get"], json!([])), false), "an empty list means all");
        assert!(wrong("Role", &secrets(&["get"], Value::Null), false));
        assert!(!wrong("Role", &secrets(&["get"], json!(["one"])), false));
        assert!(!wrong("Role", &secrets(&["create"], Value::Null), false));
        let nodes = json!({"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]});
        let jobs = json!({"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list"]});
        assert!(!wrong("ClusterRole", &nodes, true) && !wrong("ClusterRole", &jobs, false));
        assert!(wrong("ClusterRole", &jobs, true));
        let every = json!({"apiGroups": [""], "resources": ["*"], "verbs": ["list"]});
        assert!(wrong("Role", &every, false));
        let finalizers =
            json!({"apiGroups": ["lathe.dev"], "resources": ["models/finalizers"], "verbs": ["update"]});
        assert!(wrong("Role", &finalizers, false));
    }

    #[test]
    fn aggregated_roles_write_users_kinds_alone() {
        let of = |resource: &str, verb: &str| {
            let rule = json!({"apiGroups": ["lathe.dev"], "resources": [resource], "verbs": [verb]});
            let mut role = role("ClusterRole", &rule);
            role["metadata"]["labels"] = json!({"rbac.authorization.k8s.io/aggregate-to-edit": "true"});
            violations(&[role], true).is_empty()
        };
        assert!(of("models", "create") && of("acceleratorprofiles", "list"));
        assert!(!of("models/status", "patch") && !of("acceleratorprofiles", "create"));
    }

    #[test]
    fn bindings_are_for_accounts_of_the_release_and_roles_that_exist() {
        let binding = |namespace: &str, role: &str| {
            json!({"kind": "ClusterRoleBinding", "metadata": {"name": "b"},
                "roleRef": {"kind": "ClusterRole", "name": role},
                "subjects": [{"kind": "ServiceAccount", "name": "a", "namespace": namespace}]})
        };
        let account = json!({"kind": "ServiceAccount", "metadata": {"name": "a"}});
        let rule = json!({"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]});
        let with =
            |binding: Value| violations(&[role("ClusterRole", &rule), account.clone(), binding], false);
        assert!(with(binding(RELEASE_NAMESPACE, "r")).is_empty());
        assert_eq!(with(binding("other", "r")).len(), 1);
        assert_eq!(with(binding(RELEASE_NAMESPACE, "none")).len(), 1);
    }

    #[test]
    fn a_rule_needs_a_comment() {
        let text =
            "rules:\n  # Why.\n  - apiGroups: [a]\n    verbs: [b]\n  - apiGroups: [c]\n    verbs: [d]\n";
        let found = uncommented(text);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("line 5:"), "{found:?}");
    }
}
