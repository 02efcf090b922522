//! What is known of a request by its body, and its `model` exchanged without touching anything else.
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::{BufMut as _, Bytes, BytesMut};
use lathe_contract::Usage;
use lathe_telemetry::Operation;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::ApiError;

/// As much of a prompt's beginning says which replica has read it before.
const BEGINNING: usize = 4096;
/// Longest body that is read where others wait for it.
const SHORT: usize = 256 << 10;
/// Messages that are looked at for the first of a user.
const OPENING: usize = 8;
/// Where a request says nothing of the answer's length.
const USUAL_ANSWER: u64 = 256;
/// What an estimate counts at most: nobody is charged for a number that no context has.
const MOST_TOKENS: u64 = 1 << 20;

/// Which of the endpoints was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
    /// `/v1/embeddings`
    Embeddings,
}

impl Endpoint {
    /// All of them.
    pub const ALL: [Self; 3] = [Endpoint::Chat, Endpoint::Completion, Endpoint::Embeddings];

    /// Its name and path.
    pub fn operation(self) -> Operation {
        match self {
            Endpoint::Chat => Operation::CHAT,
            Endpoint::Completion => Operation::COMPLETION,
            Endpoint::Embeddings => Operation::EMBEDDINGS,
        }
    }

    /// That of a path.
    pub fn of(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.operation().route == path)
    }

    /// Whether an answer is generated, in pieces where the client wants it so.
    fn generates(self) -> bool {
        match self {
            Endpoint::Chat | Endpoint::Completion => true,
            Endpoint::Embeddings => false,
        }
    }
}

/// A request as the gateway sees it; all else is the worker's to judge.
#[derive(Debug)]
pub struct Question {
    body: Bytes,
    model_at: Range<usize>,
    /// What the client named.
    pub model: String,
    /// The prompt's first bytes, the same for every turn of one conversation.
    pub beginning: Bytes,
    /// Tokens that it will take: a quarter of the prompt's bytes, and the answer's limit.
    pub estimate: Usage,
    /// Whether the answer is asked for in pieces, as it comes.
    pub stream: bool,
    /// For whom the client asks, as OpenAI's `user` says it.
    pub user: Option<String>,
}

/// `null` is the same as absence; a field that stands twice is refused, as the worker does.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    max_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    max_completion_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    stream: Option<&'a RawValue>,
    #[serde(borrow)]
    user: Option<&'a RawValue>,
}

impl Question {
    /// As [`Question::parse`], a long body on a thread that may take its time.
    pub async fn read(body: Bytes, endpoint: Endpoint) -> Result<Self, ApiError> {
        if body.len() <= SHORT {
            return Self::parse(body, endpoint);
        }
        tokio::task::spawn_blocking(move || Self::parse(body, endpoint)).await.unwrap_or_else(|panic| {
            tracing::error!(%panic, "reading a request panicked");
            Err(ApiError::internal())
        })
    }

    /// Reads what must be known to pass a request on.
    ///
    /// # Errors
    /// 400: the body is no JSON object, or has no `model` that is a string.
    pub fn parse(body: Bytes, endpoint: Endpoint) -> Result<Self, ApiError> {
        let fields: Fields<'_> = serde_json::from_slice(&body).map_err(|error| {
            let message = format!("The request body could not be parsed as a JSON object: {error}.");
            ApiError::invalid("invalid_json", message)
        })?;
        let Some(raw) = fields.model else {
            let message = "Missing required parameter: 'model'. Name one that GET /v1/models lists.";
            return Err(ApiError::invalid_model("missing_required_parameter", message));
        };
        let model: String = serde_json::from_str(raw.get()).map_err(|_| {
            ApiError::invalid_model("invalid_type", "Invalid type for 'model': expected a string.")
        })?;
        // What the endpoint does not know is the worker's to judge, and must not hide what it does know.
        let prompt = match endpoint {
            Endpoint::Chat => fields.messages,
            Endpoint::Completion => fields.prompt,
            Endpoint::Embeddings => fields.input,
        };
        let limit = [fields.max_completion_tokens, fields.max_tokens].into_iter().flatten();
        let limit = limit.filter_map(|raw| raw.get().parse::<u64>().ok()).next();
        let answer = if endpoint.generates() { limit.unwrap_or(USUAL_ANSWER) } else { 0 };
        let asked = prompt.map_or(0, |prompt| prompt.get().len() as u64 / 4).min(MOST_TOKENS);
        let answer = answer.clamp(u64::from(asked == 0), MOST_TOKENS - asked);
        let estimate = Usage { prompt: asked, completion: answer, cached: 0 };
        let beginning = match (prompt, endpoint) {
            (Some(messages), Endpoint::Chat) => opening(messages.get()),
            (Some(prompt), Endpoint::Completion | Endpoint::Embeddings) => prompt.get(),
            (None, _) => "",
        };
        let beginning = &beginning.as_bytes()[..beginning.len().min(BEGINNING)];
        let beginning = if beginning.is_empty() { Bytes::new() } else { body.slice_ref(beginning) };
        let model_at = place(&body, raw.get());
        let stream = endpoint.generates() && fields.stream.is_some_and(|raw| raw.get() == "true");
        // Whatever else it is says nothing of whom.
        let user = fields.user.and_then(|raw| serde_json::from_str(raw.get()).ok());
        Ok(Self { model, beginning, estimate, stream, user, model_at, body })
    }

    /// The body with another model's name; every other byte is as it came.
    pub fn with_model(&self, name: &str) -> Bytes {
        let name = serde_json::Value::from(name).to_string();
        let mut body = BytesMut::with_capacity(self.body.len() + name.len());
        body.put_slice(&self.body[..self.model_at.start]);
        body.put_slice(name.as_bytes());
        body.put_slice(&self.body[self.model_at.end..]);
        body.freeze()
    }
}

