//! The gateway as a client sees it: a key, an address, streamed answers.

use std::io::{self, BufRead, BufReader};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lathe_contract::{KeyEntry, new_key};
use serde_json::{Value, json};

use super::target::Target;
use super::{NAMESPACE, release};

/// The Secret of the chart's `gateway.keysSecret`.
const SECRET: &str = "lathe-gateway-keys";
/// The demo's key in it, which has a field manager of its own, as `lathe keys create` advises: the others stay as they are.
const KEY: &str = "demo";
const MANAGER: &str = "lathe-key-demo";
/// A request that wakes a service is held until a replica is there.
const PATIENCE: Duration = Duration::from_secs(300);

/// An open way to it.
pub struct Gateway {
    port: u16,
    key: String,
    agent: ureq::Agent,
    _forward: Ending,
}

/// What came of a question.
#[derive(Debug)]
pub enum Asked {
    /// The whole answer.
    Answered(Answer),
    /// 429: nobody has room for it at the moment.
    SentAway,
}

/// An answer, and when it came.
#[derive(Debug)]
pub struct Answer {
    /// Put together from the stream.
    pub text: String,
    /// Events with text.
    pub pieces: u64,
    /// Until the first of them.
    pub first: Duration,
    /// Until the end.
    pub whole: Duration,
}

/// Makes a key for the demo's namespace, as `lathe keys create` would, in place of an earlier demo's.
///
/// # Errors
/// The cluster refuses it.
pub fn make_key(target: &Target) -> Result<String> {
    let (key, hash) = new_key(rand::random());
    let entry = KeyEntry {
        hash,
        namespace: NAMESPACE.to_owned(),
        models: None,
        requests_per_minute: None,
        tokens_per_minute: None,
        tokens_per_month: None,
    };
    let keys = json!({KEY: serde_json::to_string(&entry)?});
    target.apply_as(MANAGER, &secret(&keys))?;
    Ok(key)
}

/// Takes the demo's key away, and the Secret where it held no other.
///
/// # Errors
/// The cluster refuses it.
pub fn forget_key(target: &Target) -> Result<()> {
    let Some(found) = target.get(release::NAMESPACE, &format!("secret/{SECRET}"))? else { return Ok(()) };
    if found["data"].as_object().is_none_or(|keys| keys.keys().all(|name| name == KEY)) {
        return target.kubectl(&["--namespace", release::NAMESPACE, "delete", "secret", SECRET]).map(drop);
    }
    target.apply_as(MANAGER, &secret(&json!({})))
}

fn secret(keys: &Value) -> String {
    let metadata = json!({"name": SECRET, "namespace": release::NAMESPACE});
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys}).to_string()
}

impl Gateway {
    /// Opens a way to it with `key`.
    ///
    /// # Errors
    /// kubectl's words.
    pub fn open(target: &Target, key: String) -> Result<Self> {
        let mut forward = Ending(target.forward(release::NAMESPACE, "lathe-gateway", 80)?);
        let port = port(&mut forward.0)?;
        if let Some(mut stdout) = forward.0.stdout.take() {
            // It writes a line for every connection, and would stand still once nobody reads them.
            std::thread::spawn(move || io::copy(&mut stdout, &mut io::sink()));
        }
        let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false);
        Ok(Self { port, key, agent: config.build().new_agent(), _forward: forward })
    }

    /// One streamed chat completion.
    ///
    /// # Errors
    /// It is refused for another reason than want of room, or breaks off.
    pub fn ask(&self, mut body: Value) -> Result<Asked> {
        body["stream"] = true.into();
        let asked = Instant::now();
        let mut response = self
            .agent
            .post(format!("http://127.0.0.1:{}/v1/chat/completions", self.port))
            .content_type("application/json")
            .header("authorization", format!("Bearer {}", self.key))
            .send(body.to_string())
            .context("the gateway does not answer")?;
        match response.status().as_u16() {
            200 => {}
            429 => return Ok(Asked::SentAway),
            status => bail!("{status}: {}", response.body_mut().read_to_string().unwrap_or_default()),
        }
        let (mut text, mut pieces, mut first) = (String::new(), 0, None);
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let line = line?;
            // Comments say that a client waits.
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                let whole = asked.elapsed();
                return Ok(Asked::Answered(Answer { text, pieces, first: first.unwrap_or(whole), whole }));
            }
            let event: Value =
                serde_json::from_str(data).context("the stream holds an event that is no JSON")?;
            ensure!(event.get("error").is_none(), "{}", event["error"]);
            if let Some(piece) = event["choices"][0]["delta"]["content"].as_str().filter(|p| !p.is_empty()) {
                text.push_str(piece);
                pieces += 1;
                first.get_or_insert_with(|| asked.elapsed());
            }
        }
        bail!("the answer broke off after {text:?}")
    }
}

/// The local port that a port-forward chose: `Forwarding from 127.0.0.1:PORT -> 8080`.
fn port(forward: &mut Child) -> Result<u16> {
    let stdout = forward.stdout.as_mut().context("the port-forward has no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    let text = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next());
    text.and_then(|port| port.parse().ok()).with_context(|| format!("kubectl port-forward said {line:?}"))
}

/// A child that ends with its owner.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
