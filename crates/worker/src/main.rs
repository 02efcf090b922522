//! The Lathe worker: train, serve, evaluate, inspect, check-data.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lathe_contract::{CONTRACT_PATH, CONTRACT_VERSION, CONTROL_PORT, Contract, TERMINATION_LOG, Task, exit};
use lathe_telemetry::CollectorOptions;
use lathe_worker::failure::{Done, Halt};
use lathe_worker::{batch, serve, summary};
use tokio_util::sync::CancellationToken;

/// Longest contract that is read; a ConfigMap holds at most 1 MiB.
const MAX_CONTRACT: u64 = 1 << 20;

/// Carries out one task of Lathe: what to do stands in a contract, which the operator (or `lathe run`) writes.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    task: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tune a model, measure it before and after, and write the result.
    Train(Paths),
    /// Serve a model and its adapters.
    Serve(ServePaths),
    /// Measure a model.
    Evaluate(Paths),
    /// Read what a model is, without its weights.
    Inspect(Paths),
    /// Check a dataset, row by row.
    CheckData(Paths),
}

#[derive(Args)]
struct ServePaths {
    #[command(flatten)]
    paths: Paths,
    /// Where users are served, instead of port 8080.
    #[arg(long)]
    serve_addr: Option<SocketAddr>,
    #[command(flatten)]
    collector: CollectorOptions,
}

#[derive(Args)]
struct Paths {
    /// What to do, as JSON.
    #[arg(long, default_value = CONTRACT_PATH)]
    contract: PathBuf,
    /// Port for probes, metrics and the report; 0 takes a free one.
    #[arg(long, default_value_t = CONTROL_PORT)]
    control_port: u16,
    /// Address for probes, metrics and the report, instead of a port.
    #[arg(long)]
    control_addr: Option<SocketAddr>,
    /// File to write the addresses to, as JSON, once they are open.
    #[arg(long)]
    addr_file: Option<PathBuf>,
    /// Where the last words are written.
    #[arg(long, default_value = TERMINATION_LOG)]
    summary: PathBuf,
    /// End as after SIGTERM once standard input closes: whoever started this process is gone then.
    #[arg(long)]
    stop_with_stdin: bool,
}

fn main() -> ExitCode {
    init_log();
    let (mut serve_addr, mut collector) = (None, None);
    let (name, paths) = match Cli::parse().task {
        Command::Train(paths) => ("train", paths),
        Command::Serve(serve) => {
            serve_addr = serve.serve_addr;
            collector = serve.collector.url();
            ("serve", serve.paths)
        }
        Command::Evaluate(paths) => ("evaluate", paths),
        Command::Inspect(paths) => ("inspect", paths),
        Command::CheckData(paths) => ("check-data", paths),
    };
    let contract = read_contract(&paths.contract).and_then(|contract| matching(contract, name));
    let code = match contract.and_then(runnable) {
        Ok(contract) => run(contract, paths, serve_addr, collector),
        Err(halt) => {
            let outcome = summary::outcome(Err(halt), None);
            let code = summary::exit_code(&outcome);
            summary::write(&paths.summary, outcome);
            code
        }
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn run(contract: Contract, paths: Paths, serve_addr: Option<SocketAddr>, collector: Option<String>) -> i32 {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no threads");
            return exit::TRANSIENT;
        }
    };
    let Paths { contract: _, control_port, control_addr, addr_file, summary, stop_with_stdin } = paths;
    let code = runtime.block_on(async {
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        if let Err(error) = stop_on_signals(&stop, &abort) {
            tracing::warn!(%error, "SIGTERM cannot be heard");
        }
        if stop_with_stdin {
            let stop = stop.clone();
            // Ends with the process; reading is all that it does.
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
                stop.cancel();
            });
        }
        if matches!(contract.task, Task::Serve(_)) {
            let settings =
                serve::Settings { serve_addr, control_addr, control_port, addr_file, summary, collector };
            return serve::run(contract, settings, stop, abort).await;
        }
        let settings = batch::Settings { control_addr, control_port, addr_file, summary };
        batch::run(contract, settings, stop).await
    });
    // A thread that still computes must not hold up the exit.
    runtime.shutdown_background();
    code
}

/// SIGTERM (and Ctrl-C of a local run) asks the work to save or finish and end; a second one, not to finish.
fn stop_on_signals(stop: &CancellationToken, abort: &CancellationToken) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let tokens = [stop.clone(), abort.clone()];
    tokio::spawn(async move {
        for token in tokens {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
        }
    });
    Ok(())
}

fn read_contract(path: &Path) -> Done<Contract> {
    use std::io::Read;
    let invalid = |cause: String| {
        let cause = format!("contract {}: {cause}", path.display());
        Halt::user("InvalidContract", cause, "let the operator (or `lathe run`) of this version write it")
    };
    let mut text = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_CONTRACT).read_to_end(&mut text))
        .map_err(|error| invalid(error.to_string()))?;
    let version: Version = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    if version.version != CONTRACT_VERSION {
        return Err(invalid(format!(
            "version {} is unknown, this worker reads version {CONTRACT_VERSION}",
            version.version
        )));
    }
    serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))
}

/// Read before all else: a later version may have other fields.
#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

fn matching(contract: Contract, name: &str) -> Done<Contract> {
    let asked = match contract.task {
        Task::Train(_) => "train",
        Task::Serve(_) => "serve",
        Task::Evaluate(_) => "evaluate",
        Task::Inspect(_) => "inspect",
        Task::CheckData(_) => "check-data",
    };
    if asked == name {
        return Ok(contract);
    }
    let cause = format!("the contract's task is `{asked}`, the command is `{name}`");
    Err(Halt::user("InvalidContract", cause, "run the command that the contract is for"))
}

/// Refuses a machine that is told wrongly before hours are spent on fetching.
fn runnable(contract: Contract) -> Done<Contract> {
    lathe_engine::device::cpu::Level::detect()?;
    Ok(contract)
}

/// `RUST_LOG` chooses what is told (default `info`), `LATHE_LOG=json` how.
fn init_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var("LATHE_LOG").is_ok_and(|form| form == "json") {
        log.json().init();
    } else {
        log.with_ansi(false).init();
    }
}
