//! The port that clients ask: OpenAI's routes, and nothing on it without being let in but the page's own files.
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use lathe_http::{MAX_BODY, read_body};
use lathe_telemetry::{RequestTrace, SdkTracer};
use serde_json::{Value, json};

use crate::account::{Account, Asked, Books};
use crate::balance;
use crate::body::{Endpoint, Question};
use crate::canary::User;
use crate::discovery::Cluster;
use crate::error::{ApiError, Headers};
use crate::forward::Outgoing;
use crate::hold::answer::{Asker, Asking};
use crate::keys::{Auth, Caller};
use crate::limits::Now;
use crate::page;
use crate::places::Places;
use crate::table::{Model, Sides, Table};

/// What the port's handlers share.
#[derive(Debug)]
pub struct Gateway {
    auth: Auth,
    /// What is known of the cluster.
    pub cluster: Cluster,
    asker: Arc<Asker>,
    books: Arc<Books>,
    /// Of requests.
    pub places: Arc<Places>,
    /// Makes spans; none: nobody collects them.
    tracer: Option<SdkTracer>,
}

impl Gateway {
    /// Answers as many requests at a time as there are `places`.
    pub fn new(
        auth: Auth,
        cluster: Cluster,
        asker: Arc<Asker>,
        books: Arc<Books>,
        places: Arc<Places>,
        tracer: Option<SdkTracer>,
    ) -> Arc<Self> {
        Arc::new(Self { auth, cluster, asker, books, places, tracer })
    }

    /// The models that there are.
    ///
    /// # Errors
    /// 503 until the watches have seen everything.
    pub fn table(&self) -> Result<Arc<Table>, ApiError> {
        let table = self.cluster.table.borrow().clone();
        table.ok_or_else(|| ApiError::unavailable("starting", "The gateway is starting; ask again."))
    }

    /// The model that is asked, and its pods that take requests: none where it may be waited for.
    fn who_answers(&self, caller: &Caller, question: &Question) -> Result<(Arc<Model>, Sides), ApiError> {
        let table = self.table()?;
        let model = answering(caller, &table, &question.model)?;
        let user = User {
            key: caller.shares_as().map(|key| &**key),
            named: question.user.as_deref(),
            beginning: &question.beginning,
        };
        let sides = model.service.sides(user);
        if sides == Sides::default()
            && !self.asker.holds().may_wait(&model.service, tokio::time::Instant::now())
        {
            return Err(ApiError::no_replica(&model.id()));
        }
        Ok((Arc::clone(model), sides))
    }
}

