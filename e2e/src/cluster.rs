//! A cluster, and a namespace of it for one test.
use std::{
    panic::{AssertUnwindSafe, resume_unwind},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use futures::FutureExt as _;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
    core::GroupVersionKind,
    discovery,
};
use serde_json::{Value, json};

use crate::explain::explain;

/// Field manager of what tests apply.
const MANAGER: &str = "lathe-e2e";
/// Label of a namespace that a failed test left.
const FAILED: &str = "lathe-e2e-failed";
/// Long enough for a training on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(600);

/// A client and the namespace of one test.
#[derive(Clone)]
pub struct Session {
    /// The administrator's client.
    pub client: Client,
    /// The namespace.
    pub namespace: String,
}

impl Session {
    /// Connects to the cluster of `KUBECONFIG` and makes a fresh namespace, under the `restricted` standard.
    ///
    /// # Errors
    /// The cluster does not answer.
    pub async fn begin(name: &str) -> Result<Self> {
        // An error says that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client =
            Client::try_default().await.context("no cluster: run `cargo xtask test`, or set KUBECONFIG")?;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        // What a failed test left for a look must not take the room of this one.
        let failed = namespaces.list(&ListParams::default().labels(FAILED)).await?;
        let mut left: Vec<String> = failed.iter().map(ResourceExt::name_any).collect();
        left.push(name.to_owned());
        for name in left {
            remove(&namespaces, &name).await?;
        }
        let object = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        });
        namespaces.patch(name, &PatchParams::apply(MANAGER), &Patch::Apply(object)).await?;
        Ok(Self { client, namespace: name.to_owned() })
    }

    /// Runs a test; where it fails or panics, shows and keeps the objects, events and logs that explain it.
    ///
    /// # Errors
    /// The test's own.
    pub async fn run<T>(&self, test: impl Future<Output = Result<T>>) -> Result<T> {
        let ended = AssertUnwindSafe(test).catch_unwind().await;
        if !matches!(ended, Ok(Ok(_))) {
            explain(&self.client, &self.namespace).await;
            let namespaces: Api<Namespace> = Api::all(self.client.clone());
            let mark = Patch::Merge(json!({"metadata": {"labels": {FAILED: "true"}}}));
            if let Err(error) = namespaces.patch(&self.namespace, &PatchParams::default(), &mark).await {
                eprintln!("namespace {} cannot be marked: {error}", self.namespace);
            }
        }
        ended.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Removes the namespace and waits until it is gone: no finalizer may be stuck. Where one is, what is left is shown.
    ///
    /// # Errors
    /// It is still there after some minutes.
    pub async fn end(&self) -> Result<()> {
        self.run(remove(&Api::all(self.client.clone()), &self.namespace)).await
    }

    /// Applies an object of any kind, in this namespace where the kind has one.
    ///
    /// # Errors
    /// The API server refuses it.
    pub async fn apply(&self, object: &Value) -> Result<DynamicObject> {
        let (api, name) = self.api_of(object).await?;
        Ok(api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(object)).await?)
    }

    /// An API for a kind.
    ///
    /// # Errors
    /// The API server does not know the kind.
    pub async fn api(&self, api_version: &str, kind: &str) -> Result<Api<DynamicObject>> {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let gvk = GroupVersionKind::gvk(group, version, kind);
        let (resource, capabilities): (ApiResource, _) = discovery::pinned_kind(&self.client, &gvk).await?;
        Ok(match capabilities.scope {
            discovery::Scope::Namespaced => {
                Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
            }
            discovery::Scope::Cluster => Api::all_with(self.client.clone(), &resource),
        })
    }

    async fn api_of(&self, object: &Value) -> Result<(Api<DynamicObject>, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let api = self.api(&text(&object["apiVersion"]), &text(&object["kind"])).await?;
        Ok((api, text(&object["metadata"]["name"])))
    }

    /// Waits until a Lathe object's condition has this status, and returns the object as JSON.
    ///
    /// # Errors
    /// It does not come to that; the text holds the last conditions.
    pub async fn wait(&self, kind: &str, name: &str, type_: &str, status: &str) -> Result<Value> {
        let what = format!("{type_} is not {status}");
        let settled = |object: &Value| condition(object, type_).is_some_and(|c| c["status"] == status);
        self.until(kind, name, &what, settled).await
    }

    /// Waits until a Lathe object's condition has this status for this reason, and returns its message.
    ///
    /// # Errors
    /// As [`Session::wait`].
    pub async fn reason(
        &self,
        kind: &str,
        name: &str,
        type_: &str,
        status: &str,
        reason: &str,
    ) -> Result<String> {
        let what = format!("{type_} is not {status} for {reason}");
        let is = |c: &Value| c["status"] == status && c["reason"] == reason;
        let object = self.until(kind, name, &what, |object| condition(object, type_).is_some_and(is)).await?;
        let message = condition(&object, type_).and_then(|c| c["message"].as_str());
        Ok(message.unwrap_or_default().to_owned())
    }

    /// Waits until a Lathe object whose status is of its last generation is as `wanted` says.
    ///
    /// # Errors
    /// It does not come to that: `what` is said with the last conditions.
    pub async fn until(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let api = self.api("lathe.dev/v1alpha1", kind).await?;
        let mut last = Value::Null;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while tokio::time::Instant::now() < deadline {
            if let Some(object) = api.get_opt(name).await? {
                let object = serde_json::to_value(object)?;
                let current = object["status"]["observedGeneration"] == object["metadata"]["generation"];
                if current && wanted(&object) {
                    return Ok(object);
                }
                last = object["status"]["conditions"].clone();
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        bail!("{kind} {name}: {what}; its conditions: {last:#}")
    }
}

async fn remove(namespaces: &Api<Namespace>, name: &str) -> Result<()> {
    match namespaces.delete(name, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
        // It is on its way already.
        Err(kube::Error::Api(status)) if status.is_conflict() => {}
        other => drop(other?),
    }
    poll(&format!("namespace {name} to be gone"), || async {
        Ok(namespaces.get_opt(name).await?.is_none().then_some(()))
    })
    .await
}

/// The condition of this type.
#[must_use]
pub fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == type_)
}

/// Asks again until there is an answer.
///
/// # Errors
/// There is none after some minutes, or asking fails.
pub async fn poll<T, F: Future<Output = Result<Option<T>>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> Result<T> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while tokio::time::Instant::now() < deadline {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    bail!("waited in vain for {what}")
}
