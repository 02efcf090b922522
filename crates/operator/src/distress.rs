//! What the operator cannot even begin with says so in its own status: an object that cannot be read (a stored one that an older
//! or newer schema let through), and one whose rounds fail again and again before anything is decided.
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, Patch, PatchParams},
    core::ObjectMeta,
};
use lathe_api::{
    conditions::{self, RECONCILING, STALLED, State},
    names::FIELD_MANAGER,
};
use serde_json::{Value, json};

use crate::runtime::Kind;

/// Reason of its conditions and of its event.
pub const REASON: &str = "Unreadable";

/// Why it cannot be read, with the field; `None` where it can be by now, or is gone. Its status says so afterwards, where the
/// API server takes that.
pub async fn tell<K: Kind>(
    client: &Client,
    meta: &ObjectMeta,
    summary: &'static str,
    now: Timestamp,
) -> Result<Option<String>, kube::Error> {
    let Some(value) = get::<K>(client, meta).await? else { return Ok(None) };
    let Some(cause) = cause::<K>(&value) else { return Ok(None) };
    let said = [(summary, State::Unknown), (RECONCILING, State::False), (STALLED, State::True)];
    write::<K>(client, meta, &value, said, REASON, &cause, now).await?;
    Ok(Some(cause))
}

/// Says in the status of an object whose rounds fail why they do, unless it says more already: where the summary has a value or
/// a person must act, that stands.
pub async fn failing<K: Kind>(
    client: &Client,
    meta: &ObjectMeta,
    summary: &'static str,
    (reason, message): (&str, &str),
    now: Timestamp,
) -> Result<(), kube::Error> {
    let Some(value) = get::<K>(client, meta).await? else { return Ok(()) };
    let known: Vec<Condition> = conditions_of(&value);
    let decided = conditions::find(&known, summary).is_some_and(|c| c.status != "Unknown");
    let waits_for_a_person =
        conditions::find(&known, STALLED).is_some_and(|c| c.status == "True" && c.reason != REASON);
    if decided || waits_for_a_person {
        return Ok(());
    }
    let message = format!("{message}. It is tried again, at most every five minutes.");
    let said = [(summary, State::Unknown), (RECONCILING, State::True), (STALLED, State::False)];
    write::<K>(client, meta, &value, said, reason, &message, now).await
}

fn api<K: Kind>(client: &Client, meta: &ObjectMeta) -> Api<DynamicObject> {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    Api::namespaced_with(client.clone(), namespace, &ApiResource::erase::<K>(&()))
}

async fn get<K: Kind>(client: &Client, meta: &ObjectMeta) -> Result<Option<Value>, kube::Error> {
    let found = api::<K>(client, meta).get_opt(meta.name.as_deref().unwrap_or_default()).await?;
    found.map(|object| serde_json::to_value(&object).map_err(kube::Error::SerdeError)).transpose()
}

