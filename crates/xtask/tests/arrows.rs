//! Crates depend on each other only as docs/architecture.md says.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Every crate of ours that another one may use; `xtask` and `lathe-e2e` may use any.
const ARROWS: [(&str, &[&str]); 13] = [
    ("lathe-api", &[]),
    ("lathe-plan", &[]),
    ("lathe-contract", &[]),
    ("lathe-resolve", &["lathe-api", "lathe-plan", "lathe-contract"]),
    (
        "lathe-operator",
        &["lathe-api", "lathe-plan", "lathe-contract", "lathe-resolve", "lathe-scaling", "lathe-telemetry"],
    ),
    ("lathe-scaling", &[]),
    ("lathe-http", &[]),
    ("lathe-telemetry", &[]),
    ("lathe-gateway", &["lathe-api", "lathe-contract", "lathe-http", "lathe-telemetry"]),
    ("lathe-source", &[]),
    ("lathe-engine", &["lathe-plan"]),
    (
        "lathe-worker",
        &["lathe-engine", "lathe-plan", "lathe-source", "lathe-contract", "lathe-http", "lathe-telemetry"],
    ),
    ("lathe-cli", &["lathe-api", "lathe-plan", "lathe-source", "lathe-contract", "lathe-resolve"]),
];

/// What must never reach a program, through any dependency.
const NEVER: [(&str, &[&str]); 4] = [
    ("lathe-worker", &["kube", "k8s-openapi"]),
    ("lathe-engine", &["kube", "k8s-openapi", "tokio", "hyper", "reqwest", "axum"]),
    ("lathe-operator", &["lathe-engine", "lathe-source", "tokenizers"]),
    ("lathe-gateway", &["lathe-engine", "lathe-source", "tokenizers"]),
];

fn metadata(more: &[&str]) -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .args(more)
        .current_dir(xtask::paths::repository())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn our_crates_depend_on_each_other_as_the_architecture_says() {
    let allowed: BTreeMap<_, _> = ARROWS.into_iter().collect();
    let metadata = metadata(&["--no-deps"]);
    let packages = metadata["packages"].as_array().unwrap();
    let names: Vec<&str> = packages.iter().map(|p| p["name"].as_str().unwrap()).collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap();
        if ["xtask", "lathe-e2e"].contains(&name) {
            continue;
        }
        let Some(allowed) = allowed.get(name) else {
            wrong.push(format!("{name} has no arrows in this test"));
            continue;
        };
        let used = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"] != "dev");
        for used in
            used.filter_map(|d| d["name"].as_str()).filter(|d| names.contains(d) && !allowed.contains(d))
        {
            wrong.push(format!("{name} must not use {used}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_must_never_reach_a_program_does_not() {
    let metadata = metadata(&[]);
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| (n["id"].as_str().unwrap(), n))
        .collect();
    let name_of: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| (p["id"].as_str().unwrap(), p["name"].as_str().unwrap()))
        .collect();
    for (program, never) in NEVER {
        let start = name_of.iter().find(|(_, name)| **name == program).map(|(id, _)| *id).unwrap();
        let (mut seen, mut open) = (Vec::new(), vec![start]);
        while let Some(id) = open.pop() {
            if seen.contains(&id) {
                continue;
            }
            seen.push(id);
            let normal =
                |dep: &&Value| dep["dep_kinds"].as_array().unwrap().iter().any(|k| k["kind"].is_null());
            let deps = nodes[id]["deps"].as_array().unwrap();
            open.extend(deps.iter().filter(normal).map(|d| d["pkg"].as_str().unwrap()));
        }
        assert!(seen.len() > 1, "{program} has no dependencies: the graph was not read");
        let reached: Vec<_> = seen.iter().map(|id| name_of[id]).filter(|name| never.contains(name)).collect();
        assert!(reached.is_empty(), "{program} reaches {reached:?}");
    }
}
