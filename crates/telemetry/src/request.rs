//! One request's place in a trace.
use std::time::{Instant, SystemTime};

use http::HeaderMap;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _, TraceId, Tracer as _,
};
use opentelemetry::{Context, KeyValue, StringValue};
use opentelemetry_sdk::trace::{SdkTracer, Span};

use crate::context::remote;
use crate::genai;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// `gen_ai.operation.name`.
    pub name: &'static str,
    /// Path of its endpoint.
    pub route: &'static str,
}

impl Operation {
    /// A chat completion.
    pub const CHAT: Self = Self { name: "chat", route: "/v1/chat/completions" };
    /// A completion.
    pub const COMPLETION: Self = Self { name: "text_completion", route: "/v1/completions" };
    /// Embeddings.
    pub const EMBEDDINGS: Self = Self { name: "embeddings", route: "/v1/embeddings" };
}

/// Where a request stands: in its client's trace, and with a span of ours where there is a tracer. Whoever drops the last clone ends
/// the span, if nobody did before.
#[derive(Clone, Debug)]
pub struct RequestTrace {
    client: Option<SpanContext>,
    own: Option<(SdkTracer, Context)>,
}

impl RequestTrace {
    /// Begins the span of a server; `None` of the operation: what is asked has none. `None` comes back where nobody traces the request,
    /// which costs a look for a header.
    pub fn begin(
        tracer: Option<&SdkTracer>,
        headers: &HeaderMap,
        operation: Option<Operation>,
    ) -> Option<Self> {
        let client = remote(headers);
        let own = tracer.zip(operation).map(|(tracer, operation)| {
            let parent = match &client {
                Some(client) => Context::new().with_remote_span_context(client.clone()),
                None => Context::new(),
            };
            let attributes = [of(operation), vec![KeyValue::new(genai::ROUTE, operation.route)]].concat();
            let span =
                tracer.span_builder(operation.name).with_kind(SpanKind::Server).with_attributes(attributes);
            (tracer.clone(), Context::new().with_span(span.start_with_context(tracer, &parent)))
        });
        (client.is_some() || own.is_some()).then_some(Self { client, own })
    }

    /// Of the whole trace, whoever began it.
    pub fn id(&self) -> TraceId {
        let own = self.own.as_ref().map(|(_, context)| context.span().span_context().trace_id());
        own.or(self.client.as_ref().map(SpanContext::trace_id)).unwrap_or(TraceId::INVALID)
    }

    /// Whether what is said of it goes anywhere.
    pub fn is_recorded(&self) -> bool {
        self.own.as_ref().is_some_and(|(_, context)| context.span().is_recording())
    }

    /// The model that is meant, in the span's name too: no name that there is no model of, since whoever reads traces counts names.
    pub fn asks_for(&self, operation: Operation, model: &str) {
        if self.is_recorded() {
            self.own_span(|span| span.update_name(format!("{} {model}", operation.name)));
            self.set([KeyValue::new(genai::REQUEST_MODEL, model.to_owned())]);
        }
    }

    /// Attributes.
    pub fn set(&self, attributes: impl IntoIterator<Item = KeyValue>) {
        self.own_span(|span| attributes.into_iter().for_each(|attribute| span.set_attribute(attribute)));
    }

    /// Something happened now.
    pub fn event(&self, name: &'static str) {
        self.own_span(|span| span.add_event(name, vec![]));
    }

    /// A part that is over.
    pub fn part(&self, name: &'static str, start: Instant, end: Instant) {
        let Some((tracer, context)) = self.own.as_ref().filter(|_| self.is_recorded()) else { return };
        let (now, clock) = (Instant::now(), SystemTime::now());
        let at = |time: Instant| clock.checked_sub(now.saturating_duration_since(time)).unwrap_or(clock);
        let part = SpanBuilder::from_name(name).with_kind(SpanKind::Internal).with_start_time(at(start));
        part.start_with_context(tracer, context).end_with_timestamp(at(end));
    }

    /// Asks another server for the same; the span lasts as long as it is held. None: no span of ours.
    pub fn hop(&self, operation: Operation, model: &str, server: std::net::SocketAddr) -> Option<Span> {
        let (tracer, context) = self.own.as_ref()?;
        let mut attributes = of(operation);
        attributes.extend([
            KeyValue::new(genai::REQUEST_MODEL, model.to_owned()),
            KeyValue::new(genai::SERVER_ADDRESS, server.ip().to_string()),
            KeyValue::new(genai::SERVER_PORT, i64::from(server.port())),
        ]);
        let hop = SpanBuilder::from_name(format!("{} {model}", operation.name)).with_kind(SpanKind::Client);
        Some(hop.with_attributes(attributes).start_with_context(tracer, context))
    }

    /// The parent of what another server does: the span that asks it, or the client's own where we make none.
    pub fn parent<'a>(&'a self, hop: Option<&'a Span>) -> Option<&'a SpanContext> {
        hop.map(|hop| hop.span_context()).or(self.client.as_ref())
    }

    /// It failed; `kind`: `error.code`, or what else names the failure.
    pub fn fails(&self, kind: impl Into<StringValue>) {
        if self.is_recorded() {
            let kind = kind.into();
            self.own_span(|span| span.set_status(Status::error(kind.as_str().to_owned())));
            self.set([KeyValue::new(genai::ERROR_TYPE, kind)]);
        }
    }

    /// It was answered with this status. A server's span failed only where the failure is the server's.
    pub fn status(&self, status: u16) {
        self.set([KeyValue::new(genai::STATUS_CODE, i64::from(status))]);
    }

    /// It is over: whatever is said later is lost.
    pub fn end(&self) {
        self.own_span(|span| span.end());
    }

    fn own_span(&self, say: impl FnOnce(&opentelemetry::trace::SpanRef<'_>)) {
        if let Some((_, context)) = &self.own {
            say(&context.span());
        }
    }
}

fn of(operation: Operation) -> Vec<KeyValue> {
    vec![KeyValue::new(genai::OPERATION, operation.name), KeyValue::new(genai::PROVIDER, genai::LATHE)]
}
