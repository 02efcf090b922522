//! `cargo xtask test`: every test, in layers, from the cheapest that can catch the bug.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::cluster::{self, Cluster};
use crate::{command, generate, images, paths, toolchain, ui};

/// Kernel levels of the engine, by the feature that the processor must have.
const LEVELS: [(&str, &[&str]); 2] = [("portable", &[]), ("avx2", &["avx2", "fma", "f16c"])];

/// Run the tests, installing what they need.
#[derive(clap::Args)]
pub struct Args {
    /// These layers alone.
    #[arg(long, value_enum)]
    only: Vec<Layer>,
}

/// A group of tests that need the same things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layer {
    /// Form, lints, generated files, and all that needs nothing but a compiler.
    Unit,
    /// Engine and worker, against the public Python packages.
    Engine,
    /// Chart and manifests.
    Chart,
    /// A real API server: admission, the operator's writes.
    ControlPlane,
    /// A real node: the main job from end to end.
    E2e,
}

/// Runs the command.
///
/// # Errors
/// A test fails, or what it needs cannot be had; the text names the layers.
pub fn run(args: &Args) -> Result<()> {
    let all = [Layer::Unit, Layer::Engine, Layer::Chart, Layer::ControlPlane, Layer::E2e];
    let mut rows = Vec::new();
    for layer in all.into_iter().filter(|layer| args.only.is_empty() || args.only.contains(layer)) {
        ui::heading(&format!("\n== {layer:?}"));
        let started = Instant::now();
        let ended = match layer {
            Layer::Unit => unit(),
            Layer::Engine => engine(),
            Layer::Chart => chart(),
            Layer::ControlPlane => control_plane(),
            Layer::E2e => e2e(),
        };
        if let Err(error) = &ended {
            eprintln!("{layer:?} failed: {error:#}");
        }
        rows.push((layer, started.elapsed().as_secs(), ended.is_ok()));
    }
    ui::heading("\nLayer         Time    Result");
    for (layer, seconds, passed) in &rows {
        let result = if *passed { "passed" } else { "FAILED" };
        ui::heading(&format!(
            "{:<12}  {:>2}:{:02}   {result}",
            format!("{layer:?}"),
            seconds / 60,
            seconds % 60
        ));
    }
    let failed: Vec<String> = rows.iter().filter(|row| !row.2).map(|row| format!("{:?}", row.0)).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn unit() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
    generate::run(&generate::Args { check: true })?;
    cargo(&[
        "test",
        "--workspace",
        "--exclude",
        "lathe-engine",
        "--exclude",
        "lathe-worker",
        "--exclude",
        "lathe-e2e",
    ])
}

fn engine() -> Result<()> {
    python()?;
    let features = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    for (level, needs) in LEVELS {
        if !needs.iter().all(|need| features.split_whitespace().any(|word| word == *need)) {
            ui::note(&format!("kernel level {level}: skipped, this processor lacks it"));
            continue;
        }
        ui::heading(&format!("-- kernel level {level}"));
        run_visible(cargo_command(&["test", "--package", "lathe-engine"]).env("LATHE_CPU", level))?;
    }
    cargo(&["test", "--package", "lathe-worker"])
}

/// The reference implementations that tests compare with.
fn python() -> Result<()> {
    toolchain::packages(&[("python3", "python3"), ("readelf", "binutils"), ("cc", "gcc")])?;
    if command::run(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_err() {
        toolchain::packages(&[("/usr/lib/python3.11/ensurepip/__init__.py", "python3-venv")])?;
    }
    let step = ui::step("Python reference packages");
    step.expect("about 5 minutes the first time");
    let python =
        command::run(Command::new("python3").arg("tests/python/setup.py").current_dir(paths::repository()))?;
    step.done(python.lines().last().unwrap_or_default());
    Ok(())
}

fn chart() -> Result<()> {
    let helm = toolchain::go_program(&toolchain::HELM)?;
    let chart = paths::repository().join("charts/lathe");
    let helm_run = |args: &[&str]| {
        command::run(Command::new(&helm).args(args).arg(&chart))
            .map(|_| ui::note(&format!("helm {}: ok", args.join(" "))))
    };
    helm_run(&["lint", "--strict"])?;
    helm_run(&["template", "lathe"])?;
    helm_run(&[
        "template",
        "lathe",
        "--set",
        "namespaces={a,b}",
        "--set",
        "readNodes=false",
        "--set",
        "serviceMonitor.enabled=true",
    ])?;
    let refused = command::run(
        Command::new(&helm).args(["template", "lathe", "--set", "operator.replicas=many"]).arg(&chart),
    );
    if refused.is_ok() {
        bail!("the chart accepts operator.replicas=many: values.schema.json is not in force");
    }
    Ok(())
}

fn control_plane() -> Result<()> {
    let options = cluster::Options { name: "lathe-test-control-plane".to_owned(), nodes: 0, fleet: 0 };
    with_cluster(&options, |cluster| test_against(cluster, "control_plane"))
}

fn e2e() -> Result<()> {
    let options = cluster::Options { name: "lathe-test".to_owned(), nodes: 1, fleet: 0 };
    with_cluster(&options, |cluster| {
        let folder = paths::cache()?.join("images");
        for image in images::build(images::REGISTRY)? {
            cluster.import_image(&images::write(&image, &folder)?)?;
        }
        test_against(cluster, "end_to_end")
    })
}

/// The cluster goes when the tests have passed, and stays for a look when they have not.
fn with_cluster(options: &cluster::Options, tests: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    cluster::down(&options.name)?;
    let cluster = cluster::up(options)?;
    let ended = tests(&cluster);
    if ended.is_ok() || std::env::var_os("CI").is_some() {
        cluster::down(&options.name)?;
    } else {
        ui::note(&format!(
            "cluster {0} is left for a look; `cargo xtask cluster down --name {0}` removes it",
            options.name
        ));
    }
    ended
}

fn test_against(cluster: &Cluster, name: &str) -> Result<()> {
    let helm = toolchain::go_program(&toolchain::HELM)?;
    let mut test =
        cargo_command(&["test", "--package", "lathe-e2e", "--test", name, "--", "--test-threads", "1"]);
    test.env("KUBECONFIG", cluster.kubeconfig()).env("LATHE_E2E", "1").env("LATHE_HELM", helm);
    run_visible(&mut test)
}

fn cargo(args: &[&str]) -> Result<()> {
    run_visible(&mut cargo_command(args))
}

fn cargo_command(args: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args).current_dir::<PathBuf>(paths::repository());
    cargo
}

fn run_visible(command: &mut Command) -> Result<()> {
    let status =
        command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !status.success() {
        let words: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        bail!("cargo {} ended with {status}", words.join(" "));
    }
    Ok(())
}
