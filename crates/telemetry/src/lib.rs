//! Traces of Lathe's programs.
//!
//! [`remote`] and [`put`] are W3C trace context in the headers of HTTP; [`RequestTrace`] is a request's span, for those who answer it;
//! [`Traces`] sends spans to a collector (OTLP over HTTP, protobuf), which [`CollectorOptions`] name; [`genai`] are the names of OpenTelemetry's conventions for generative AI. Where no collector is named there is no
//! tracer, and a program makes no span.
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]
mod collector;
mod context;
pub mod genai;
mod options;
mod request;

pub use collector::{Traces, TracesError};
pub use context::{put, remote};
pub use opentelemetry;
pub use opentelemetry_sdk::trace::{SdkTracer, Span};
pub use options::CollectorOptions;
pub use request::{Operation, RequestTrace};