/// Where a part that was borrowed from `body` stands in it.
fn place(body: &Bytes, part: &str) -> Range<usize> {
    let start = part.as_ptr() as usize - body.as_ptr() as usize;
    start..start + part.len()
}

/// All of a conversation up to its first message of a user: later turns begin with the same.
fn opening(messages: &str) -> &str {
    let last = serde_json::from_str::<Opening<'_>>(messages).ok().and_then(|opening| opening.0);
    last.map_or(messages, |last| {
        let end = last.as_ptr() as usize - messages.as_ptr() as usize + last.len();
        &messages[..end]
    })
}

/// The last message of a conversation's opening.
struct Opening<'a>(Option<&'a str>);

impl<'de> Deserialize<'de> for Opening<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Messages;
        impl<'de> Visitor<'de> for Messages {
            type Value = Opening<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                #[derive(Deserialize)]
                struct Message<'a> {
                    #[serde(borrow)]
                    role: Cow<'a, str>,
                }
                let mut last = None;
                for _ in 0..OPENING {
                    let Some(item) = list.next_element::<&'de RawValue>()? else { break };
                    last = Some(item.get());
                    if serde_json::from_str::<Message<'_>>(item.get()).is_ok_and(|m| m.role == "user") {
                        break;
                    }
                }
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Opening(last))
            }
        }
        deserializer.deserialize_seq(Messages)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn parse(text: &str) -> Result<Question, ApiError> {
        let endpoint = match text {
            _ if text.contains("\"messages\":") => Endpoint::Chat,
            _ if text.contains("\"input\":") => Endpoint::Embeddings,
            _ => Endpoint::Completion,
        };
        Question::parse(Bytes::copy_from_slice(text.as_bytes()), endpoint)
    }

    #[rstest]
    #[case::first(r#"{"model":"a/b","x":1.0e-07}"#, r#"{"model":"b","x":1.0e-07}"#)]
    #[case::last(
        "{ \"x\" : [ 1 ,2],\n \"model\" : \"a\\u002fb\" }",
        "{ \"x\" : [ 1 ,2],\n \"model\" : \"b\" }"
    )]
    #[case::nested_ones_stay(
        r#"{"messages":[{"role":"user","content":"\"model\":\"a/b\""}],"metadata":{"model":"a/b"},"model":"a/b"}"#,
        r#"{"messages":[{"role":"user","content":"\"model\":\"a/b\""}],"metadata":{"model":"a/b"},"model":"b"}"#
    )]
    #[case::unknown_twice(r#"{"y":1,"y":2,"model":"a/b"}"#, r#"{"y":1,"y":2,"model":"b"}"#)]
    fn the_name_is_exchanged_and_every_other_byte_stays(#[case] body: &str, #[case] expected: &str) {
        let question = parse(body).unwrap();
        assert_eq!(question.model, "a/b");
        assert_eq!(question.with_model("b"), expected);
    }

    #[rstest]
    #[case::not_json("{", "invalid_json")]
    #[case::an_array("[]", "invalid_json")]
    #[case::twice(r#"{"model":"a","model":"b"}"#, "invalid_json")]
    #[case::twice_in_other_letters(r#"{"model":"a","\u006dodel":"b"}"#, "invalid_json")]
    #[case::absent(r#"{"prompt":"x"}"#, "missing_required_parameter")]
    #[case::null(r#"{"model":null}"#, "missing_required_parameter")]
    #[case::a_number(r#"{"model":7}"#, "invalid_type")]
    #[case::more_behind_it(r#"{"model":"a"} {}"#, "invalid_json")]
    fn what_cannot_be_passed_on_is_refused(#[case] body: &str, #[case] code: &str) {
        let error = parse(body).unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (400, code));
    }

    #[test]
    fn deep_nesting_does_not_recurse_without_a_bound() {
        let deep = format!(r#"{{"model":"a","messages":{}}}"#, "[".repeat(1 << 20));
        assert_eq!(parse(&deep).unwrap_err().code, "invalid_json");
    }

    #[test]
    fn all_turns_of_a_conversation_begin_alike_and_others_do_not() {
        let turn = |first: &str, more: &str| {
            let body = format!(
                r#"{{"model":"m","messages":[{{"role":"system","content":"s"}},{{"role":"user","content":"{first}"}}{more}]}}"#
            );
            parse(&body).unwrap().beginning
        };
        let later = r#",{"role":"assistant","content":"a"},{"role":"user","content":"u"}"#;
        assert_eq!(turn("one", ""), turn("one", later));
        assert_ne!(turn("one", ""), turn("two", ""));
        let text = |prompt: &str| parse(&format!(r#"{{"model":"m","prompt":{prompt}}}"#)).unwrap().beginning;
        assert_eq!(text(r#""abc""#), &br#""abc""#[..]);
        assert_eq!(text("[1,2]"), &b"[1,2]"[..]);
        assert_eq!(text(&format!("\"{}\"", "x".repeat(10_000))).len(), BEGINNING);
    }

    #[rstest]
    #[case::as_said(r#""prompt":"0123456789","max_tokens":100"#, 103)]
    #[case::the_newer_name(r#""prompt":"0123456789","max_completion_tokens":7,"max_tokens":100"#, 10)]
    #[case::unsaid(r#""prompt":"0123456789""#, 3 + USUAL_ANSWER)]
    #[case::absurd(r#""max_tokens":18446744073709551615"#, MOST_TOKENS)]
    #[case::nonsense(r#""max_tokens":-5"#, USUAL_ANSWER)]
    #[case::nothing(r#""max_tokens":0"#, 1)]
    #[case::embedded(r#""input":["01234567"],"max_tokens":100"#, 3)]
    #[case::embedded_nothing(r#""input":"""#, 1)]
    fn what_a_request_will_take(#[case] fields: &str, #[case] tokens: u64) {
        assert_eq!(parse(&format!(r#"{{"model":"m",{fields}}}"#)).unwrap().estimate.total(), tokens);
    }

    #[test]
    fn an_embedding_is_no_stream_and_its_replica_is_chosen_by_what_is_embedded() {
        let read = parse(r#"{"model":"m","input":["a","b"],"prompt":"c","stream":true}"#).unwrap();
        assert_eq!((read.stream, &read.beginning[..]), (false, &br#"["a","b"]"#[..]));
        assert!(parse(r#"{"model":"m","prompt":"c","stream":true}"#).unwrap().stream);
    }

    #[rstest]
    #[case::nobody("{\"model\":\"m\"}", None)]
    #[case::somebody("{\"model\":\"m\",\"user\":\"a\\u0062\"}", Some("ab"))]
    #[case::nonsense("{\"model\":\"m\",\"user\":7}", None)]
    fn whom_the_client_asks_for(#[case] body: &str, #[case] user: Option<&str>) {
        assert_eq!(parse(body).unwrap().user.as_deref(), user);
    }

    #[tokio::test]
    async fn a_field_of_the_other_endpoint_hides_nothing() {
        let prompt = "x".repeat(SHORT);
        let body = format!(r#"{{"model":"m","messages":[],"prompt":"{prompt}","max_tokens":1}}"#);
        let question = Question::read(body.into(), Endpoint::Completion).await.unwrap();
        assert_eq!(question.estimate, Usage { prompt: (SHORT as u64 + 2) / 4, completion: 1, cached: 0 });
        assert!(question.beginning.starts_with(b"\"xxx"));
        let body = r#"{"model":"m","messages":[{"role":"user","content":"x"}],"prompt":""}"#;
        let question = Question::read(body.into(), Endpoint::Chat).await.unwrap();
        assert!(question.beginning.starts_with(b"[{") && question.estimate.prompt == 7);
    }
}
