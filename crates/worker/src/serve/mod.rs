//! `serve`: a model and its adapters behind OpenAI's API.
//!
//! [`http`] judges requests and answers them, [`door`] bounds how many there are, [`engine`] is the one thread that
//! computes, [`adapters`] says which model ids there are. A request goes: door, JSON to a bounded request, tokens, the
//! engine's queue, one batched step after the other, text, event, usage; [`embeddings`] goes the same way, to vectors.
//!
//! **Invariants.** Nothing that a client sends reaches the engine unjudged, nothing that a client does stops another's
//! answer, and nothing is held for a client without a bound.
mod adapters;
mod answer;
mod control;
mod door;
mod embeddings;
mod engine;
mod error;
mod http;
mod load;
mod mailbox;
mod metrics;
mod open;
mod prompt;
mod rate;
mod request;
mod stops;
mod vectors;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use lathe_contract::{Contract, Outcome, Phase, SERVE_PORT, ServeTask, Task, exit};
use lathe_telemetry::{SdkTracer, Traces};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::control::{self as control_port, Access, Control};
use crate::failure::{Done, Halt};
use crate::status::Status;
use crate::summary;
use adapters::Adapters;
use door::Door;
use engine::{EngineThread, Setup};
use error::ApiError;
use http::{App, Front};
use load::LoadMeter;
use metrics::Metrics;
use prompt::Prompter;

/// How long connections are still taken after SIGTERM, while other nodes learn that this replica is not ready.
const SETTLE: Duration = Duration::from_secs(5);
/// KiB of embeddings that are held for clients at a time: four of the largest answers.
const VECTORS: usize = 4 * lathe_http::MAX_BODY / 1024;
/// Time to write the last words of answers that were cut off.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the first adapters are waited for: one that its server does not give must not keep the base from answering.
const ADAPTERS: Duration = Duration::from_secs(10);
/// Prompts tokenised at a time.
const TOKENISING: usize = 2;

/// What the command line says beside the contract.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where users are served; `None`: port 8080 of the pod, or of this machine alone where the contract has no keys.
    pub serve_addr: Option<SocketAddr>,
    /// The control port's address.
    pub control_addr: Option<SocketAddr>,
    /// Port of the control port where it has no address.
    pub control_port: u16,
    /// File to write the chosen addresses to, as JSON.
    pub addr_file: Option<PathBuf>,
    /// Where the last words of a failure are written.
    pub summary: PathBuf,
    /// Collector of traces (OTLP over HTTP), `http://host:4318`; none: no spans are made.
    pub collector: Option<String>,
}

/// Serves until `stop`, then answers what is in flight, and returns the exit code. `abort` ends the waiting.
pub async fn run(
    contract: Contract,
    settings: Settings,
    stop: CancellationToken,
    abort: CancellationToken,
) -> i32 {
    let status = Status::default();
    let traces = settings.collector.as_deref().and_then(traces);
    let tracer = traces.as_ref().map(Traces::tracer);
    let served = async {
        let listeners = Listeners::open(&contract, &settings).await?;
        listeners.tell(settings.addr_file.as_deref())?;
        serve(contract, listeners, &status, tracer, stop, abort).await
    };
    let code = match served.await {
        Ok(()) | Err(Halt::Stopped) => exit::SUCCESS,
        Err(failed) => {
            let outcome: Outcome = summary::outcome(Err(failed), None);
            let code = summary::exit_code(&outcome);
            summary::write(&settings.summary, outcome);
            code
        }
    };
    // After the last words, which no collector that does not answer may cost.
    if let Some(traces) = traces {
        traces.end().await;
    }
    code
}

/// A collector that cannot be meant keeps nobody from being served.
fn traces(url: &str) -> Option<Traces> {
    Traces::start("lathe-worker", url).inspect_err(|error| tracing::error!("no traces: {error}")).ok()
}

/// The two open ports.
struct Listeners {
    serve: TcpListener,
    control: TcpListener,
}

impl Listeners {
    async fn open(contract: &Contract, settings: &Settings) -> Done<Self> {
        let access = access(contract)?;
        let control = control_port::listen(&access, settings.control_addr, settings.control_port).await?;
        let (what, serve) = match settings.serve_addr {
            None => (SERVE_PORT.to_string(), control_port::bind(&access, SERVE_PORT).await),
            Some(address) => (address.to_string(), TcpListener::bind(address).await),
        };
        let serve = serve.map_err(|error| {
            Halt::transient("PortTaken", format!("port {what}: {error}"), "free the port")
        })?;
        Ok(Self { serve, control })
    }

