//! The gateway as its clients see it: an address, and keys.
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Secret, Service};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::{RELEASE_NAMESPACE, Session, install, programs::program, serve::whole};

/// The Secret of the keys, as the chart names it.
const SECRET: &str = "lathe-gateway-keys";

/// The installation's gateway.
#[derive(Clone, Debug)]
pub struct Gateway {
    host: String,
    client: reqwest::Client,
}

/// An answer as it came.
#[derive(Debug)]
pub struct Said {
    /// The HTTP status.
    pub status: u16,
    /// Whether it says when to ask again.
    pub retry_after: bool,
    /// All of it.
    pub body: String,
}

impl Gateway {
    /// Finds it.
    ///
    /// # Errors
    /// There is none.
    pub async fn find(client: &Client) -> Result<Self> {
        let services: Api<Service> = Api::namespaced(client.clone(), RELEASE_NAMESPACE);
        let spec = services.get("lathe-gateway").await?.spec;
        let host = spec.and_then(|spec| spec.cluster_ip).context("the gateway has no address")?;
        Ok(Self::at(host))
    }

    /// The one at this address: a single replica.
    #[must_use]
    pub fn at(host: String) -> Self {
        Self { host, client: reqwest::Client::new() }
    }

    /// Where this path of it is.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.host)
    }

    /// Posts a chat completion; the status and the whole body.
    ///
    /// # Errors
    /// As [`Gateway::say`].
    pub async fn ask(&self, body: &Value, key: Option<&str>) -> Result<(u16, String)> {
        let said = self.say(body, key).await?;
        Ok((said.status, said.body))
    }

    /// Posts a chat completion.
    ///
    /// # Errors
    /// There is no answer, or its body has no end.
    pub async fn say(&self, body: &Value, key: Option<&str>) -> Result<Said> {
        let mut request = self.client.post(self.url("/v1/chat/completions")).json(body);
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await?;
        Ok(Said {
            status: response.status().as_u16(),
            retry_after: response.headers().contains_key("retry-after"),
            body: response.text().await?,
        })
    }

    /// Posts a streamed chat completion, and puts the answer together.
    ///
    /// # Errors
    /// It is refused, or the stream has no end.
    pub async fn chat(&self, body: &Value, key: &str) -> Result<String> {
        let (status, text) = self.ask(body, Some(key)).await?;
        ensure!(status == 200, "{status}: {text}");
        whole(&text)
    }

    /// Posts a streamed chat completion, and returns as its first token comes.
    ///
    /// # Errors
    /// It is refused, or ends without one.
    pub async fn first_token(&self, body: &Value, key: &str) -> Result<()> {
        let request = self.client.post(self.url("/v1/chat/completions")).json(body).bearer_auth(key);
        let mut response = request.send().await?.error_for_status()?;
        let mut text = String::new();
        while let Some(chunk) = response.chunk().await? {
            text.push_str(&String::from_utf8_lossy(&chunk));
            ensure!(!text.contains("\"error\""), "{text}");
            if text.contains("\"content\":\"") && !text.ends_with("\"content\":\"") {
                return Ok(());
            }
        }
        bail!("a stream without a token: {text}")
    }

    /// Gets JSON.
    ///
    /// # Errors
    /// There is no answer, or it is none.
    pub async fn get(&self, path: &str, key: Option<&str>) -> Result<(u16, Value)> {
        let mut request = self.client.get(self.url(path));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await?;
        Ok((response.status().as_u16(), serde_json::from_str(&response.text().await?)?))
    }
}

/// A test of the gateway: it is installed, and the namespace `lathe-NAME` has a key; all of it is gone afterwards.
///
/// # Errors
/// The story's, or what is before and after it fails.
pub async fn with_gateway(
    name: &str,
    story: impl AsyncFnOnce(&Session, &Gateway, &str) -> Result<()>,
) -> Result<()> {
    install(&[])?;
    let session = Session::begin(&format!("lathe-{name}")).await?;
    let told = async {
        // Before the gateway: one that runs hears of a key within a minute only.
        let key = key(&session.client, name, &session.namespace).await?;
        install(&["--set", "gateway.enabled=true"])?;
        let gateway = Gateway::find(&session.client).await?;
        story(&session, &gateway, &key).await
    };
    session.run(told).await?;
    forget_keys(&session.client).await?;
    session.end().await?;
    // Without the flag the gateway goes with the upgrade.
    install(&[])
}

/// A question with an answer of at most 32 tokens.
#[must_use]
pub fn question(model: &str, stream: bool) -> Value {
    json!({"model": model, "stream": stream, "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": "How much is the red lamp?"}]})
}

/// Makes a key as its user would, and puts it beside the others.
///
/// # Errors
/// The command fails, or the API server refuses the Secret.
pub async fn key(client: &Client, name: &str, namespace: &str) -> Result<String> {
    let mut create = Command::new(program("lathe")?);
    let output = create.args(["keys", "create", name, "--namespace", namespace, "-o", "json"]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout)?;
    let manager = PatchParams::apply(&format!("lathe-key-{name}"));
    secrets(client).patch(SECRET, &manager, &Patch::Apply(&said["secret"])).await?;
    said["key"].as_str().map(str::to_owned).context("no key")
}

/// Takes all keys away.
///
/// # Errors
/// The API server refuses it.
pub async fn forget_keys(client: &Client) -> Result<()> {
    secrets(client).delete(SECRET, &DeleteParams::default()).await?;
    Ok(())
}

fn secrets(client: &Client) -> Api<Secret> {
    Api::namespaced(client.clone(), RELEASE_NAMESPACE)
}
