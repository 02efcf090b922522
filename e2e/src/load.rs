//! Clients that ask the gateway again and again, and what became of each request.
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{
    gateway::{Gateway, Said},
    poll,
};

/// Longer than any answer takes here: a client that waits so long was forgotten.
const FORGOTTEN: Duration = Duration::from_secs(120);
/// Before a request that was sent away with a word is sent again.
const AWAY: Duration = Duration::from_millis(200);

/// How clients ask.
#[derive(Clone, Debug)]
pub struct Clients {
    /// Each asks one question after the other.
    pub number: usize,
    /// Of each answer.
    pub tokens: u32,
    /// Between an answer and the next question.
    pub pause: Duration,
    /// Ids that are asked in turns.
    pub models: Vec<String>,
}

/// Clients in the background.
pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

/// What became of the requests of a load.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Whole answers.
    pub answered: u64,
    /// Sent away with a word, as overload should be; they were asked again.
    pub away: u64,
    /// Streams that ended with an error event.
    pub broken: Vec<String>,
    /// All others: an error for an answer, a connection that ended, half an answer, an answer that came twice, silence.
    pub lost: Vec<String>,
    ids: HashSet<String>,
}

struct Shared {
    clients: Clients,
    /// The ids, and how often they were others before.
    models: Mutex<(usize, Vec<String>)>,
    stop: AtomicBool,
    /// Of each client the question that waits for its answer, by the ids that were asked when it began.
    open: Mutex<Vec<Option<usize>>>,
    tally: Mutex<Tally>,
}

impl Load {
    /// Begins. Every other question asks for a stream.
    #[must_use]
    pub fn start(clients: Clients, gateway: &Gateway, key: &str) -> Self {
        let (number, models) = (clients.number, Mutex::new((0, clients.models.clone())));
        let (stop, open) = (AtomicBool::new(false), Mutex::new(vec![None; number]));
        let shared = Arc::new(Shared { clients, models, stop, open, tally: Mutex::default() });
        let client = |client| tokio::spawn(Arc::clone(&shared).ask(client, gateway.clone(), key.to_owned()));
        let clients = (0..number).map(client).collect();
        Self { shared, clients }
    }

    /// So far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        lock(&self.shared.tally).clone()
    }

    /// Requests without an answer yet.
    #[must_use]
    pub fn open(&self) -> usize {
        lock(&self.shared.open).iter().flatten().count()
    }

    /// From here on these ids are asked; returns when nobody waits for an answer of another one any more.
    ///
    /// # Errors
    /// That takes minutes.
    pub async fn ask_for(&self, models: &[&str]) -> Result<()> {
        let models = models.iter().map(|id| (*id).to_owned()).collect();
        let turn = {
            let mut now = lock(&self.shared.models);
            *now = (now.0 + 1, models);
            now.0
        };
        poll("answers of the ids before", || async {
            let old = lock(&self.shared.open).iter().flatten().any(|asked| *asked < turn);
            Ok((!old).then_some(()))
        })
        .await
    }

    /// Ends when all that is open is answered.
    ///
    /// # Errors
    /// A client panicked.
    pub async fn stop(self) -> Result<Tally> {
        self.shared.stop.store(true, Ordering::Relaxed);
        futures::future::try_join_all(self.clients).await?;
        Ok(lock(&self.shared.tally).clone())
    }

    /// As [`Load::stop`], where every request was answered whole; how many there were.
    ///
    /// # Errors
    /// One was not, or there was none.
    pub async fn all_answered(self) -> Result<u64> {
        let Tally { answered, broken, lost, .. } = self.stop().await?;
        ensure!(
            answered > 0 && broken.is_empty() && lost.is_empty(),
            "{answered} answers; {broken:#?} {lost:#?}"
        );
        Ok(answered)
    }
}

