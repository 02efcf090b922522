//! Tasks that end: run on a thread of their own, with the control port open, until done, failed or stopped.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use lathe_contract::{Contract, Outcome, Phase, TRAIN_GRACE_SECONDS, Task};
use prometheus_client::registry::Registry;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::control::{self, Access, Control};
use crate::failure::{Done, Halt, io};
use crate::status::Status;
use crate::{check_data, evaluate, inspect, summary, train};

/// Time from SIGTERM to the end, at most: a little less than that after which Kubernetes kills, for the last words.
const STOP_BUDGET: Duration = Duration::from_secs(TRAIN_GRACE_SECONDS as u64 - 10);

/// What the command line says beside the contract.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The control port's address.
    pub control_addr: Option<SocketAddr>,
    /// The control port, where it has no address; 0 takes a free one.
    pub control_port: u16,
    /// File to write the chosen address to, as JSON.
    pub addr_file: Option<PathBuf>,
    /// Where the summary is written.
    pub summary: PathBuf,
}

/// Runs the contract's task and returns the exit code.
pub async fn run(contract: Contract, settings: Settings, stop: CancellationToken) -> i32 {
    let status = Status::default();
    let outcome = match open_control(&contract, &settings, &status).await {
        Ok(()) => carry_out(contract, &status, stop).await,
        Err(halt) => summary::outcome(Err(halt), None),
    };
    status.update(|report| report.phase = Phase::Done);
    let code = summary::exit_code(&outcome);
    summary::write(&settings.summary, outcome);
    code
}

async fn open_control(contract: &Contract, settings: &Settings, status: &Status) -> Done<()> {
    let access = Access::new(&contract.object, &contract.trust).map_err(|error| {
        Halt::user("InvalidContract", format!("`trust`: {error}"), "let the operator write it again")
    })?;
    let listener = control::listen(&access, settings.control_addr, settings.control_port).await?;
    let address = listener.local_addr().map_err(|error| io(&error, &"the control port"))?;
    tracing::info!(%address, "control port is open");
    if let Some(path) = &settings.addr_file {
        let line = serde_json::json!({"message": "listening", "controlAddr": address.to_string()});
        std::fs::write(path, format!("{line}\n"))
            .map_err(|error| io(&error, &format!("cannot write {}", path.display())))?;
    }
    let control = Arc::new(Control::new(access, status.clone(), Registry::default()));
    control.set_ready(true);
    let router = control::router(control, Router::new());
    tokio::spawn(lathe_http::serve(listener, router, control::BOUNDS, CancellationToken::new()));
    Ok(())
}

async fn carry_out(contract: Contract, status: &Status, stop: CancellationToken) -> Outcome {
    let context = Context {
        object: contract.object,
        mounts: contract.mounts,
        status: status.clone(),
        stop: stop.clone(),
        runtime: Handle::current(),
    };
    let work = tokio::task::spawn_blocking(move || carry_out_blocking(&context, contract.task));
    let out_of_time = async {
        stop.cancelled().await;
        tracing::info!("asked to stop: saving");
        tokio::time::sleep(STOP_BUDGET).await;
    };
    let result = tokio::select! {
        biased;
        done = work => done.unwrap_or_else(|panic| {
            let next = "look at the log of the pod, and report it to Lathe's maintainers";
            Err(Halt::transient("InternalError", format!("the worker failed: {panic}"), next))
        }),
        () = out_of_time => {
            tracing::warn!("what was begun did not end within {} s, and no time is left", STOP_BUDGET.as_secs());
            Err(Halt::Stopped)
        }
    };
    summary::outcome(result, status.read().progress)
}

fn carry_out_blocking(context: &Context, task: Task) -> Done<Outcome> {
    match task {
        Task::Train(task) => train::run(context, &task),
        Task::Evaluate(task) => evaluate::run(context, &task),
        Task::Inspect(task) => inspect::run(context, &task),
        Task::CheckData(task) => check_data::run(context, &task),
        Task::Serve(_) => {
            let cause = "a serving task does not end, and is run by `lathe-worker serve`";
            Err(Halt::user("InvalidContract", cause, "run the command that the contract is for"))
        }
    }
}
