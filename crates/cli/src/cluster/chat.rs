//! `lathe chat`: asks a service, once or in a conversation.
use std::io::IsTerminal as _;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _};
use lathe_api::Access;
use lathe_contract::SERVE_PORT;
use serde::Deserialize as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::stream::{Endpoint, Settings};
use super::{Connection, Kind, Target, connect, forward, gateway, is_ready, pods, status};
use crate::failure::{Done, Problem};
use crate::output::{note, say, say_part};

/// Ask a service: one question on the command line, or a conversation without one.
///
/// In a cluster the question goes to the gateway, with the key that LATHE_API_KEY holds: to --gateway, or else by a port-forward
/// with your own rights (you need `pods/portforward` in the gateway's namespace). Where the InferenceService says
/// `access: Direct`, it goes without a key, by a port-forward to a ready pod of the service. With --url it goes to any
/// OpenAI-compatible endpoint, such as that of `lathe run`.
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
    /// Address of the cluster's gateway [default: a port-forward to it].
    #[arg(long, value_name = "URL", conflicts_with = "url")]
    pub gateway: Option<String>,
    /// Model id: the service's name is its base, an adapter's name is the adapter [default: the base; with --url the first
    /// that answers].
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
  LATHE_API_KEY=lathe-... lathe chat shop --gateway https://models.example.com \"How much is the red lamp?\"
  lathe chat --url http://localhost:8080 --model shop-support \"How much is the red lamp?\"

In a conversation an empty line or Ctrl-D ends it. `lathe keys create` makes a key for the gateway; one whose
`gateway.auth` is None takes any. Next: `lathe status inferenceservice/SERVICE` lists the model ids.";

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
    let key = std::env::var("LATHE_API_KEY").ok().filter(|key| !key.is_empty());
    // Its port is open as long as it is kept.
    let Way { endpoint, namespace, _guard } = match (&args.url, service.as_deref()) {
        (Some(url), _) => Way::open(Endpoint::new("--url", url, key)?),
        (None, service) => way(&args, service.unwrap_or_default(), key).await?,
    };
    let model = match (args.model, namespace, service) {
        (Some(model), Some(namespace), _) => full(&namespace, &model),
        (Some(model), None, _) => model,
        (None, Some(namespace), Some(service)) => full(&namespace, bare(&service)),
        (None, ..) => {
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

/// How the model is reached.
struct Way {
    endpoint: Endpoint,
    /// Of the service, where its gateway is asked, which wants it before a model's name.
    namespace: Option<String>,
    _guard: Option<forward::Guard>,
}

impl Way {
    fn open(endpoint: Endpoint) -> Self {
        Self { endpoint, namespace: None, _guard: None }
    }
}

/// The way to a service of a cluster: as its `spec.access` says, or by the gateway that the user names.
async fn way(args: &Args, service: &str, key: Option<String>) -> Done<Way> {
    if let Some(url) = &args.gateway {
        let namespace = match &args.target.namespace {
            Some(namespace) => namespace.clone(),
            None => connect(&args.target).await?.namespace,
        };
        let endpoint = Endpoint::new("--gateway", url, Some(given(key, &namespace)?))?;
        return Ok(Way { namespace: Some(namespace), ..Way::open(endpoint) });
    }
    let connection = connect(&args.target).await?;
    let (client, service) = (&connection.client, bare(service));
    let object = status::get(&connection, Kind::InferenceService, service).await?;
    if Access::deserialize(&object["spec"]["access"]).ok() == Some(Access::Direct) {
        let pod = ready_pod(&connection, &object, service).await?;
        let api: Api<Pod> = Api::namespaced(client.clone(), &connection.namespace);
        let (port, guard) = forward::open(api, pod, SERVE_PORT).await?;
        return Ok(Way { _guard: Some(guard), ..Way::open(local(port, None)?) });
    }
    let Some(url) = object["status"]["url"].as_str() else { return Err(not_ready(&object, service)) };
    let key = given(key, &connection.namespace)?;
    let (port, guard) = gateway::open(client, url).await?;
    let endpoint = local(port, Some(key))?;
    Ok(Way { endpoint, namespace: Some(connection.namespace), _guard: Some(guard) })
}

fn local(port: u16, key: Option<String>) -> Done<Endpoint> {
    Endpoint::new("--url", &format!("http://127.0.0.1:{port}"), key)
}

fn given(key: Option<String>, namespace: &str) -> Done<String> {
    key.ok_or_else(|| {
        let message = format!(
            "the gateway answers whoever has a key, and LATHE_API_KEY holds none. Next: `lathe keys create NAME --namespace {namespace}` makes one (whoever runs the gateway applies what it prints); then set LATHE_API_KEY to it."
        );
        Problem::user("Unauthorized", message)
    })
}

/// The name in NAME or KIND/NAME.
fn bare(service: &str) -> &str {
    service.split_once('/').map_or(service, |(_, name)| name)
}

/// A model's id at the gateway.
fn full(namespace: &str, model: &str) -> String {
    if model.contains('/') { model.to_owned() } else { format!("{namespace}/{model}") }
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
async fn ready_pod(connection: &Connection, object: &Value, service: &str) -> Done<String> {
    let all = pods(connection, Kind::InferenceService, service).await?;
    let ready = all.iter().find(|pod| is_ready(pod)).map(|pod| pod.name_any());
    ready.ok_or_else(|| not_ready(object, service))
}

fn not_ready(object: &Value, service: &str) -> Problem {
    let (reason, message) = status::cause(Kind::InferenceService, object);
    Problem::transient(
        "NotReady",
        format!("inferenceservice/{service} does not answer yet: {reason}: {message}"),
    )
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("shop", "team/shop")]
    #[case("team/tone", "team/tone")]
    #[case("other/tone", "other/tone")]
    fn the_gateway_wants_the_namespace_before_the_name(#[case] model: &str, #[case] expected: &str) {
        assert_eq!(full("team", model), expected);
    }

    #[test]
    fn who_has_no_key_is_told_how_to_get_one() {
        let problem = given(None, "team").unwrap_err();
        assert!(problem.message.contains("`lathe keys create NAME --namespace team`"), "{problem}");
        assert!(problem.message.contains("LATHE_API_KEY"), "{problem}");
        assert_eq!(problem.code, lathe_contract::exit::USER);
        assert_eq!(given(Some("k".to_owned()), "team").unwrap(), "k");
    }
}
