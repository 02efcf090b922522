//! `lathe chat`: asks a service, once or in a conversation.
use std::io::IsTerminal as _;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _};
use lathe_contract::SERVE_PORT;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::stream::{Endpoint, Settings};
use super::{Connection, Kind, Target, connect, forward, pods, status};
use crate::failure::{Done, Problem};
use crate::output::{note, say, say_part};

/// Ask a service: one question on the command line, or a conversation without one.
///
/// In a cluster the question goes to a ready pod of the InferenceService by a port-forward, with your own rights (you need
/// `pods/portforward` in the namespace). With --url it goes to any OpenAI-compatible endpoint, such as that of `lathe run`.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment, after_long_help = HELP)]
pub struct Args {
    /// SERVICE [QUESTION]; with --url: [QUESTION].
    #[arg(value_name = "SERVICE] [QUESTION")]
    pub words: Vec<String>,
    #[command(flatten)]
    pub target: Target,
    /// Ask this endpoint instead of a cluster; LATHE_API_KEY is its key, where it asks for one.
    #[arg(long, value_name = "URL", conflicts_with_all = ["namespace", "context"])]
    pub url: Option<String>,
    /// Model id: the service's name is its base, an adapter's name is the adapter [default: the first that answers].
    #[arg(short, long, value_name = "ID")]
    pub model: Option<String>,
    /// What the model is told before the conversation.
    #[arg(short, long, value_name = "TEXT")]
    pub system: Option<String>,
    /// 0 always takes the likeliest word; higher is more varied.
    #[arg(short, long, value_name = "NUMBER")]
    pub temperature: Option<f64>,
    /// Longest answer, in tokens.
    #[arg(long, value_name = "TOKENS")]
    pub max_tokens: Option<u32>,
}

const HELP: &str = "Examples:
  lathe chat shop \"How much is the red lamp?\"
  lathe chat shop --model shop-support --temperature 0
  lathe chat --url http://localhost:8080 --model shop-support \"How much is the red lamp?\"

In a conversation an empty line or Ctrl-D ends it. Next: `lathe status inferenceservice/SERVICE` lists the model ids.";

/// Runs the command.
///
/// # Errors
/// No pod is ready, or the endpoint refuses.
pub async fn run(args: Args) -> Done<()> {
    let (service, question) = match (&args.url, args.words.as_slice()) {
        (Some(_), words) => (None, words.join(" ")),
        (None, [service, words @ ..]) => (Some(service.clone()), words.join(" ")),
        (None, []) => {
            let message = "whom? Next: `lathe chat SERVICE`, or `lathe chat --url URL`; `lathe status inferenceservice` lists services.";
            return Err(Problem::user("InvalidArgument", message));
        }
    };
    // Kept until the end: the port is open as long.
    let (endpoint, _guard) = match (&args.url, &service) {
        (Some(url), _) => {
            (Endpoint::new(url, std::env::var("LATHE_API_KEY").ok().filter(|key| !key.is_empty()))?, None)
        }
        (None, service) => {
            let connection = connect(&args.target).await?;
            let pod = ready_pod(&connection, service.as_deref().unwrap_or_default()).await?;
            let api: Api<Pod> = Api::namespaced(connection.client.clone(), &connection.namespace);
            let (port, guard) = forward::open(api, pod, SERVE_PORT).await?;
            (Endpoint::new(&format!("http://127.0.0.1:{port}"), None)?, Some(guard))
        }
    };
    let model = match args.model {
        Some(model) => model,
        None => {
            let models = endpoint.models().await?;
            let first = models.first().cloned();
            first.ok_or_else(|| {
                Problem::transient("NoModel", "the endpoint has no model yet. Next: ask again.")
            })?
        }
    };
    let settings = Settings { model, temperature: args.temperature, max_tokens: args.max_tokens };
    let mut messages: Vec<Value> =
        args.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    if question.is_empty() {
        converse(&endpoint, &settings, messages).await
    } else {
        messages.push(json!({"role": "user", "content": question}));
        answer(&endpoint, &settings, &messages).await.map(drop)
    }
}

async fn converse(endpoint: &Endpoint, settings: &Settings, mut messages: Vec<Value>) -> Done<()> {
    let asks = std::io::stdin().is_terminal();
    if asks {
        note(&format!("{} answers; an empty line or Ctrl-D ends it.", settings.model));
    }
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        if asks {
            say_part("> ");
        }
        let line = lines.next_line().await.map_err(|error| {
            Problem::user("InvalidInput", format!("the question cannot be read: {error}"))
        })?;
        let Some(question) = line.filter(|line| !line.trim().is_empty()) else { return Ok(()) };
        messages.push(json!({"role": "user", "content": question}));
        let said = answer(endpoint, settings, &messages).await?;
        messages.push(json!({"role": "assistant", "content": said}));
    }
}

/// Prints the answer as it comes.
async fn answer(endpoint: &Endpoint, settings: &Settings, messages: &[Value]) -> Done<String> {
    let tell = |text: &str| {
        // A model may say anything: line breaks and tabs are the only control characters that it may use.
        let clean: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
        say_part(&clean);
    };
    let said = endpoint.ask(settings, messages, tell).await;
    say("");
    said
}

/// A pod of the service that is ready to answer.
async fn ready_pod(connection: &Connection, service: &str) -> Done<String> {
    let service = service.split_once('/').map_or(service, |(_, name)| name);
    let all = pods(connection, Kind::InferenceService, service).await?;
    if let Some(pod) = all.iter().find(|pod| is_ready(pod)) {
        return Ok(pod.name_any());
    }
    let object = status::get(connection, Kind::InferenceService, service).await?;
    let (reason, message) = status::cause(Kind::InferenceService, &object);
    let message = format!("inferenceservice/{service} has no pod that is ready: {reason}: {message}");
    Err(Problem::transient("NotReady", message))
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready =
        conditions.filter(|condition| condition.type_ == "Ready").any(|condition| condition.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}
