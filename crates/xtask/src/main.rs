//! Build tasks of the repository: test, bench, generate, images, cluster, demo-model, simulate.

use std::process::ExitCode;

use clap::Parser;
use xtask::{bench, cluster, demo, demo_model, generate, images, simulate, test};

/// Build tasks of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask", version, disable_help_subcommand = true)]
enum Task {
    Bench(bench::Args),
    #[command(subcommand)]
    Cluster(cluster::cli::Command),
    Demo(demo::Args),
    DemoModel(demo_model::Args),
    Generate(generate::Args),
    Images(images::cli::Args),
    Simulate(simulate::Args),
    Test(test::Args),
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Bench(args) => bench::run(&args),
        Task::Cluster(command) => cluster::cli::run(&command),
        Task::Demo(args) => demo::run(&args),
        Task::DemoModel(args) => demo_model::run(&args),
        Task::Generate(args) => generate::run(&args),
        Task::Images(args) => images::cli::run(&args),
        Task::Simulate(args) => simulate::run(&args),
        Task::Test(args) => test::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