impl Shared {
    async fn ask(self: Arc<Self>, client: usize, gateway: Gateway, key: String) {
        for turn in client.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let stream = turn % 2 == 0;
            let body = self.question(client, turn, stream);
            let said = tokio::time::timeout(FORGOTTEN, gateway.say(&body, Some(&key))).await;
            lock(&self.open)[client] = None;
            let outcome = match said {
                Ok(Ok(said)) => Outcome::of(&said, stream, self.clients.tokens),
                Ok(Err(error)) => Outcome::Lost(format!("{error:#}")),
                Err(_) => Outcome::Lost("no answer".to_owned()),
            };
            let pause = if matches!(outcome, Outcome::Away) { AWAY } else { self.clients.pause };
            lock(&self.tally).count(outcome);
            tokio::time::sleep(pause).await;
        }
    }

    fn question(&self, client: usize, turn: usize, stream: bool) -> Value {
        let models = lock(&self.models);
        // Each of them streamed and not.
        let model = models.1.get(turn / 2 % models.1.len().max(1));
        lock(&self.open)[client] = Some(models.0);
        let mut question = json!({"model": model, "stream": stream, "max_tokens": self.clients.tokens,
            "ignore_eos": true, "user": format!("client-{client}"),
            "messages": [{"role": "user", "content": format!("{client}: how much is the red lamp?")}]});
        if stream {
            question["stream_options"] = json!({"include_usage": true});
        }
        question
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What became of one request.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// The answer's id, which its worker gave it.
    Answered(String),
    Away,
    Broken(String),
    Lost(String),
}

impl Outcome {
    fn of(said: &Said, stream: bool, tokens: u32) -> Self {
        match (said.status, stream) {
            (200, true) => events(&said.body, tokens),
            (200, false) => {
                let answer: Value = serde_json::from_str(&said.body).unwrap_or_default();
                match (answer["id"].as_str(), answer["usage"]["completion_tokens"] == tokens) {
                    (Some(id), true) => Outcome::Answered(id.to_owned()),
                    _ => Outcome::Lost(said.body.clone()),
                }
            }
            (429, _) if said.retry_after => Outcome::Away,
            (status, _) => Outcome::Lost(format!("{status}: {}", said.body)),
        }
    }
}

/// What a stream is: whole, ended by an error, or neither.
fn events(stream: &str, tokens: u32) -> Outcome {
    let lost = |why: &str| Outcome::Lost(format!("{why}: {stream}"));
    let mut events = stream.lines().filter_map(|line| line.strip_prefix("data: ")).peekable();
    let (mut ends, mut finished, mut used, mut id) = (0, 0, false, None);
    while let Some(event) = events.next() {
        if event == "[DONE]" {
            ends += 1;
            continue;
        }
        let Ok(event) = serde_json::from_str::<Value>(event) else { return lost("an event is no JSON") };
        if event["error"].is_object() {
            return if events.peek().is_none() {
                Outcome::Broken(stream.to_owned())
            } else {
                lost("something follows an error")
            };
        }
        finished += u32::from(event["choices"][0]["finish_reason"].is_string());
        used |= event["usage"]["completion_tokens"] == tokens;
        id = id.or(event["id"].as_str().map(str::to_owned));
    }
    match (ends, finished, used, id) {
        (1, 1, true, Some(id)) => Outcome::Answered(id),
        (1, 1, ..) => lost("tokens are missing"),
        (0, ..) => lost("the stream has no end"),
        _ => lost("the answer came twice"),
    }
}

impl Tally {
    fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Answered(id) => {
                self.answered += 1;
                if !self.ids.insert(id.clone()) {
                    self.lost.push(format!("two answers have the id {id:?}"));
                }
            }
            Outcome::Away => self.away += 1,
            Outcome::Broken(why) => self.broken.push(why),
            Outcome::Lost(why) => self.lost.push(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Outcome, events};

    #[test]
    fn a_stream_is_whole_broken_or_neither() {
        let token = r#"data: {"id":"a","choices":[{"finish_reason":null}]}"#;
        let last = r#"data: {"id":"a","choices":[{"finish_reason":"length"}]}"#;
        let usage = r#"data: {"id":"a","choices":[],"usage":{"completion_tokens":2}}"#;
        let (done, error) = ("data: [DONE]", r#"data: {"error":{"message":"lost"}}"#);
        let of = |lines: &[&str]| events(&lines.join("\n\n"), 2);
        assert_eq!(of(&[": waits", token, last, usage, done]), Outcome::Answered("a".to_owned()));
        assert!(matches!(of(&[token, error]), Outcome::Broken(_)));
        let fewer = usage.replace('2', "1");
        let lost: [&[&str]; 8] = [
            &[token, last, usage],
            &[token, usage, done],
            &[error, token],
            &[token, last, done],
            &[token, last, &fewer, done],
            &[last, usage, done, last, done],
            &["data: x"],
            &[],
        ];
        for lines in lost {
            assert!(matches!(of(lines), Outcome::Lost(_)), "{lines:?}");
        }
    }
}
