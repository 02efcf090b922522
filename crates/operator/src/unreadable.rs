//! An object that cannot be read (a stored one that an older or newer schema let through) says so in its own status.
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
    let resource = ApiResource::erase::<K>(&());
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let name = meta.name.as_deref().unwrap_or_default();
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
    let Some(object) = api.get_opt(name).await? else { return Ok(None) };
    let value = serde_json::to_value(&object).map_err(kube::Error::SerdeError)?;
    let Some(cause) = cause::<K>(&value) else { return Ok(None) };
    if let Some(conditions) = changed(&value, summary, &cause, now) {
        let generation = &value["metadata"]["generation"];
        let patch = json!({"status": {"observedGeneration": generation, "conditions": conditions}});
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        api.patch_status(name, &params, &Patch::Merge(&patch)).await?;
    }
    Ok(Some(cause))
}

/// "`spec.training.epochs` cannot be read: invalid type ...".
fn cause<K: Kind>(value: &Value) -> Option<String> {
    let error = serde_path_to_error::deserialize::<_, K>(value).err()?;
    let field = error.path().to_string();
    Some(format!("`{field}` cannot be read: {}. Next: correct it, or delete the object.", error.into_inner()))
}

/// The conditions with this cause; `None` where they say it already.
fn changed(value: &Value, summary: &'static str, cause: &str, now: Timestamp) -> Option<Vec<Condition>> {
    let old: Vec<Condition> =
        serde_json::from_value(value["status"]["conditions"].clone()).unwrap_or_default();
    let generation = value["metadata"]["generation"].as_i64().unwrap_or(0);
    let mut fresh = old.clone();
    for (type_, state) in [(summary, State::Unknown), (RECONCILING, State::False), (STALLED, State::True)] {
        conditions::set(&mut fresh, type_, state, REASON, cause, generation, now);
    }
    (fresh != old).then_some(fresh)
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
}
