//! `lathe-operator cleanup`: what the operator and the gateway made for themselves goes with the release. Helm runs it when all else is
//! deleted, so that neither is left that would make it again.
//!
//! What users made or changed stays. The key pairs go even where workers trust them: a private key that nobody looks after is worth
//! more to a thief than to whoever installs Lathe again, whose services are then rolled out with new ones.
use anyhow::Context as _;
use clap::Parser;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, Preconditions},
    core::{NamespaceResourceScope, ObjectMeta},
};
use lathe_api::{AcceleratorProfile, names};
use serde::de::DeserializeOwned;

use crate::keys;

/// The Lease of leader election.
const LEASE: &str = "lathe-operator";
/// What the gateway's keys used.
const USAGE: &str = "lathe-gateway-usage";

/// Removes what operator and gateway made for themselves: Lease, key pairs, counts of keys, and profiles that nobody changed.
#[derive(Debug, Parser)]
#[command(name = "lathe-operator cleanup", version)]
struct Options {
    /// Namespace of the installation.
    #[arg(long, env = "LATHE_NAMESPACE", default_value = "lathe-system")]
    release_namespace: String,
    /// Namespaces that were looked after; none: all of them. With names, the profiles are somebody else's.
    #[arg(long, env = "LATHE_NAMESPACES", value_delimiter = ',')]
    namespaces: Vec<String>,
}

/// True where the command line asks for it.
pub fn asked() -> bool {
    std::env::args_os().nth(1).is_some_and(|word| word == "cleanup")
}

/// Runs the command.
///
/// # Errors
/// The API server refuses something; the text says what.
pub async fn run() -> anyhow::Result<()> {
    let options = Options::parse_from(std::env::args_os().skip(1));
    // One provider for every TLS connection; an error only says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client =
        Client::try_default().await.context("no Kubernetes API: run inside a cluster, or set KUBECONFIG")?;
    let namespaces: Vec<String> = options.namespaces.into_iter().filter(|name| !name.is_empty()).collect();
    clean(&client, &options.release_namespace, namespaces).await
}

async fn clean(client: &Client, release: &str, namespaces: Vec<String>) -> anyhow::Result<()> {
    remove::<Lease>(client, release, LEASE).await?;
    remove::<ConfigMap>(client, release, USAGE).await?;
    if namespaces.is_empty() {
        profiles(client).await?;
    }
    remove::<Secret>(client, release, keys::SECRET).await
}

async fn remove<K>(client: &Client, namespace: &str, name: &str) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let what = format!("{} {namespace}/{name}", K::kind(&()));
    gone(&what, api.delete(name, &DeleteParams::default()).await.map(drop))
}

/// Profiles of the catalogue that nobody changed; one that is changed in this moment stays.
async fn profiles(client: &Client) -> anyhow::Result<()> {
    let api: Api<AcceleratorProfile> = Api::all(client.clone());
    let all = match api.list_metadata(&ListParams::default()).await {
        // The CRDs are gone, and every profile with them.
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
        all => all.context("AcceleratorProfiles cannot be listed")?,
    };
    for profile in all.items.iter().filter(|profile| unchanged(&profile.metadata)) {
        let preconditions =
            Preconditions { uid: profile.uid(), resource_version: profile.resource_version() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        let name = profile.name_any();
        gone(&format!("AcceleratorProfile {name}"), api.delete(&name, &params).await.map(drop))?;
    }
    Ok(())
}

/// True where the catalogue made the object and nobody else ever wrote a field of it.
fn unchanged(meta: &ObjectMeta) -> bool {
    let mut managers = meta.managed_fields.iter().flatten().map(|entry| entry.manager.as_deref()).peekable();
    managers.peek().is_some() && managers.all(|manager| manager == Some(names::CATALOGUE_MANAGER))
}

/// What is gone already, or was changed just now, is no error.
fn gone(what: &str, deleted: Result<(), kube::Error>) -> anyhow::Result<()> {
    match deleted {
        Ok(()) => println!("deleted {what}"),
        Err(kube::Error::Api(status)) if status.is_not_found() => println!("{what} is not there"),
        Err(kube::Error::Api(status)) if status.is_conflict() => println!("kept {what}: it was changed"),
        Err(error) => return Err(anyhow::Error::new(error).context(format!("{what} cannot be deleted"))),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Server;

    const RELEASE: &str = "/api/v1/namespaces/lathe-system";
    const LEASE_PATH: &str = "/apis/coordination.k8s.io/v1/namespaces/lathe-system/leases/lathe-operator";
    const USAGE_PATH: &str = "/api/v1/namespaces/lathe-system/configmaps/lathe-gateway-usage";
    const PROFILES: &str = "/apis/lathe.dev/v1alpha1/acceleratorprofiles";

    fn list(items: Value) -> Value {
        json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "items": items})
    }

    fn profile(name: &str, managers: &[&str]) -> Value {
        let entries: Vec<Value> = managers.iter().map(|manager| json!({"manager": manager})).collect();
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"name": name, "uid": name, "resourceVersion": "7", "managedFields": entries}})
    }

    /// What is deleted, and with which preconditions.
    async fn deleted(namespaces: &[&str]) -> Vec<(String, Value)> {
        let profiles = list(json!([
            profile("cpu", &["lathe-catalogue"]),
            profile("l4", &["lathe-catalogue", "kubectl-edit"]),
            profile("own", &["kubectl"]),
        ]));
        let (client, server) = Server::start(&[(&*format!("GET {PROFILES}"), 200, profiles)]);
        let namespaces = namespaces.iter().map(|&name| name.to_owned()).collect();
        clean(&client, "lathe-system", namespaces).await.unwrap();
        drop(client);
        let calls = server.calls().await;
        // Nothing is asked of namespaces that may be gone.
        assert!(calls.iter().all(|(call, _)| !call.contains("namespaces/a")), "{calls:?}");
        calls
            .into_iter()
            .filter_map(|(call, body)| {
                Some((call.strip_prefix("DELETE ")?.to_owned(), body["preconditions"].clone()))
            })
            .collect()
    }

    #[tokio::test]
    async fn what_was_made_for_the_installation_alone_goes_and_changed_profiles_stay() {
        let expected = [
            (LEASE_PATH.to_owned(), Value::Null),
            (USAGE_PATH.to_owned(), Value::Null),
            (format!("{PROFILES}/cpu"), json!({"uid": "cpu", "resourceVersion": "7"})),
            (format!("{RELEASE}/secrets/lathe-keys"), Value::Null),
        ];
        assert_eq!(deleted(&[]).await, expected);
    }

    #[tokio::test]
    async fn an_operator_of_some_namespaces_leaves_profiles_alone() {
        let expected = [
            (LEASE_PATH.to_owned(), Value::Null),
            (USAGE_PATH.to_owned(), Value::Null),
            (format!("{RELEASE}/secrets/lathe-keys"), Value::Null),
        ];
        assert_eq!(deleted(&["a"]).await, expected);
    }
}