/// The routes.
pub fn router(gateway: Arc<Gateway>) -> Router {
    let page = page::files(&gateway.auth);
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .merge(page::api())
        .fallback(async |method: Method, uri: Uri| -> Result<(), ApiError> {
            Err(ApiError::unknown_url(method.as_str(), uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| -> Result<(), ApiError> {
            Err(ApiError::method_not_allowed(method.as_str(), uri.path()))
        })
        .with_state(Arc::clone(&gateway))
        .layer(from_fn_with_state(gateway, guard))
        // The form that asks for a key is for those who have not said theirs yet.
        .merge(page)
}

/// By it what a client saw, the usage log and a worker's log are joined; OpenAI's clients show it.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Where the request is part of a trace, its id begins with the trace's.
fn request_id(trace: Option<&RequestTrace>) -> HeaderValue {
    let id = match trace {
        None => format!("req_{:032x}", rand::random::<u128>()),
        Some(trace) => format!("req_{}-{:016x}", trace.id(), rand::random::<u64>()),
    };
    HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("req_"))
}

/// Around every route: no request goes in without a caller who may ask, and everything that is said bears the request's id. Whoever
/// may not ask makes no spans.
async fn guard(State(gateway): State<Arc<Gateway>>, mut request: Request, next: Next) -> Response {
    let caller = gateway.auth.admit(request.headers());
    let asks = caller.is_ok() && request.method() == Method::POST;
    let operation = Endpoint::of(request.uri().path()).map(Endpoint::operation).filter(|_| asks);
    let trace = RequestTrace::begin(gateway.tracer.as_ref(), request.headers(), operation);
    let id = request_id(trace.as_ref());
    let mut response = match caller {
        Ok(caller) => {
            request.headers_mut().insert(REQUEST_ID, id.clone());
            request.extensions_mut().insert(caller);
            trace.map(|trace| request.extensions_mut().insert(trace));
            next.run(request).await
        }
        Err(error) => {
            gateway.books.metrics.refused(error.code);
            error.into_response()
        }
    };
    response.headers_mut().insert(REQUEST_ID, id);
    // No browser takes it for something else than it says.
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn chat(state: State<Arc<Gateway>>, caller: Extension<Arc<Caller>>, request: Request) -> Response {
    answer(state, caller, Endpoint::Chat, request).await
}

async fn completion(
    state: State<Arc<Gateway>>,
    caller: Extension<Arc<Caller>>,
    request: Request,
) -> Response {
    answer(state, caller, Endpoint::Completion, request).await
}

async fn answer(
    State(gateway): State<Arc<Gateway>>,
    Extension(caller): Extension<Arc<Caller>>,
    endpoint: Endpoint,
    mut request: Request,
) -> Response {
    let arrived = Instant::now();
    let trace = request.extensions_mut().remove::<RequestTrace>();
    let came = Came { arrived, trace: trace.clone() };
    match prepare(&gateway, caller, endpoint, request, came).await {
        Ok(Prepared { asking, sides, limits }) => {
            let mut response = gateway.asker.answer(asking, sides).await;
            response.headers_mut().extend(limits);
            response
        }
        Err(error) => {
            gateway.books.metrics.refused(error.code);
            if let Some(trace) = trace {
                trace.status(error.status.as_u16());
                trace.fails(error.code);
                trace.end();
            }
            error.into_response()
        }
    }
}

/// What is known of a request by its coming.
struct Came {
    arrived: Instant,
    trace: Option<RequestTrace>,
}

/// A request that may go to a replica.
struct Prepared {
    asking: Asking,
    sides: Sides,
    /// What is left to the key.
    limits: Headers,
}

/// Everything that is judged before a replica is asked.
async fn prepare(
    gateway: &Gateway,
    caller: Arc<Caller>,
    endpoint: Endpoint,
    request: Request,
    Came { arrived, trace }: Came,
) -> Result<Prepared, ApiError> {
    let (parts, body) = request.into_parts();
    let (place, mut room) = gateway.places.enter(caller.shares_as())?;
    // Before anything is read: whoever asks for nonsense asked as well.
    let month = gateway.books.quotas.enter(&caller.key, caller.limits, Now::read())?;
    let body = read_body(&parts.headers, body, MAX_BODY, |bytes| room.hold(bytes)).await?;
    room.hold(body.len())?;
    let question = Question::read(body, endpoint).await?;
    let found = gateway.who_answers(&caller, &question);
    let (model, sides) = found.inspect_err(|error| {
        if error.status == StatusCode::SERVICE_UNAVAILABLE {
            gateway.books.quotas.give_back(&caller.key, month);
        }
    })?;
    if let Some(trace) = &trace {
        trace.asks_for(endpoint.operation(), &model.id());
    }
    let tokens = question.estimate.total();
    let limits = gateway.books.quotas.take(&caller.key, caller.limits, month, tokens, Now::read())?;
    // Every request was given one.
    let id = parts.headers.get(REQUEST_ID).cloned().unwrap_or_else(|| request_id(trace.as_ref()));
    let outgoing = Outgoing {
        operation: endpoint.operation(),
        headers: parts.headers,
        body: question.with_model(&model.name),
        key: balance::key(&model.service.uid, &model.name, &question.beginning),
        stream: question.stream,
    };
    let books = Arc::clone(&gateway.books);
    let estimate = question.estimate;
    let asked = Asked { id, caller, model, estimate, month, arrived, trace, _place: place };
    let account = Account::open(books, asked);
    Ok(Prepared { asking: Asking { account, outgoing, _room: room }, sides, limits })
}

fn answering<'a>(caller: &Caller, table: &'a Table, name: &str) -> Result<&'a Arc<Model>, ApiError> {
    let model = caller.resolve(table, name)?;
    if !model.may_answer() {
        return Err(ApiError::not_ready(&model.id(), &model.service.name));
    }
    Ok(model)
}

async fn models(
    State(gateway): State<Arc<Gateway>>,
    Extension(caller): Extension<Arc<Caller>>,
) -> Result<Json<Value>, ApiError> {
    let table = gateway.table()?;
    let data: Vec<Value> = caller.models(&table).filter(|m| m.is_offered()).map(|m| describe(m)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

async fn model(
    State(gateway): State<Arc<Gateway>>,
    Extension(caller): Extension<Arc<Caller>>,
    uri: Uri,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    // What is no UTF-8 is no model's id.
    let Ok(Path(id)) = id else { return Err(ApiError::unknown_url("GET", uri.path())) };
    let table = gateway.table()?;
    Ok(Json(describe(answering(&caller, &table, &id)?)))
}

/// A model as OpenAI lists it, with vLLM's `parent`.
fn describe(model: &Model) -> Value {
    let Model { name: _, adapter, answers: _, service } = model;
    let parent = adapter.then(|| format!("{}/{}", service.namespace, service.name));
    json!({
        "id": model.id(),
        "object": "model",
        "created": service.created,
        "owned_by": service.namespace,
        "parent": parent,
    })
}
