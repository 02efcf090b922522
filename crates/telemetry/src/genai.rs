//! Names of attributes, from OpenTelemetry's semantic conventions: for generative AI (in development as of 1.42, so names may
//! change with a release of ours), for HTTP and for errors (stable). Nothing that a person wrote has a name here: no prompt and no
//! answer is ever in a span.

use opentelemetry::KeyValue;

/// `chat`, `text_completion`, `embeddings`.
pub const OPERATION: &str = "gen_ai.operation.name";
/// Whose API answers; [`LATHE`].
pub const PROVIDER: &str = "gen_ai.provider.name";
/// The model's name as it was asked.
pub const REQUEST_MODEL: &str = "gen_ai.request.model";
/// The model's name as it answered.
pub const RESPONSE_MODEL: &str = "gen_ai.response.model";
/// The answer's id.
pub const RESPONSE_ID: &str = "gen_ai.response.id";
/// A list of one.
pub const FINISH_REASONS: &str = "gen_ai.response.finish_reasons";
/// Tokens of the prompt.
pub const INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
/// Of those, the ones that came from the cache.
pub const CACHED_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
/// Tokens of the answer.
pub const OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
/// OpenAI's `error.code`, or the status.
pub const ERROR_TYPE: &str = "error.type";
/// Who is asked.
pub const SERVER_ADDRESS: &str = "server.address";
/// At which port.
pub const SERVER_PORT: &str = "server.port";
/// Status of the answer.
pub const STATUS_CODE: &str = "http.response.status_code";
/// The endpoint.
pub const ROUTE: &str = "http.route";

/// Value of [`PROVIDER`].
pub const LATHE: &str = "lathe";

/// What an answer took, in tokens.
pub fn usage(prompt: u64, cached: u64, completion: u64) -> [KeyValue; 3] {
    let number = |tokens: u64| i64::try_from(tokens).unwrap_or(i64::MAX);
    [
        KeyValue::new(INPUT_TOKENS, number(prompt)),
        KeyValue::new(CACHED_TOKENS, number(cached)),
        KeyValue::new(OUTPUT_TOKENS, number(completion)),
    ]
}