    /// One line of JSON on stderr, whatever the log's form, and the same in a file.
    fn tell(&self, file: Option<&Path>) -> Done<()> {
        let failed = |error: std::io::Error| crate::failure::io(&error, &"the addresses cannot be told");
        let serve = self.serve.local_addr().map_err(failed)?.to_string();
        let control = self.control.local_addr().map_err(failed)?.to_string();
        let line = serde_json::json!({"message": "listening", "serveAddr": serve, "controlAddr": control});
        eprintln!("{line}");
        let Some(path) = file else { return Ok(()) };
        lathe_engine::files::write_atomically(path, |writer| {
            writeln!(writer, "{line}").map_err(|source| lathe_engine::files::FileError::Io {
                action: "write",
                path: path.to_owned(),
                source,
            })
        })
        .map_err(Halt::from)
    }
}

fn access(contract: &Contract) -> Done<Access> {
    Access::new(&contract.object, &contract.trust).map_err(|error| {
        Halt::user("InvalidContract", format!("`trust`: {error}"), "let the operator write it again")
    })
}

/// The whole life: open, load, serve, drain.
async fn serve(
    contract: Contract,
    listeners: Listeners,
    status: &Status,
    tracer: Option<SdkTracer>,
    stop: CancellationToken,
    abort: CancellationToken,
) -> Done<()> {
    let access = access(&contract)?;
    let local = access.is_open();
    let Task::Serve(task) = contract.task else {
        return Err(Halt::user("InvalidContract", "the task is not `serve`", "run the command for it"));
    };
    if !task.direct && contract.trust.gateway_key.is_none() {
        let cause = "`direct` is false and `trust.gatewayKey` is absent: nobody could ask";
        return Err(Halt::user("InvalidContract", cause, "let the operator write it again"));
    }
    let context = Context {
        object: contract.object,
        mounts: contract.mounts,
        status: status.clone(),
        stop: stop.clone(),
        runtime: Handle::current(),
    };
    let mut registry = Registry::default();
    let load = Arc::new(LoadMeter::new(Instant::now()));
    let metrics = Arc::new(Metrics::register(&mut registry, &task.model_id));
    let control = Arc::new(Control::new(access, status.clone(), registry));
    let front = Arc::new(Front {
        control: Arc::clone(&control),
        direct: task.direct,
        local: listeners.serve.local_addr().is_ok_and(|address| address.ip().is_loopback()),
        load: Arc::clone(&load),
        tracer,
        app: OnceLock::new(),
    });
    let ports = Ports::open(listeners, &front);

    let thread = tokio::select! {
        biased;
        () = stop.cancelled() => return Err(Halt::Stopped),
        started = start(&task, context.clone(), &load, metrics, &front) => started?,
    };
    control.set_ready(true);
    status.phase(Phase::Serving, serving(&task.model_id));
    let refresher = refresh(Arc::clone(&front), context);
    let Started { mut engine, door } = thread;
    let died = tokio::select! {
        biased;
        died = &mut engine.died => Some(died),
        () = stop.cancelled() => None,
    };
    control.set_ready(false);
    ports.draining.cancel();
    status.phase(Phase::Draining, "answering what is in flight");
    if let Some(died) = died {
        // Every client has been told by its dropped poster.
        let _ = tokio::time::timeout(LAST_WORDS, ports.close()).await;
        return Err(died.unwrap_or_else(|_| {
            let next = "nothing: the pod is restarted; report it to Lathe's maintainers with the log";
            Halt::transient("EngineFailed", "the engine's thread panicked", next)
        }));
    }
    let budget = Duration::from_secs(u64::try_from(task.drain_seconds).unwrap_or(0));
    let settle = if local { Duration::ZERO } else { SETTLE.min(budget / 3) };
    let drained = async {
        tokio::time::sleep(settle).await;
        ports.stop.cancel();
        door.close();
        door.empty().await;
    };
    let in_time = tokio::select! {
        biased;
        () = abort.cancelled() => false,
        drained = tokio::time::timeout(budget, drained) => drained.is_ok(),
    };
    if !in_time {
        door.close();
        tracing::warn!("answers in flight are cut off");
        engine
            .engine()
            .abort(ApiError::unavailable("shutting_down", "This replica is shutting down; ask again."));
    }
    // The last bytes of answers that are over, as far as their clients take them.
    let _ = tokio::time::timeout(LAST_WORDS, ports.close()).await;
    refresher.abort();
    Ok(())
}

/// The report's words for a person while all is well.
fn serving(base: &str) -> String {
    format!("serving `{base}`")
}

/// The tasks behind the two ports.
struct Ports {
    draining: CancellationToken,
    stop: CancellationToken,
    serve: JoinHandle<()>,
}

