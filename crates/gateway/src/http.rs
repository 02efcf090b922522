//! The port that clients ask: OpenAI's routes, and nothing on it without being let in but the page's own files.
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::service::TowerToHyperService;
use lathe_http::{MAX_BODY, last_answer, read_body};
use lathe_telemetry::{Operation, RequestTrace, SdkTracer};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

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

/// Answers everything. From when `draining` is cancelled on, each answer is the last one of its connection.
///
/// What is asked most does not go through the router: its layers would cost a short request as much as all else that is done here.
pub fn service(
    gateway: Arc<Gateway>,
    draining: CancellationToken,
) -> impl Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send> + Clone + Send + 'static
{
    let router = TowerToHyperService::new(router(Arc::clone(&gateway)));
    service_fn(move |request: Request<Incoming>| {
        let (gateway, draining) = (Arc::clone(&gateway), draining.clone());
        let route = Endpoint::of(request.uri().path()).ok_or_else(|| router.clone());
        // A connection keeps room for its service's future, also while a stream goes on for long: here that is a pointer's.
        Box::pin(async move {
            let mut response = match route {
                Ok(endpoint) => asked(&gateway, endpoint, request).await,
                Err(router) => router.call(request).await?,
            };
            last_answer(&draining, &mut response);
            Ok(response)
        })
    })
}

/// All routes but the endpoints'.
fn router(gateway: Arc<Gateway>) -> Router {
    let page = page::files(&gateway.auth);
    Router::new()
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

/// A request that came, and what its answer will bear.
struct Entered {
    /// Who asks, where that is somebody who may.
    caller: Result<Arc<Caller>, ApiError>,
    trace: Option<RequestTrace>,
    id: HeaderValue,
}

impl Entered {
    /// No request goes in without a caller who may ask. Whoever may not makes no spans.
    fn of(gateway: &Gateway, headers: &HeaderMap, operation: Option<Operation>) -> Self {
        let caller = gateway.auth.admit(headers);
        if let Err(error) = &caller {
            gateway.books.metrics.refused(error.code);
        }
        let operation = operation.filter(|_| caller.is_ok());
        let trace = RequestTrace::begin(gateway.tracer.as_ref(), headers, operation);
        let id = request_id(trace.as_ref());
        Self { caller, trace, id }
    }
}

/// Everything that is said bears the request's id.
fn said(mut response: Response, id: HeaderValue) -> Response {
    response.headers_mut().insert(REQUEST_ID, id);
    // No browser takes it for something else than it says.
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Around every route of the router.
async fn guard(
    State(gateway): State<Arc<Gateway>>,
    mut request: axum::extract::Request,
    next: Next,
) -> Response {
    let Entered { caller, trace: _, id } = Entered::of(&gateway, request.headers(), None);
    let response = match caller {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    said(response, id)
}

/// A request to one of the endpoints.
async fn asked(gateway: &Gateway, endpoint: Endpoint, mut request: Request<Incoming>) -> Response {
    let arrived = Instant::now();
    let posted = request.method() == Method::POST;
    let operation = posted.then(|| endpoint.operation());
    let Entered { caller, trace, id } = Entered::of(gateway, request.headers(), operation);
    let response = match caller {
        Ok(_) if !posted => {
            let error = ApiError::method_not_allowed(request.method().as_str(), request.uri().path());
            ([(header::ALLOW, "POST")], error).into_response()
        }
        Ok(caller) => {
            request.headers_mut().insert(REQUEST_ID, id.clone());
            answer(gateway, caller, endpoint, request, Came { arrived, trace }).await
        }
        Err(error) => error.into_response(),
    };
    said(response, id)
}

async fn answer(
    gateway: &Gateway,
    caller: Arc<Caller>,
    endpoint: Endpoint,
    request: Request<Incoming>,
    came: Came,
) -> Response {
    let trace = came.trace.clone();
    match prepare(gateway, caller, endpoint, request, came).await {
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
    request: Request<Incoming>,
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
