//! Chat completions of an OpenAI-compatible endpoint, streamed.
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::failure::{Done, Problem};

/// Longest line of a stream, and longest answer that is no stream.
const MAX_BYTES: usize = 4 << 20;

/// What every question of a conversation has.
#[derive(Clone, Debug)]
pub struct Settings {
    pub model: String,
    pub temperature: Option<f64>,
    pub max_tokens: Option<u32>,
}

/// An endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
}

impl Endpoint {
    /// `url`, which the user gave as `option`, as an OpenAI client takes it, with or without `/v1`.
    ///
    /// # Errors
    /// It is no address, or no client can be made.
    pub fn new(option: &str, url: &str, key: Option<String>) -> Done<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        if !url.starts_with("http://") && !url.starts_with("https://") {
            let message = format!("`{option}` must begin with http:// or https:// (found {url})");
            return Err(Problem::user("InvalidArgument", message));
        }
        let http = reqwest::Client::builder().connect_timeout(std::time::Duration::from_secs(10)).build();
        let http = http.map_err(|error| Problem::transient("InternalError", error.to_string()))?;
        Ok(Self { http, url, key })
    }

    /// Ids of the models that answer.
    ///
    /// # Errors
    /// The endpoint does not say.
    pub async fn models(&self) -> Done<Vec<String>> {
        let answer = self.send(self.http.get(format!("{}/v1/models", self.url))).await?;
        let body: Value = serde_json::from_slice(&whole(answer).await?).map_err(|_| self.foreign())?;
        let models = body["data"].as_array().ok_or_else(|| self.foreign())?;
        Ok(models.iter().filter_map(|model| model["id"].as_str().map(str::to_owned)).collect())
    }

    /// Asks; `hear` gets the answer piece by piece. Returns the whole.
    ///
    /// # Errors
    /// The endpoint refuses, or the answer breaks off.
    pub async fn ask(
        &self,
        settings: &Settings,
        messages: &[Value],
        mut hear: impl FnMut(&str),
    ) -> Done<String> {
        let mut body = json!({"model": settings.model, "messages": messages, "stream": true});
        if let Some(temperature) = settings.temperature {
            body["temperature"] = json!(temperature);
        }
        if let Some(most) = settings.max_tokens {
            body["max_tokens"] = json!(most);
        }
        let request = self.http.post(format!("{}/v1/chat/completions", self.url)).json(&body);
        let mut pieces = self.send(request).await?.bytes_stream();
        let (mut answer, mut lines) = (String::new(), Lines::default());
        let broke = |why: &str| {
            Problem::transient("Unreachable", format!("the answer broke off: {why}. Next: ask again."))
        };
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| broke(&error.without_url().to_string()))?;
            for line in lines.push(&piece).map_err(broke)? {
                match event(&line)? {
                    Heard::Text(text) => {
                        hear(&text);
                        answer.push_str(&text);
                    }
                    Heard::End => return Ok(answer),
                    Heard::Nothing => {}
                }
            }
        }
        Err(broke("the endpoint closed the connection"))
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Done<reqwest::Response> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let answer = request.send().await.map_err(|error| {
            let mut message = format!("{} does not answer", self.url);
            let mut source: Option<&dyn std::error::Error> = Some(&error);
            while let Some(cause) = source.and_then(std::error::Error::source) {
                message.push_str(&format!(": {cause}"));
                source = Some(cause);
            }
            Problem::transient("Unreachable", format!("{message}. Next: does it run there?"))
        })?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = whole(answer).await.unwrap_or_default();
        let told: Value = serde_json::from_slice(&body).unwrap_or_default();
        let told = told["error"]["message"].as_str().unwrap_or_default();
        let message = format!("{} refuses ({status}): {told}", self.url);
        Err(if status.is_client_error() && status.as_u16() != 429 {
            Problem::user("Refused", message)
        } else {
            Problem::transient("Refused", message)
        })
    }

    fn foreign(&self) -> Problem {
        let message = format!(
            "{}/v1/models does not answer as an OpenAI endpoint. Next: is this the right address?",
            self.url
        );
        Problem::user("NoEndpoint", message)
    }
}

async fn whole(answer: reqwest::Response) -> Done<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut pieces = answer.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece =
            piece.map_err(|error| Problem::transient("Unreachable", error.without_url().to_string()))?;
        if bytes.len() + piece.len() > MAX_BYTES {
            return Err(Problem::transient("Refused", "the endpoint answers with too many bytes"));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// Bytes to whole lines.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, piece: &[u8]) -> Result<Vec<String>, &'static str> {
        self.0.extend_from_slice(piece);
        let mut lines = Vec::new();
        while let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        if self.0.len() > MAX_BYTES { Err("a line of it is too long") } else { Ok(lines) }
    }
}

#[derive(Debug, PartialEq)]
enum Heard {
    Text(String),
    End,
    Nothing,
}

/// One line of a server-sent event stream.
fn event(line: &str) -> Done<Heard> {
    let Some(data) = line.strip_prefix("data:").map(str::trim) else { return Ok(Heard::Nothing) };
    if data == "[DONE]" {
        return Ok(Heard::End);
    }
    let event: Value = serde_json::from_str(data)
        .map_err(|_| Problem::transient("Unreachable", "the stream holds an event that is no JSON"))?;
    if let Some(error) = event.get("error") {
        let told = error["message"].as_str().unwrap_or("no message");
        return Err(Problem::transient("Refused", format!("the answer broke off: {told}")));
    }
    let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
    Ok(if text.is_empty() { Heard::Nothing } else { Heard::Text(text.to_owned()) })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn lines_are_put_together_from_pieces() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"data: a\r\nda").unwrap(), ["data: a"]);
        assert_eq!(lines.push(b"ta: \xc3").unwrap(), [""; 0]);
        assert_eq!(lines.push(b"\xa9\n\n").unwrap(), ["data: é", ""]);
    }

    #[rstest]
    #[case(r#"data: {"choices":[{"delta":{"content":"hi"}}]}"#, Heard::Text("hi".into()))]
    #[case(r#"data: {"choices":[{"delta":{"role":"assistant"}}]}"#, Heard::Nothing)]
    #[case(r#"data: {"choices":[],"usage":{}}"#, Heard::Nothing)]
    #[case("data: [DONE]", Heard::End)]
    #[case(": ping", Heard::Nothing)]
    #[case("", Heard::Nothing)]
    fn events(#[case] line: &str, #[case] expected: Heard) {
        assert_eq!(event(line).unwrap(), expected);
    }

    #[test]
    fn an_error_in_the_stream_is_told() {
        let problem = event(r#"data: {"error":{"message":"out of memory"}}"#).unwrap_err();
        assert!(problem.message.contains("out of memory"), "{problem}");
    }

    #[rstest]
    #[case("http://localhost:8080", "http://localhost:8080")]
    #[case("http://localhost:8080/v1/", "http://localhost:8080")]
    fn addresses_are_those_of_openai_clients(#[case] given: &str, #[case] expected: &str) {
        assert_eq!(Endpoint::new("--url", given, None).unwrap().url, expected);
    }
}
