//! The port that users ask: OpenAI's routes, and nothing on it without being let in.
use std::net::Ipv4Addr;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use lathe_contract::Scope;
use lathe_http::read_body;
use lathe_telemetry::opentelemetry::KeyValue;
use lathe_telemetry::{Operation, RequestTrace, SdkTracer, genai};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::adapters::Adapters;
use super::answer::{self, Endpoint, Frame};
use super::door::{Door, Place};
use super::embeddings::embeddings;
use super::engine::{Engine, Job};
use super::error::ApiError;
use super::load::{LoadMeter, orca};
use super::mailbox::mailbox;
use super::prompt::Prompter;
use super::request;
use super::stops::StopFilter;
use crate::control::{self, Control};

/// What the port's handlers share from the start.
pub struct Front {
    /// Checks tokens.
    pub control: Arc<Control>,
    /// Anyone may ask.
    pub direct: bool,
    /// The port is this machine's alone.
    pub local: bool,
    /// How busy the replica is.
    pub load: Arc<LoadMeter>,
    /// Makes spans; none: nobody collects them.
    pub tracer: Option<SdkTracer>,
    /// Set once the model is there.
    pub app: OnceLock<App>,
}

/// What answers need once the model is there.
pub struct App {
    /// Bounds what is in flight.
    pub door: Arc<Door>,
    /// The engine's thread.
    pub engine: Engine,
    /// Text to tokens.
    pub prompter: Prompter,
    /// Prompts that are tokenised at a time, so that the engine keeps its cores.
    pub tokenising: Arc<Semaphore>,
    /// Model ids.
    pub adapters: Arc<Adapters>,
    /// The base's model id.
    pub base: String,
    /// Unix time in seconds at which the model was loaded.
    pub created: i64,
    /// Which weights and which program.
    pub fingerprint: String,
    /// Numbers of an embedding.
    pub hidden: usize,
    /// Room for the vectors of requests that are let in, until their clients have read them; in KiB.
    pub vectors: Arc<Semaphore>,
    /// Longest body.
    pub body_limit: usize,
}

/// The routes.
pub fn router(front: Arc<Front>) -> Router {
    let metrics =
        Router::new().route("/metrics", get(control::metrics)).with_state(Arc::clone(&front.control));
    Router::new()
        .route(Endpoint::Chat.operation().route, post(chat))
        .route(Endpoint::Completion.operation().route, post(completion))
        .route(Operation::EMBEDDINGS.route, post(embeddings))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .fallback(async |method: Method, uri: Uri| ApiError::unknown_url(method.as_str(), uri.path()))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::method_not_allowed(method.as_str(), uri.path())
        })
        .with_state(Arc::clone(&front))
        .merge(metrics)
        .layer(from_fn_with_state(front, guard))
}

/// Around every route: no request goes in without a right to, no answer goes out without the load.
async fn guard(State(front): State<Arc<Front>>, request: Request, next: Next) -> Response {
    let mut response = match front.admit(request.headers(), request.uri()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    if let Ok(load) = HeaderValue::from_str(&orca(&front.load.read(Instant::now()))) {
        response.headers_mut().insert("endpoint-load-metrics", load);
    }
    response
}

async fn chat(State(front): State<Arc<Front>>, request: Request) -> Result<Response, ApiError> {
    answer(front, Endpoint::Chat, request).await
}

async fn completion(State(front): State<Arc<Front>>, request: Request) -> Result<Response, ApiError> {
    answer(front, Endpoint::Completion, request).await
}

async fn answer(front: Arc<Front>, endpoint: Endpoint, request: Request) -> Result<Response, ApiError> {
    let trace = front.begins(request.headers(), endpoint.operation());
    traced(trace.clone(), answered(front, endpoint, request, trace)).await
}

/// A refusal is the last word of the request's spans.
pub async fn traced(
    trace: Option<RequestTrace>,
    answered: impl Future<Output = Result<Response, ApiError>>,
) -> Result<Response, ApiError> {
    let answered = answered.await;
    if let (Err(error), Some(trace)) = (&answered, &trace) {
        error.traced(trace);
    }
    answered
}

async fn answered(
    front: Arc<Front>,
    endpoint: Endpoint,
    request: Request,
    trace: Option<RequestTrace>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let app = front.app()?;
    let (parts, body, place) = let_in(app, request).await?;
    let work = move |app: &App| {
        let context = app.prompter.context;
        let request = match endpoint {
            Endpoint::Chat => request::chat(&body, context)?,
            Endpoint::Completion => request::completion(&body, context)?,
        };
        let adapter = app.adapters.resolve(&request.model)?;
        let tokens = app.prompter.read(&request, jiff::Timestamp::now())?;
        Ok((request, adapter, tokens, place))
    };
    let (request, adapter, tokens, place) = judge(&front, work).await?;
    let (poster, mailbox) = mailbox();
    let prefix = match endpoint {
        Endpoint::Chat => "chatcmpl",
        Endpoint::Completion => "cmpl",
    };
    let frame = Frame {
        endpoint,
        id: format!("{prefix}-{:032x}", rand::random::<u128>()),
        created: jiff::Timestamp::now().as_second(),
        model: request.model,
        fingerprint: app.fingerprint.clone(),
        prompt_tokens: tokens.prompt.len(),
    };
    Asked {
        operation: endpoint.operation(),
        id: &frame.id,
        model: &frame.model,
        prompt_tokens: frame.prompt_tokens,
        stream: request.stream,
    }
    .tell(&parts.headers, trace.as_ref());
    app.engine.generate(Job {
        prompt: tokens.prompt,
        adapter,
        sampling: request.settings.sampling(rand::random()),
        max_tokens: tokens.max_tokens,
        tokenizer: Arc::clone(&app.prompter.tokenizer),
        stops: StopFilter::new(request.settings.stop),
        ignore_eos: request.settings.ignore_eos,
        poster,
        place,
        arrived,
        trace,
    });
    let id = HeaderValue::from_str(&frame.id).map_err(|_| ApiError::internal())?;
    let mut response = if request.stream {
        answer::streamed(frame, mailbox, request.include_usage)
    } else {
        answer::whole(frame, mailbox).await?
    };
    response.headers_mut().insert("x-request-id", id);
    Ok(response)
}

/// A request's head, its body and its place.
pub async fn let_in(app: &App, request: Request) -> Result<(Parts, Bytes, Place), ApiError> {
    app.door.check()?;
    let (parts, body) = request.into_parts();
    check_json(&parts.headers)?;
    let limit = app.body_limit;
    let body = read_body(&parts.headers, body, limit, |_| Ok(())).await;
    let body = body.map_err(|error| ApiError::of_body(error, limit))?;
    Ok((parts, body, app.door.enter()?))
}

/// Judges and tokenises on a thread that may take its time. It ends by itself where the client has left, and keeps the
/// request's place, which `work` holds, until then.
pub async fn judge<T: Send + 'static>(
    front: &Arc<Front>,
    work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let turns = Arc::clone(&front.app()?.tokenising);
    let turn = turns.acquire_owned().await.map_err(|_| ApiError::internal())?;
    let front = Arc::clone(front);
    let work = move || {
        let _turn = turn;
        work(front.app()?)
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| {
        tracing::error!(%panic, "reading a request panicked");
        Err(ApiError::internal())
    })
}

