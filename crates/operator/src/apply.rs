//! The only writer: server-side apply, Jobs made once, status that is skipped when nothing changed, deletes, events.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    core::{NamespaceResourceScope, PartialObjectMeta},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use lathe_api::names::FIELD_MANAGER;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{error::Error, job::Objects};

/// Writes to the API server.
pub struct Writer {
    client: Client,
    recorder: Recorder,
}

/// Bounds of every kind that is written.
pub trait Written:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + std::fmt::Debug
    + Serialize
    + DeserializeOwned
{
}
impl<K> Written for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + Serialize
        + DeserializeOwned
{
}

impl Writer {
    /// One for the whole process: its recorder joins repeated events.
    pub fn new(client: Client) -> Self {
        let reporter =
            Reporter { controller: FIELD_MANAGER.to_owned(), instance: std::env::var("POD_NAME").ok() };
        Self { recorder: Recorder::new(client.clone(), reporter), client }
    }

    /// Applies a child object: the fields that it holds become ours. `live` is the object as a watch has brought it, which
    /// the same owner controls; without it the API server is asked, for an object of somebody else is never taken over.
    ///
    /// # Errors
    /// [`Error::NameTaken`] where it is somebody else's.
    pub async fn apply<K: Written>(&self, object: &K, live: Option<&K>) -> Result<K, Error> {
        let (namespace, name) = place(object.meta());
        let uid = match live {
            Some(live) => live.uid(),
            None => self.owned(object).await?,
        };
        let mut object = object.clone();
        // One of the same name made in the meantime is another object.
        object.meta_mut().uid = uid;
        // k8s-openapi writes apiVersion and kind of its types itself; derived kinds hold them.
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let api = self.api::<K>(namespace);
        api.patch(name, &params, &Patch::Apply(&object)).await.map_err(failed::<K>("apply", name))
    }

    /// The UID of the object that stands under this name, where the same owner controls it. Only metadata is read: what
    /// somebody else's object holds is not the operator's to know.
    async fn owned<K: Written>(&self, object: &K) -> Result<Option<String>, Error> {
        let (namespace, name) = place(object.meta());
        let there =
            self.api::<K>(namespace).get_metadata_opt(name).await.map_err(failed::<K>("read", name))?;
        let Some(there) = there else { return Ok(None) };
        if is_same_owner(object.meta(), &there.metadata) {
            return Ok(there.metadata.uid);
        }
        Err(taken::<K>(object.meta(), &there.metadata))
    }

    /// Applies some fields of an object that is there for another field manager, who owns them from then on.
    pub async fn apply_fields<K: Written>(
        &self,
        manager: &str,
        object: &K,
        mut fields: Value,
    ) -> Result<K, Error> {
        let (namespace, name) = place(object.meta());
        fields["apiVersion"] = json!(K::api_version(&()));
        fields["kind"] = json!(K::kind(&()));
        fields["metadata"]["name"] = json!(name);
        // One of the same name made in the meantime is another object.
        fields["metadata"]["uid"] = json!(object.uid());
        let params = PatchParams::apply(manager).force();
        let api = self.api::<K>(namespace);
        api.patch(name, &params, &Patch::Apply(&fields)).await.map_err(failed::<K>("apply", name))
    }

