//! What is asked of each, and what came of it.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::proxy::{Contestant, FAST, Ground, KEY, PACED, Started};
use crate::bench::stats::{bytes, number};
use crate::command;

/// Clients that ask at the same time.
const CONNECTIONS: usize = 64;
/// Tokens of each stream that comes as fast as it is taken.
const TOKENS: usize = 256;
/// Streams that are open at the same time, and their tokens: a token each 50 ms.
pub const STREAMS: usize = 1000;
const STREAM_TOKENS: usize = 600;

/// All programs, running.
pub struct Bench<'a> {
    ground: &'a Ground,
    started: Vec<(Contestant, Started)>,
    seconds: f64,
}

/// What the clients saw while it counted.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Seen {
    seconds: f64,
    answers: f64,
    tokens: f64,
    /// Seconds of a processor that the proxy took.
    processor: f64,
    /// Bytes that it held at the end.
    resident: u64,
    /// Latency in microseconds, where requests had a rate.
    p50: f64,
    p99: f64,
}

/// One round of one contestant.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// Whole answers a second.
    pub requests: f64,
    /// Whole answers in a second of the proxy's processor time.
    pub per_processor: f64,
    /// Requests a second at which latency was measured.
    pub rate: f64,
    /// Milliseconds from the time at which a request was due to its whole answer: half of all requests, 99 of 100.
    pub latency: [f64; 2],
    /// Streamed tokens a second, as fast as they were taken.
    pub tokens: f64,
    /// With many streams open, each token sent by itself.
    pub open: Option<Open>,
}

/// Many streams.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Open {
    /// Bytes that the proxy held.
    pub resident: u64,
    /// Tokens in a second of its processor time.
    pub per_processor: f64,
}

impl<'a> Bench<'a> {
    /// Starts everything.
    ///
    /// # Errors
    /// A program does not start.
    pub fn start(ground: &'a Ground, quick: bool) -> Result<Self> {
        // The stub first: it is what the others wait for.
        let order = [Contestant::Direct, Contestant::Lathe, Contestant::Nginx, Contestant::LiteLlm];
        let started = order.into_iter().map(|who| Ok((who, ground.start(who)?))).collect::<Result<_>>()?;
        Ok(Self { ground, started, seconds: if quick { 2.0 } else { 5.0 } })
    }

    /// Asks one of them everything; at half of what `first` could do, or half of what it can itself where that is less.
    ///
    /// # Errors
    /// An answer is wrong or does not come.
    pub fn measure(&self, contestant: Contestant, first: Option<&Measured>) -> Result<Measured> {
        let (_, started) =
            self.started.iter().find(|(who, _)| *who == contestant).context("it was not started")?;
        let load = |model, connections: usize, more: &[String]| {
            self.load(started, model, connections, more)
                .with_context(|| format!("{}: {connections} clients of `{model}`", contestant.name()))
        };
        let whole = load(FAST, CONNECTIONS, &[])?;
        let requests = whole.answers / whole.seconds;
        let rate = (first.map_or(requests, |first| first.requests).min(requests) / 2.0).max(1.0);
        let timed = load(FAST, CONNECTIONS, &[format!("rate={rate}")])?;
        let streamed = load(FAST, CONNECTIONS, &[format!("tokens={TOKENS}")])?;
        let open = match contestant {
            Contestant::Lathe | Contestant::Nginx => {
                let more = [format!("tokens={STREAM_TOKENS}"), "hold=1".to_owned()];
                let open = load(PACED, STREAMS, &more)?;
                Some(Open { resident: open.resident, per_processor: open.tokens / open.processor })
            }
            // The one has no memory to be measured, the other takes minutes to open them.
            Contestant::Direct | Contestant::LiteLlm => None,
        };
        Ok(Measured {
            requests,
            per_processor: whole.answers / whole.processor,
            rate,
            latency: [timed.p50 / 1e3, timed.p99 / 1e3],
            tokens: streamed.tokens / streamed.seconds,
            open,
        })
    }

    fn load(&self, started: &Started, model: &str, connections: usize, more: &[String]) -> Result<Seen> {
        let mut command = self.ground.cores.other(&self.ground.traffic);
        command.arg("load").arg(format!("address={}", started.address)).arg(format!("key={KEY}"));
        command.arg(format!("model={model}")).arg(format!("connections={connections}"));
        command.args(["warm=1".to_owned(), format!("seconds={}", self.seconds)]).args(more);
        command.args(started.process.map(|pid| format!("pids={pid}")));
        Ok(serde_json::from_str(&command::run(&mut command)?)?)
    }
}

impl Measured {
    /// In one line.
    pub fn words(&self) -> String {
        let Self { requests, per_processor, tokens, latency: [p50, p99], open, .. } = self;
        let open =
            open.map_or(String::new(), |open| format!(", {} with {STREAMS} streams", bytes(open.resident)));
        format!(
            "{requests:.0} requests/s, {per_processor:.0} a CPU-second, {tokens:.0} tokens/s, p50 {} ms, p99 {} ms{open}",
            number(*p50),
            number(*p99),
        )
    }
}