/// What is said of a request that goes to the engine.
pub struct Asked<'a> {
    /// Its endpoint.
    pub operation: Operation,
    /// The answer's id.
    pub id: &'a str,
    /// The model id.
    pub model: &'a str,
    /// Tokens that are to be read.
    pub prompt_tokens: usize,
    /// Whether the answer comes as it grows.
    pub stream: bool,
}

impl Asked<'_> {
    /// To the log and to the request's span.
    pub fn tell(self, headers: &HeaderMap, trace: Option<&RequestTrace>) {
        let Asked { operation, id, model, prompt_tokens, stream } = self;
        // The gateway's, by which its usage log is joined with this one.
        let request_id =
            headers.get("x-request-id").and_then(|id| id.to_str().ok()).filter(|id| id.len() <= 64);
        let trace_id = trace.map(|trace| tracing::field::display(trace.id()));
        tracing::debug!(id, model, prompt_tokens, stream, request_id, trace_id, "asked");
        if let Some(trace) = trace {
            trace.asks_for(operation, model);
            trace.set([
                KeyValue::new(genai::RESPONSE_MODEL, model.to_owned()),
                KeyValue::new(genai::RESPONSE_ID, id.to_owned()),
            ]);
        }
    }
}

fn check_json(headers: &HeaderMap) -> Result<(), ApiError> {
    // A page in somebody's browser can send other types to a local server without asking first.
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") { Ok(()) } else { Err(ApiError::not_json()) }
}

/// A page in somebody's browser can point a name of its own at 127.0.0.1 and read what a local server says.
fn names_this_machine(headers: &HeaderMap, uri: &Uri) -> bool {
    let named = headers.get(header::HOST).and_then(|value| value.to_str().ok());
    let Some(host) = named.or(uri.authority().map(|authority| authority.as_str())) else { return true };
    let host = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(host, "localhost" | "[::1]") || host.parse::<Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
}

async fn models(State(front): State<Arc<Front>>) -> Result<Json<Value>, ApiError> {
    let app = front.app()?;
    let data: Vec<Value> = app.adapters.ids().iter().map(|id| app.describe(id)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

async fn model(
    State(front): State<Arc<Front>>,
    uri: Uri,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    // What is no UTF-8 is no model's id.
    let Ok(Path(id)) = id else { return Err(ApiError::unknown_url("GET", uri.path())) };
    let app = front.app()?;
    app.adapters.resolve(&id)?;
    Ok(Json(app.describe(&id)))
}

impl Front {
    fn admit(&self, headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
        if self.local && !names_this_machine(headers, uri) {
            return Err(ApiError::unauthorized(
                "This server answers on this machine alone: ask it as `localhost` or `127.0.0.1`.",
            ));
        }
        if self.direct {
            return Ok(());
        }
        let checked = self.control.check(headers, Scope::Inference);
        checked.map_err(|refusal| ApiError::unauthorized(format!("Not allowed: {}.", refusal.0)))
    }

    /// Its span, where spans are made.
    pub fn begins(&self, headers: &HeaderMap, operation: Operation) -> Option<RequestTrace> {
        RequestTrace::begin(self.tracer.as_ref(), headers, Some(operation))
    }

    /// What answers need.
    ///
    /// # Errors
    /// 503 until the model is there.
    pub fn app(&self) -> Result<&App, ApiError> {
        self.app
            .get()
            .ok_or_else(|| ApiError::unavailable("model_not_ready", "The model is being loaded; ask again."))
    }
}

impl App {
    /// A model as OpenAI lists it, with vLLM's `parent` and `max_model_len`.
    fn describe(&self, id: &str) -> Value {
        let parent = (id != self.base).then_some(&self.base);
        json!({
            "id": id,
            "object": "model",
            "created": self.created,
            "owned_by": "lathe",
            "parent": parent,
            "max_model_len": self.prompter.context,
        })
    }
}
