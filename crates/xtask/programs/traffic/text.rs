//! What is said: requests as a client writes them, answers as Lathe's worker does.

/// The content of every whole answer.
pub const ANSWER: &str = "Hello! How can I help you today?";
/// The beginning of the content of every piece of a streamed one.
pub const TOKEN: &str = "\"content\":\" token";
/// The model whose streams have a token each [`PACE_MILLIS`]; those of others come as fast as they are taken.
pub const PACED: &str = "paced";
/// As a model of some size decodes.
pub const PACE_MILLIS: u64 = 50;

const LOAD: &str = "endpoint-load-metrics: TEXT named_metrics.kv_cache_usage_perc=0.2500, named_metrics.num_requests_running=2, \
    named_metrics.num_requests_waiting=0, named_metrics.prompt_tokens_per_second=1200.0, \
    named_metrics.generation_tokens_per_second=400.0\r\n";
const USAGE: &str = "lathe-usage: prompt=12,completion=";
const PROMPT_TOKENS: usize = 12;
const ANSWER_TOKENS: usize = 9;

/// A client's request; for a stream of so many tokens, or for a whole answer.
pub fn request(address: &str, key: &str, model: &str, tokens: Option<usize>) -> Vec<u8> {
    let (stream, limit) = tokens.map_or(("", ANSWER_TOKENS), |tokens| (",\"stream\":true", tokens));
    let body = format!(
        "{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"system\",\"content\":\"You are a helpful assistant.\"}},\
         {{\"role\":\"user\",\"content\":\"Hello!\"}}],\"max_tokens\":{limit}{stream}}}"
    );
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {key}\r\nuser-agent: traffic\r\n\
         accept: application/json\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

/// A whole answer, with its head.
pub fn whole() -> Vec<u8> {
    let total = PROMPT_TOKENS + ANSWER_TOKENS;
    let body = format!(
        "{{\"id\":\"chatcmpl-00000000000000000000000000000001\",\"object\":\"chat.completion\",\"created\":1767225600,\
         \"model\":\"fast\",\"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{ANSWER}\",\
         \"refusal\":null}},\"logprobs\":null,\"finish_reason\":\"stop\"}}],\"system_fingerprint\":\"fp_0000000000\",\
         \"usage\":{{\"prompt_tokens\":{PROMPT_TOKENS},\"completion_tokens\":{ANSWER_TOKENS},\"total_tokens\":{total}}}}}"
    );
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{USAGE}{ANSWER_TOKENS}\r\n{LOAD}content-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

/// The head of a stream and its first event.
pub fn opening() -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\ntrailer: lathe-usage\r\n\
         x-accel-buffering: no\r\n{LOAD}transfer-encoding: chunked\r\n\r\n"
    );
    [head.into_bytes(), event("{\"role\":\"assistant\",\"content\":\"\"}", "null")].concat()
}

/// Tokens of a stream, one after the other and again from the first: LiteLLM breaks off what says the same word for long.
pub fn tokens() -> [Vec<u8>; 10] {
    std::array::from_fn(|digit| event(&format!("{{{TOKEN}{digit}\"}}"), "null"))
}

/// The end of a stream of so many tokens; the count of them where the other side takes trailers.
pub fn closing(tokens: usize, trailers: bool) -> Vec<u8> {
    let usage = if trailers { format!("{USAGE}{tokens}\r\n") } else { String::new() };
    let end = format!("0\r\n{usage}\r\n");
    [event("{}", "\"stop\""), chunk("data: [DONE]\n\n"), end.into_bytes()].concat()
}

fn event(delta: &str, finish: &str) -> Vec<u8> {
    chunk(&format!(
        "data: {{\"id\":\"chatcmpl-00000000000000000000000000000001\",\"object\":\"chat.completion.chunk\",\
         \"created\":1767225600,\"model\":\"fast\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\
         \"finish_reason\":{finish}}}],\"system_fingerprint\":\"fp_0000000000\"}}\n\n"
    ))
}

/// A chunk of HTTP/1.1.
fn chunk(data: &str) -> Vec<u8> {
    format!("{:x}\r\n{data}\r\n", data.len()).into_bytes()
}