/// Writes these conditions unless they stand there already.
async fn write<K: Kind>(
    client: &Client,
    meta: &ObjectMeta,
    value: &Value,
    said: [(&'static str, State); 3],
    reason: &str,
    message: &str,
    now: Timestamp,
) -> Result<(), kube::Error> {
    let old = conditions_of(value);
    let generation = value["metadata"]["generation"].as_i64().unwrap_or(0);
    let mut fresh = old.clone();
    for (type_, state) in said {
        conditions::set(&mut fresh, type_, state, reason, message, generation, now);
    }
    if fresh == old {
        return Ok(());
    }
    let patch = json!({"status": {"observedGeneration": generation, "conditions": fresh}});
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let name = meta.name.as_deref().unwrap_or_default();
    api::<K>(client, meta).patch_status(name, &params, &Patch::Merge(&patch)).await.map(drop)
}

fn conditions_of(value: &Value) -> Vec<Condition> {
    serde_json::from_value(value["status"]["conditions"].clone()).unwrap_or_default()
}

/// "`spec.training.epochs` cannot be read: invalid type ...".
fn cause<K: Kind>(value: &Value) -> Option<String> {
    let error = serde_path_to_error::deserialize::<_, K>(value).err()?;
    let field = error.path().to_string();
    Some(format!("`{field}` cannot be read: {}. Next: correct it, or delete the object.", error.into_inner()))
}

#[cfg(test)]
mod tests {
    use lathe_api::{
        Model,
        kstatus::{Kstatus, kstatus},
    };

    use super::*;
    use crate::testing::{Server, paths};

    const ONE: &str = "/apis/lathe.dev/v1alpha1/namespaces/ns/models/m";

    fn broken() -> Value {
        json!({
            "apiVersion": "lathe.dev/v1alpha1", "kind": "Model",
            "metadata": {"name": "m", "namespace": "ns", "generation": 3},
            "spec": {"source": {"uri": 7}},
        })
    }

    async fn told(object: Value) -> (Option<String>, Vec<(String, Value)>) {
        let get = format!("GET {ONE}");
        let meta = serde_json::from_value(object["metadata"].clone()).unwrap();
        let (client, server) = Server::start(&[(&get, 200, object)]);
        let said = tell::<Model>(&client, &meta, "Ready", Timestamp::UNIX_EPOCH).await.unwrap();
        drop(client);
        (said, server.calls().await)
    }

    #[tokio::test]
    async fn its_status_names_the_field_once() {
        let mut object = broken();
        let (said, calls) = told(object.clone()).await;
        assert!(
            said.as_ref().is_some_and(|said| said.starts_with("`spec.source.uri` cannot be read: ")),
            "{said:?}"
        );
        assert_eq!(paths(&calls), [format!("GET {ONE}"), format!("PATCH {ONE}/status")]);
        object["status"] = calls[1].1["status"].clone();
        assert_eq!(kstatus(&object), Kstatus::Failed);
        let (again, calls) = told(object).await;
        assert_eq!((again, calls.len()), (said, 1), "it is said already");
    }

    #[tokio::test]
    async fn one_that_was_corrected_meanwhile_is_left_alone() {
        let mut object = broken();
        object["spec"]["source"]["uri"] = json!("pvc://a/b");
        let (said, calls) = told(object).await;
        assert_eq!((said, calls.len()), (None, 1));
    }

    /// One round that failed; the calls, and the object as it then is.
    async fn failed(mut object: Value) -> (Vec<(String, Value)>, Value) {
        let get = format!("GET {ONE}");
        let meta = serde_json::from_value(object["metadata"].clone()).unwrap();
        let (client, server) = Server::start(&[(&get, 200, object.clone())]);
        let why = ("ReadFailed", "failed to read nodes: forbidden");
        failing::<Model>(&client, &meta, "Ready", why, Timestamp::UNIX_EPOCH).await.unwrap();
        drop(client);
        let calls = server.calls().await;
        if let Some((_, patch)) = calls.get(1) {
            object["status"] = patch["status"].clone();
        }
        (calls, object)
    }

    #[tokio::test]
    async fn rounds_that_fail_are_told_where_nothing_else_is_known() {
        let (calls, object) = failed(broken()).await;
        assert_eq!(paths(&calls), [format!("GET {ONE}"), format!("PATCH {ONE}/status")]);
        assert_eq!(kstatus(&object), Kstatus::InProgress);
        let ready = object["status"]["conditions"][0].clone();
        assert_eq!((&ready["type"], &ready["reason"]), (&json!("Ready"), &json!("ReadFailed")));
        let (calls, mut object) = failed(object).await;
        assert_eq!(calls.len(), 1, "it is said already");
        object["status"]["conditions"][0]["status"] = json!("False");
        assert_eq!(failed(object.clone()).await.0.len(), 1, "what is known of the object says more");
        object["status"]["conditions"] = json!([
            {"type": "Ready", "status": "Unknown", "reason": "OutputExists", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            {"type": "Stalled", "status": "True", "reason": "OutputExists", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"},
        ]);
        assert_eq!(failed(object).await.0.len(), 1, "a person must act all the same");
    }
}
