//! The `lathe` command, also `kubectl lathe`: see docs/architecture.md.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cluster;
mod failure;
mod keys;
mod manifest;
mod output;
mod run;
mod stop;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use failure::{Done, Problem};
use output::{Output, note};

/// Tune, measure and serve language models: with processes on this machine, or in a cluster that runs Lathe.
///
/// Next: `lathe run -f examples/quickstart/` tunes and serves a small model here, in about a minute.
#[derive(Parser)]
#[command(name = "lathe", version, after_long_help = failure::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Args),
    Status(cluster::status::Args),
    Logs(cluster::logs::Args),
    Chat(cluster::chat::Args),
    Keys(keys::Args),
}

fn main() -> ExitCode {
    let (cli, output) = parsed();
    let ended = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Problem::transient("InternalError", format!("no threads: {error}")))
        .and_then(|runtime| {
            let ended = runtime.block_on(carry_out(cli.command));
            // A thread that reads from the terminal must not hold up the exit.
            runtime.shutdown_background();
            ended
        });
    match ended {
        Ok(()) => {
            if output == Output::Json {
                output::say(r#"{"event":"ended","exitCode":0}"#);
            }
            ExitCode::SUCCESS
        }
        Err(problem) => {
            match output {
                Output::Text => note(&format!("lathe: {}: {}", problem.reason, problem.message)),
                Output::Json => {
                    let Problem { code, reason, message } = &problem;
                    let last = serde_json::json!({"event": "ended", "exitCode": code, "reason": reason, "message": message});
                    output::say(&last.to_string());
                }
            }
            ExitCode::from(u8::try_from(problem.code).unwrap_or(1))
        }
    }
}

/// The command line; help says `kubectl lathe` where kubectl has started us.
fn parsed() -> (Cli, Output) {
    let own = std::env::args_os().next().map(std::path::PathBuf::from).unwrap_or_default();
    let plugin = own.file_stem().is_some_and(|name| name == "kubectl-lathe");
    let command = if plugin { Cli::command().bin_name("kubectl lathe") } else { Cli::command() };
    let cli = Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    let output = match &cli.command {
        Command::Run(args) => args.output,
        _ => Output::Text,
    };
    (cli, output)
}

async fn carry_out(command: Command) -> Done<()> {
    match command {
        Command::Run(args) => run::run(args).await,
        Command::Status(args) => cluster::status::run(&args).await,
        Command::Logs(args) => cluster::logs::run(&args).await,
        Command::Chat(args) => cluster::chat::run(args).await,
        Command::Keys(args) => keys::run(&args),
    }
}
