//! Build tasks of the repository: images, cluster.

use std::process::ExitCode;

use clap::Parser;
use xtask::{cluster, images};

/// Build tasks of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask", version, disable_help_subcommand = true)]
enum Task {
    #[command(subcommand)]
    Cluster(cluster::cli::Command),
    Images(images::cli::Args),
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Cluster(command) => cluster::cli::run(&command),
        Task::Images(args) => images::cli::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
