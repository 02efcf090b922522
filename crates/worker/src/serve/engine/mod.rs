//! The engine's thread: it alone owns the [`lathe_engine::Generator`] and is spoken to by commands.
//!
//! A round is: take the commands, forget those whose clients left, fill free sequences from the queue, one batched
//! forward pass, hand each token and each embedding to its client. Nothing in a round waits for a client.
mod capacity;
mod learning;
mod queue;
mod round;
mod sequence;
mod warm_up;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use lathe_engine::files::Tokenizer;
use lathe_engine::plan::ServePlan;
use lathe_engine::{Adapter, Model, Sampling};
use lathe_telemetry::RequestTrace;
use tokio::sync::oneshot;

use super::door::Place;
use super::error::ApiError;
use super::load::LoadMeter;
use super::mailbox::Poster;
use super::metrics::Metrics;
use super::stops::StopFilter;
use crate::failure::{Done, Halt};

pub use queue::EmbedJob;

/// A way to speak to the engine's thread.
#[derive(Clone, Debug)]
pub struct Engine {
    commands: Sender<Command>,
}

/// What the thread works with beside the model.
pub struct Setup {
    /// Every buffer.
    pub plan: ServePlan,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// Where load is told.
    pub load: Arc<LoadMeter>,
    /// Where everything is counted.
    pub metrics: Arc<Metrics>,
}

/// A request for an answer, judged and turned into tokens.
#[derive(Debug)]
pub struct Job {
    /// At least one token, and fewer than the context.
    pub prompt: Vec<u32>,
    /// Held to the end of the answer, so that the adapter stays.
    pub adapter: Option<Arc<Resident>>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// At least 1; with the prompt at most the context.
    pub max_tokens: usize,
    /// Turns tokens into text.
    pub tokenizer: Arc<Tokenizer>,
    /// Texts that end the answer.
    pub stops: StopFilter,
    /// Go on behind the model's own end.
    pub ignore_eos: bool,
    /// Where the answer goes.
    pub poster: Poster,
    /// Given back with the answer's end.
    pub place: Place,
    /// When the request came.
    pub arrived: Instant,
    /// Its spans, where it has any.
    pub trace: Option<RequestTrace>,
}

impl Job {
    /// Ends it unanswered; its place is free before its client is told.
    fn refuse(self, why: ApiError) {
        let Job { poster, place, trace, .. } = self;
        drop(place);
        trace.iter().for_each(|trace| why.traced(trace));
        poster.end(Err(why));
    }
}

/// An adapter in the engine: an immutable generation of a model id. The last holder's drop takes it away.
#[derive(Debug)]
pub struct Resident {
    key: u64,
    /// Its model id, for metrics.
    pub name: String,
    commands: Sender<Command>,
}

#[derive(Debug)]
enum Command {
    Generate(Box<Job>),
    Embed(EmbedJob),
    AddAdapter {
        key: u64,
        adapter: Box<Adapter>,
        reply: oneshot::Sender<Result<(), lathe_engine::Error>>,
    },
    RemoveAdapter(u64),
    /// Ends everything in flight with an error.
    Abort(ApiError),
    /// The next forward pass panics.
    #[cfg(test)]
    Panic,
    Stop,
}

/// The running thread.
#[derive(Debug)]
pub struct EngineThread {
    engine: Engine,
    thread: Option<JoinHandle<()>>,
    /// Tells why the thread ended before it was asked to.
    pub died: oneshot::Receiver<Halt>,
}

impl EngineThread {
    /// Loads the model on a new thread, and is back once it has produced a token.
    ///
    /// # Errors
    /// What `load` says; the plan does not fit; the warm-up token did not come.
    pub async fn start(load: impl FnOnce() -> Done<Model> + Send + 'static, setup: Setup) -> Done<Self> {
        let (commands, received) = channel();
        let (tell_ready, ready) = oneshot::channel();
        let (tell_death, died) = oneshot::channel();
        let body = move || {
            let round = match load().and_then(|model| round::Round::new(model, setup)) {
                Ok(round) => round,
                Err(halt) => return drop(tell_ready.send(Err(halt))),
            };
            // Nobody listens any more where the process was told to stop meanwhile.
            if tell_ready.send(Ok(())).is_ok()
                && let Err(halt) = round.run(&received)
            {
                drop(tell_death.send(halt));
            }
        };
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(body)
            .map_err(|error| Halt::transient("EngineFailed", error, "let the pod have more threads"))?;
        // Whoever stops waiting here leaves the thread to its loading and does not wait for it.
        match ready.await {
            Ok(result) => result.map(|()| Self { engine: Engine { commands }, thread: Some(thread), died }),
            Err(_) => Err(died_loading()),
        }
    }

    /// For those who ask it.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }
}

fn died_loading() -> Halt {
    let cause = "the engine panicked while it loaded the model";
    Halt::transient("EngineFailed", cause, "report this to Lathe's maintainers, with the worker's log")
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.engine.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has told so by `died`.
            drop(thread.join());
        }
    }
}

impl Engine {
    /// Queues a request. Where the thread is gone the job's poster says so to its client.
    pub fn generate(&self, job: Job) {
        self.send(Command::Generate(Box::new(job)));
    }

    /// As [`Engine::generate`].
    pub fn embed(&self, job: EmbedJob) {
        self.send(Command::Embed(job));
    }

    /// Makes an adapter resident under a name; `key` must never be used twice.
    ///
    /// # Errors
    /// No free slot, too large, another base; the thread is gone.
    pub fn add_adapter(&self, key: u64, name: String, adapter: Adapter) -> Done<Resident> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::AddAdapter { key, adapter: Box::new(adapter), reply });
        match answer.blocking_recv() {
            Ok(Ok(())) => Ok(Resident { key, name, commands: self.commands.clone() }),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(Halt::Stopped),
        }
    }

    /// Ends everything in flight with an error.
    pub fn abort(&self, why: ApiError) {
        self.send(Command::Abort(why));
    }

    #[cfg(test)]
    fn panic(&self) {
        self.send(Command::Panic);
    }

    fn send(&self, command: Command) {
        // The thread is gone only when the process ends; a job that is dropped here tells its client.
        drop(self.commands.send(command));
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        drop(self.commands.send(Command::RemoveAdapter(self.key)));
    }
}

type Commands = Receiver<Command>;

#[cfg(test)]
mod tests;