impl Ports {
    fn open(listeners: Listeners, front: &Arc<Front>) -> Self {
        let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
        let extra = control::routes(Arc::clone(front));
        let router = control_port::router(Arc::clone(&front.control), extra);
        // Open to the end: the last thing to be seen is what is being drained.
        let bounds = control_port::BOUNDS;
        tokio::spawn(lathe_http::serve(listeners.control, router, bounds, CancellationToken::new()));
        let router = lathe_http::last_answers(http::router(Arc::clone(front)), draining.clone());
        let serve = lathe_http::serve(listeners.serve, router, bounds, stop.clone());
        Self { draining, stop, serve: tokio::spawn(serve) }
    }

    /// Takes no connection more and waits for those that are being answered.
    async fn close(self) {
        self.stop.cancel();
        drop(self.serve.await);
    }
}

struct Started {
    engine: EngineThread,
    door: Arc<Door>,
}

/// Brings the model here and into the engine, then its adapters; the serving port answers from here on.
async fn start(
    task: &ServeTask,
    context: Context,
    load: &Arc<LoadMeter>,
    metrics: Arc<Metrics>,
    front: &Arc<Front>,
) -> Done<Started> {
    context.status.phase(Phase::Fetching, "fetching the model");
    let (fetch_task, fetch_context) = (task.clone(), context.clone());
    let opened = blocking("opening the model", move || open::open(&fetch_task, &fetch_context)).await?;
    let open::Opened { files, weights_digest, shape, plan, precision, template, bos, eos, fingerprint } =
        opened;
    context.status.phase(Phase::Loading, "loading weights");
    let (what, dir, of) = (format!("model `{}`", task.model.name), files.dir.clone(), shape.clone());
    let tokenizer = blocking("reading the tokenizer", move || open::tokenizer(&dir, &of, &what));
    let (threads, room) = (plan.threads, plan.context);
    let setup = Setup { eos, load: Arc::clone(load), metrics, plan };
    let model_shape = shape.clone();
    let weights = move || open::weights(&files.dir, &model_shape, precision, threads);
    // The tokenizer first: what is wrong with it is known long before large weights are there.
    let (tokenizer, engine) = tokio::try_join!(biased; tokenizer, EngineThread::start(weights, setup))?;
    let prompter = Prompter { tokenizer, template, bos, vocab: shape.vocab, context: room };

    let sources = task.adapters.iter().map(|adapter| &adapter.model).chain([&task.model]);
    let secret_dirs: BTreeSet<String> = sources.filter_map(|model| model.source.secret_dir.clone()).collect();
    let adapters = Adapters::new(
        &task.model_id,
        &shape,
        weights_digest,
        context.clone(),
        engine.engine().clone(),
        secret_dirs,
    );
    adapters
        .set(&task.adapters)
        .map_err(|problem| Halt::user("InvalidContract", problem, "correct the service's `adapterRefs`"))?;
    // Whoever is told of readiness finds every adapter that can be there soon; the report names the others.
    if tokio::time::timeout(ADAPTERS, adapters.settled()).await.is_err() {
        tracing::warn!("not every adapter is here yet; the base answers without them");
    }
    let slots = usize::try_from(task.max_sequences).unwrap_or(1);
    let door = Door::new(slots, usize::try_from(task.max_waiting).unwrap_or(0), Arc::clone(load));
    let app = App {
        door: Arc::clone(&door),
        engine: engine.engine().clone(),
        tokenising: Arc::new(Semaphore::new(TOKENISING)),
        adapters,
        base: task.model_id.clone(),
        created: jiff::Timestamp::now().as_second(),
        fingerprint,
        hidden: shape.hidden,
        vectors: Arc::new(Semaphore::new(VECTORS)),
        // A token is seldom more than 16 bytes, and JSON can write a character in six.
        body_limit: prompter.context.saturating_mul(64).clamp(1 << 20, lathe_http::MAX_BODY),
        prompter,
    };
    // Set once, here.
    drop(front.app.set(app));
    Ok(Started { engine, door })
}

/// Work that takes its time, on a thread for such.
async fn blocking<T: Send + 'static>(what: &str, work: impl FnOnce() -> Done<T> + Send + 'static) -> Done<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| {
        let next = "report this to Lathe's maintainers, with the worker's log";
        Err(Halt::transient("InternalError", format!("{what} panicked: {panic}"), next))
    })
}

/// Keeps the report's figures fresh, also while nothing happens.
fn refresh(front: Arc<Front>, context: Context) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            tick.tick().await;
            let load = front.load.read(Instant::now());
            context.status.update(|report| report.load = Some(load));
            if let Some(app) = front.app.get() {
                app.adapters.tell();
            }
        }
    })
}