    /// Creates an object that is never changed later. One that is there already is given back where `is_it` knows it.
    ///
    /// # Errors
    /// [`Error::NameTaken`] where it is somebody else's.
    pub async fn create_once<K: Written>(&self, object: &K, is_it: impl Fn(&K) -> bool) -> Result<K, Error> {
        let (namespace, name) = place(object.meta());
        let api = self.api::<K>(namespace);
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        match api.create(&params, object).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            created => return created.map_err(failed::<K>("create", name)),
        }
        let there = api.get(name).await.map_err(failed::<K>("read", name))?;
        if is_it(&there) { Ok(there) } else { Err(taken::<K>(object.meta(), there.meta())) }
    }

    /// Makes a Job with what its pod needs, in the order in which the pod needs it.
    pub async fn start(&self, objects: &Objects) -> Result<(), Error> {
        let Objects { contract, policy, job } = objects;
        self.apply(contract, None).await?;
        self.apply(policy, None).await?;
        self.create_once(job, |there| is_same_owner(job.meta(), there.meta())).await?;
        Ok(())
    }

    /// Changes some fields of an object: a JSON merge patch.
    pub async fn merge<K: Written>(&self, object: &K, patch: &Value) -> Result<(), Error> {
        let (namespace, name) = place(object.meta());
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.answerless::<K>(namespace);
        let mut patch = patch.clone();
        // One of the same name made in the meantime is another object.
        patch["metadata"]["uid"] = json!(object.uid());
        api.patch(name, &params, &Patch::Merge(&patch)).await.map(drop).map_err(failed::<K>("change", name))
    }

    /// Does these operations of a JSON Patch on an object. No merge patch: that would send whole lists, whose fields would be
    /// ours twice, and stay when they are applied no more.
    pub async fn take_out<K: Written>(&self, object: &K, operations: Vec<Value>) -> Result<(), Error> {
        let (namespace, name) = place(object.meta());
        // Other items may stand there by now: then the write is a conflict.
        let seen = object.resource_version();
        let seen = seen.map(|seen| json!({"op": "add", "path": "/metadata/resourceVersion", "value": seen}));
        let patch = Value::Array(seen.into_iter().chain(operations).collect());
        let patch =
            serde_json::from_value(patch).map_err(|source| Error::Build { what: "JSON patch", source })?;
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.answerless::<K>(namespace);
        let written = api.patch(name, &params, &Patch::<()>::Json(patch)).await;
        written.map(drop).map_err(failed::<K>("change", name))
    }

    /// Changes some fields of an object's status that another controller writes too.
    pub async fn merge_status<K: Written>(&self, object: &K, patch: &Value) -> Result<(), Error> {
        let (namespace, name) = place(object.meta());
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.answerless::<K>(namespace);
        let written = api.patch_status(name, &params, &Patch::Merge(patch)).await;
        written.map(drop).map_err(failed::<K>("change the status of", name))
    }

    /// Writes `fresh` as the status of `object` unless it says what `old` says; tells whether it wrote.
    pub async fn status<K: Written, S: Serialize>(
        &self,
        object: &K,
        old: Option<&S>,
        fresh: &S,
    ) -> Result<bool, Error> {
        self.status_as(FIELD_MANAGER, object, old, fresh).await
    }

    /// As [`Writer::status`], for another field manager, whose fields are those of `fresh` and no others.
    pub async fn status_as<K: Written, S: Serialize>(
        &self,
        manager: &str,
        object: &K,
        old: Option<&S>,
        fresh: &S,
    ) -> Result<bool, Error> {
        let json = |status: &S| {
            serde_json::to_value(status).map_err(|source| Error::Build { what: "status", source })
        };
        let fresh = json(fresh)?;
        if old.map(json).transpose()?.is_some_and(|old| timeless(old) == timeless(fresh.clone())) {
            return Ok(false);
        }
        let (namespace, name) = place(object.meta());
        let body = json!({
            "apiVersion": K::api_version(&()), "kind": K::kind(&()),
            // An object of the same name made in the meantime is another one.
            "metadata": {"name": name, "uid": object.uid()},
            "status": fresh,
        });
        let params = PatchParams::apply(manager).force();
        let api = self.answerless::<K>(namespace);
        api.patch_status(name, &params, &Patch::Apply(&body))
            .await
            .map_err(failed::<K>("write the status of", name))?;
        Ok(true)
    }

    /// Deletes exactly this object, and what it owns; one that is gone already is fine.
    pub async fn delete<K: Written>(&self, object: &K) -> Result<(), Error> {
        let (namespace, name) = place(object.meta());
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: object.uid(), resource_version: None }),
            ..DeleteParams::background()
        };
        match self.api::<K>(namespace).delete(name, &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
            Err(source) => Err(failed::<K>("delete", name)(source)),
        }
    }

    /// Deletes what is of no use any more.
    ///
    /// # Errors
    /// [`Error::CleanUp`], which no status is made of.
    pub async fn clean_up<K: Written>(&self, object: &K) -> Result<(), Error> {
        self.delete(object).await.map_err(|error| Error::CleanUp(Box::new(error)))
    }

    /// Tells people what happened to `object`. An event that cannot be written is logged, never an error.
    pub async fn event<K: Resource<DynamicType = ()>>(&self, object: &K, happened: &Happened<'_>) {
        let Happened { good, reason, action, message } = *happened;
        let event = Event {
            type_: if good { EventType::Normal } else { EventType::Warning },
            reason: reason.to_owned(),
            note: Some(lathe_api::cut(message, 1000)),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(%error, reason, "an event could not be written");
        }
    }

    /// Reads only the metadata of what comes back: a write that was taken is no failure for what the answer holds.
    fn answerless<K: Written>(&self, namespace: &str) -> Api<PartialObjectMeta<K>> {
        Api::namespaced(self.client.clone(), namespace)
    }

    fn api<K: Written>(&self, namespace: &str) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

/// Something that people should see with `kubectl describe`.
#[derive(Clone, Copy, Debug)]
pub struct Happened<'a> {
    /// False: a warning.
    pub good: bool,
    /// CamelCase.
    pub reason: &'a str,
    /// What the operator did or tried, CamelCase.
    pub action: &'a str,
    /// For people.
    pub message: &'a str,
}

fn place(meta: &ObjectMeta) -> (&str, &str) {
    (meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

fn owner(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

fn is_same_owner(wanted: &ObjectMeta, there: &ObjectMeta) -> bool {
    owner(wanted).is_some_and(|wanted| owner(there).is_some_and(|there| wanted.uid == there.uid))
}

/// An object that stands where one of ours should.
fn taken<K: Written>(wanted: &ObjectMeta, there: &ObjectMeta) -> Error {
    let (ours, theirs) = (owner(wanted), owner(there));
    let leaving = ours.zip(theirs).is_some_and(|(a, b)| (&a.kind, &a.name) == (&b.kind, &b.name));
    Error::NameTaken { kind: K::kind(&()).into_owned(), name: place(wanted).1.to_owned(), leaving }
}

fn failed<K: Written>(verb: &'static str, name: &str) -> impl FnOnce(kube::Error) -> Error {
    let (kind, name) = (K::kind(&()).into_owned(), name.to_owned());
    move |source| Error::Write { verb, kind, name, source: Box::new(source) }
}

/// A status without the times of its conditions: they never change alone.
fn timeless(mut status: Value) -> Value {
    for condition in status["conditions"].as_array_mut().into_iter().flatten() {
        if let Some(condition) = condition.as_object_mut() {
            condition.remove("lastTransitionTime");
        }
    }
    status
}
