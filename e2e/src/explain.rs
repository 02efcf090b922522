//! What a failed test leaves: on the screen what explains it, in a folder beside the test programs everything else, since the
//! next test takes the namespace.
use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, ListParams, LogParams},
    discovery::{Discovery, Scope, verbs},
};
use serde_json::Value;

use crate::{RELEASE_NAMESPACE, programs};

/// Last lines of each log on the screen; the files have them whole.
const LINES: usize = 60;
/// Kinds whose status is shown; the files have every kind.
const SHOWN: [&str; 8] = [
    "Model",
    "FineTuneJob",
    "InferenceService",
    "Job",
    "Deployment",
    "PersistentVolumeClaim",
    "Service",
    "Namespace",
];

/// Shows and keeps what is in a namespace, and in the operator's.
pub async fn explain(client: &Client, namespace: &str) {
    let folder = match folder(namespace) {
        Ok(folder) => folder,
        Err(error) => {
            eprintln!("what there is cannot be kept: {error:#}");
            std::env::temp_dir()
        }
    };
    for name in [namespace, RELEASE_NAMESPACE] {
        eprintln!("\n---- namespace {name}");
        if let Err(error) = of_namespace(client, name, &folder.join(name)).await {
            eprintln!("what is there cannot be told: {error:#}");
        }
    }
    eprintln!("\n---- all of it: {}", folder.display());
}

/// Empty, and of this test alone.
fn folder(namespace: &str) -> Result<PathBuf> {
    let folder = programs::folder()?.join("e2e-failed").join(namespace);
    if folder.is_dir() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

async fn of_namespace(client: &Client, namespace: &str, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut all = objects(client, namespace).await?;
    let (mut events, rest): (Vec<_>, Vec<_>) = all.drain(..).partition(|object| kind(object) == "Event");
    for object in &rest {
        let name = format!("{}-{}.json", kind(object), object.name_any());
        fs::write(folder.join(name), serde_json::to_vec_pretty(object)?)?;
        if SHOWN.contains(&kind(object)) {
            eprintln!("-- {} {}: {:#}", kind(object), object.name_any(), object.data["status"]);
        }
    }
    logs(&Api::namespaced(client.clone(), namespace), folder).await?;
    events.sort_by_key(happened);
    let lines: Vec<String> = events.iter().map(line).collect();
    let text = lines.join("\n");
    eprintln!("-- events\n{text}");
    fs::write(folder.join("events.txt"), text)?;
    Ok(())
}

fn kind(object: &DynamicObject) -> &str {
    object.types.as_ref().map_or("", |types| types.kind.as_str())
}

/// Every object of a namespace but Secrets, and the Namespace itself: its status says what a deletion waits for.
async fn objects(client: &Client, namespace: &str) -> Result<Vec<DynamicObject>> {
    let mut all = Vec::new();
    for group in Discovery::new(client.clone()).run().await?.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let listed = capabilities.supports_operation(verbs::LIST) && resource.kind != "Secret";
            // Events are served by two groups.
            let again = resource.kind == "Event" && !resource.group.is_empty();
            if !listed || again {
                continue;
            }
            let found = match capabilities.scope {
                Scope::Namespaced => {
                    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
                    api.list(&ListParams::default()).await?.items
                }
                Scope::Cluster if resource.kind == "Namespace" => {
                    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
                    api.get_opt(namespace).await?.into_iter().collect()
                }
                Scope::Cluster => continue,
            };
            all.extend(found.into_iter().map(|mut object| {
                object.metadata.managed_fields = None;
                // A list's items do not say what they are.
                object.types = Some(kube::core::TypeMeta {
                    api_version: resource.api_version.clone(),
                    kind: resource.kind.clone(),
                });
                object
            }));
        }
    }
    Ok(all)
}

/// When it was seen last; those of the newer API have no `lastTimestamp`.
fn happened(event: &DynamicObject) -> String {
    let data = &event.data;
    let times = [&data["series"]["lastObservedTime"], &data["lastTimestamp"], &data["eventTime"]];
    times.into_iter().find_map(Value::as_str).unwrap_or_default().to_owned()
}

fn line(event: &DynamicObject) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (data, of) = (&event.data, &event.data["involvedObject"]);
    let (kind, name) = (text(&of["kind"]), text(&of["name"]));
    let count = data["count"].as_i64().or(data["series"]["count"].as_i64()).unwrap_or(1);
    let (type_, reason, message) = (text(&data["type"]), text(&data["reason"]), text(&data["message"]));
    format!("{} {type_} {kind} {name} {reason} (x{count}): {message}", happened(event))
}

async fn logs(pods: &Api<Pod>, folder: &Path) -> Result<()> {
    for pod in pods.list(&ListParams::default()).await? {
        let name = pod.name_any();
        let status = pod.status.unwrap_or_default();
        let containers = status.container_statuses.unwrap_or_default();
        eprintln!("-- pod {name}: {}", status.phase.unwrap_or_default());
        for container in &containers {
            let (state, last) =
                (serde_json::to_string(&container.state)?, serde_json::to_string(&container.last_state)?);
            let (name, restarts) = (&container.name, container.restart_count);
            eprintln!("{name}: {restarts} restarts, is {state}, was {last}");
        }
        let restarted = containers.iter().any(|container| container.restart_count > 0);
        for previous in [true, false].into_iter().filter(|previous| !previous || restarted) {
            let log = LogParams { previous, ..LogParams::default() };
            let text = pods.logs(&name, &log).await.unwrap_or_else(|error| format!("no log: {error}"));
            let run = if previous { "before." } else { "" };
            fs::write(folder.join(format!("{name}.{run}log")), &text)?;
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES)..];
            eprintln!("{}{}", if previous { "(the run before)\n" } else { "" }, last.join("\n"));
        }
    }
    Ok(())
}
