//! Whether workers run that trust the operator's keys, written beside these keys. What cleans up after an uninstall reads it there:
//! it needs no right in the namespaces of others, of which some may be gone.
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    core::PartialObjectMeta,
    runtime::reflector::Store,
};
use lathe_api::names;
use serde_json::json;
use tokio::sync::Notify;

use crate::{
    context::Context,
    keys, pods,
    runtime::{Stop, stopped},
};

/// Annotation of the keys' Secret while there are workers that trust them.
pub const TRUSTED: &str = "lathe.dev/workers";
/// Workers that answer to the operator's key.
const TASKS: [&str; 2] = ["serve", "train"];
/// What could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// The pods of all scopes, as the watches see them.
#[derive(Default)]
pub struct Workers {
    pods: Mutex<Vec<Store<Pod>>>,
    changed: Notify,
}

impl Workers {
    /// These pods count too.
    pub fn include(&self, pods: Store<Pod>) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).push(pods);
    }

    /// A pod came, went or changed.
    pub fn look(&self) {
        self.changed.notify_one();
    }

    fn any(&self) -> bool {
        self.pods
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .any(|pods| pods.state().iter().any(|p| works(p)))
    }
}

fn works(pod: &Pod) -> bool {
    let task = pod.labels().get(names::LABEL_TASK);
    task.is_some_and(|task| TASKS.contains(&task.as_str())) && !pods::is_over(pod)
}

/// Keeps the annotation true until `stop`.
pub async fn tell(context: &Context, stop: Stop) {
    let telling = async {
        let mut told = None;
        loop {
            once(context, &mut told).await;
            // A change, or what a round could not do.
            let _ = tokio::time::timeout(AGAIN, context.workers.changed.notified()).await;
        }
    };
    tokio::select! {
        () = telling => {}
        () = stopped(stop) => {}
    }
}

/// `told`: what stands there as far as this process knows.
async fn once(context: &Context, told: &mut Option<bool>) {
    // Caches that are not filled yet know of nobody.
    if context.health.missing().is_some() {
        return;
    }
    let any = context.workers.any();
    if *told == Some(any) {
        return;
    }
    let (namespace, value) = (&context.config.release_namespace, any.then_some("true"));
    let api: Api<PartialObjectMeta<Secret>> = Api::namespaced(context.client.clone(), namespace);
    let params =
        PatchParams { field_manager: Some(names::FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let patch = Patch::Merge(json!({"metadata": {"annotations": {TRUSTED: value}}}));
    match api.patch(keys::SECRET, &params, &patch).await {
        Ok(_) => *told = Some(any),
        Err(error) => {
            tracing::warn!(%error, "whether workers trust the keys could not be written beside them")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::testing::{Server, context, filled, object, paths};

    const SECRET: &str = "PATCH /api/v1/namespaces/lathe-system/secrets/lathe-keys";

    fn pod(task: &str, phase: &str) -> Pod {
        object(json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"lathe.dev/task": task}}, "status": {"phase": phase},
        }))
    }

    #[tokio::test]
    async fn it_is_told_once_and_only_of_workers() {
        let there = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": {"name": "lathe-keys"}});
        let (client, server) = Server::start(&[(SECRET, 200, there)]);
        let context = context(client);
        let mut told = None;
        context.workers.include(filled(vec![pod("inspect", "Running"), pod("train", "Succeeded")]));
        once(&context, &mut told).await;
        assert_eq!(told, None, "not ready: nobody knows");
        context.health.has("api");
        for _ in 0..2 {
            once(&context, &mut told).await;
            assert_eq!(told, Some(false));
        }
        context.workers.include(filled(vec![pod("serve", "Pending")]));
        for _ in 0..2 {
            once(&context, &mut told).await;
            assert_eq!(told, Some(true));
        }
        drop(context);
        let calls = server.calls().await;
        assert_eq!(paths(&calls), [SECRET, SECRET]);
        let values: Vec<&Value> =
            calls.iter().map(|(_, body)| &body["metadata"]["annotations"][TRUSTED]).collect();
        assert_eq!(values, [&Value::Null, &json!("true")]);
    }

    #[tokio::test]
    async fn what_could_not_be_written_is_not_told() {
        let (client, _server) = Server::start(&[(SECRET, 403, crate::testing::failure(403, "Forbidden"))]);
        let context = context(client);
        context.health.has("api");
        let mut told = None;
        once(&context, &mut told).await;
        assert_eq!(told, None);
    }
}
