//! What must hold before this replica is ready, and what of it does not hold yet.
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kube::Client;
use lathe_api::{GROUP, VERSION};

use crate::{
    metrics::Metrics,
    runtime::{Stop, stopped},
};

/// Between two looks while kinds are missing, and afterwards.
const SOON: Duration = Duration::from_secs(2);
const LATER: Duration = Duration::from_secs(30);

/// What the probes ask for.
#[derive(Clone)]
pub struct Health {
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What is missing, by what it is missing for.
    missing: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Health {
    /// Alive, not ready.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let health = Self { metrics, missing: Arc::default() };
        health.lacks("api", "the Kubernetes API has not answered yet");
        health
    }

    /// This part works.
    pub fn has(&self, part: &str) {
        self.lock().remove(part);
    }

    /// This part does not work, or not yet.
    pub fn lacks(&self, part: &str, why: impl Into<String>) {
        self.lock().insert(part.to_owned(), why.into());
    }

    /// Everything that is missing, a line each; `None`: ready.
    pub fn missing(&self) -> Option<String> {
        let missing = self.lock();
        let lines: Vec<String> = missing.iter().map(|(part, why)| format!("{part}: {why}\n")).collect();
        (!lines.is_empty()).then(|| lines.concat())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, String>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks again and again whether the API server serves our kinds, until `stop`.
pub async fn watch_kinds(client: Client, health: Health, stop: Stop) {
    let look = async {
        loop {
            let pause = match look(&client).await {
                Ok(missing) if missing.is_empty() => {
                    health.has("kinds");
                    LATER
                }
                Ok(missing) => {
                    let next = "Next: apply the CustomResourceDefinitions.";
                    health.lacks("kinds", format!("{} not served. {next}", missing.join(", ")));
                    SOON
                }
                Err(error) => {
                    health.lacks("kinds", format!("the Kubernetes API does not answer: {error}"));
                    SOON
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = look => {}
        () = stopped(stop) => {}
    }
}

/// The kinds of ours that the API server does not serve.
async fn look(client: &Client) -> Result<Vec<&'static str>, kube::Error> {
    let served = match client.list_api_group_resources(&format!("{GROUP}/{VERSION}")).await {
        Ok(list) => list.resources.into_iter().map(|resource| resource.name).collect(),
        Err(kube::Error::Api(status)) if status.is_not_found() => Vec::new(),
        Err(error) => return Err(error),
    };
    let ours = ["acceleratorprofiles", "finetunejobs", "inferenceservices", "models"];
    Ok(ours.into_iter().filter(|name| !served.iter().any(|served: &String| served == name)).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Server;

    #[test]
    fn what_is_missing_is_named_until_nothing_is() {
        let health = Health::new(Arc::default());
        health.lacks("caches of Model", "not filled yet");
        health.has("api");
        assert_eq!(health.missing().as_deref(), Some("caches of Model: not filled yet\n"));
        health.has("caches of Model");
        assert_eq!(health.missing(), None);
    }

    #[tokio::test]
    async fn kinds_that_are_not_served_are_named() {
        let group = "GET /apis/lathe.dev/v1alpha1";
        let resource = |name: &str| json!({"name": name, "singularName": "", "namespaced": true, "kind": "K", "verbs": []});
        let list = |names: &[&str]| -> Value {
            let all: Vec<Value> = names.iter().map(|name| resource(name)).collect();
            json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "lathe.dev/v1alpha1", "resources": all})
        };
        let (client, _server) =
            Server::start(&[(group, 200, list(&["models", "models/status", "finetunejobs"]))]);
        assert_eq!(look(&client).await.unwrap(), ["acceleratorprofiles", "inferenceservices"]);
        let (client, _server) = Server::start(&[]);
        assert_eq!(look(&client).await.unwrap().len(), 4);
    }
}
