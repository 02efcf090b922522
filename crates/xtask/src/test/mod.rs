//! `cargo xtask test`: every test, in layers, from the cheapest that can catch the bug.

mod chart;
pub(crate) mod clusters;
pub(crate) mod programs;

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{command, generate, paths, toolchain, ui};
use programs::{NOTHING, TestProgram, run_all};

/// Kernel levels of the engine, by the feature that the processor must have.
const LEVELS: [(&str, &[&str]); 6] = [
    ("amx_emulated", &[]),
    ("portable", &[]),
    ("avx2", &["avx2", "fma"]),
    ("avx512", &["avx512f", "avx512bw", "avx512dq", "avx512vl"]),
    ("avx512_bf16", &["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"]),
    (
        "amx",
        &["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"],
    ),
];

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
    /// The gateway's page, in Debian's Chromium.
    Page,
    /// A real API server: admission, the operator's writes.
    ControlPlane,
    /// A real node: the main job from end to end.
    E2e,
    /// The control-plane layer on the oldest and the newest Kubernetes, and the same images from two checkouts. Runs only
    /// where it is asked for, since each takes minutes to build.
    Compat,
}

/// Runs the command.
///
/// # Errors
/// A test fails, or what it needs cannot be had; the text names the layers.
pub fn run(args: &Args) -> Result<()> {
    let all = [Layer::Unit, Layer::Engine, Layer::Chart, Layer::Page, Layer::ControlPlane, Layer::E2e];
    let layers = if args.only.is_empty() { &all[..] } else { &args.only[..] };
    // The chart needs none.
    let programs = if layers == [Layer::Chart] { Vec::new() } else { programs::build()? };
    let mut rows = Vec::new();
    for &layer in layers {
        ui::heading(&format!("\n== {layer:?}"));
        let started = Instant::now();
        let ended = match layer {
            Layer::Unit => unit(&programs),
            Layer::Engine => engine(&programs),
            Layer::Chart => chart::run(),
            Layer::Page => page(&programs),
            Layer::ControlPlane => clusters::control_plane(&programs),
            Layer::E2e => clusters::e2e(&programs),
            Layer::Compat => clusters::compat(&programs),
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

fn unit(programs: &[TestProgram]) -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
    generate::run(&generate::Args { check: true })?;
    let elsewhere = ["lathe-engine", "lathe-worker", "lathe-e2e"];
    let here = |program: &&TestProgram| {
        !elsewhere.contains(&&*program.package) && !clusters::OF_XTASK.contains(&&*program.name)
    };
    run_all(programs.iter().filter(here), NOTHING, &[])?;
    cargo(&["test", "--workspace", "--doc"])
}

fn engine(programs: &[TestProgram]) -> Result<()> {
    python()?;
    let features = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    for (level, needs) in LEVELS {
        if !needs.iter().all(|need| features.split_whitespace().any(|word| word == *need)) {
            ui::note(&format!("kernel level {level}: skipped, this processor lacks it"));
            continue;
        }
        ui::heading(&format!("-- kernel level {level}"));
        let engine = programs.iter().filter(|program| program.package == "lathe-engine");
        // Those that need Python are ignored elsewhere.
        run_all(engine, &[("LATHE_CPU", level)], &["--include-ignored"])?;
    }
    run_all(programs.iter().filter(|program| program.package == "lathe-worker"), NOTHING, &[])
}

/// The tests that need a browser are ignored elsewhere.
fn page(programs: &[TestProgram]) -> Result<()> {
    // Without a font there is no text to be too wide.
    toolchain::packages(&[
        ("chromium", "chromium"),
        ("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf", "fonts-dejavu-core"),
    ])?;
    let gateway = programs.iter().filter(|program| program.package == "lathe-gateway");
    // Each starts a browser, which is many threads already.
    run_all(gateway, &[("RUST_TEST_THREADS", "1")], &["--ignored"])
}

/// The interpreter with the reference implementations that tests compare with, installed where need be.
///
/// # Errors
/// They cannot be had; the text says what lacks.
pub fn python() -> Result<String> {
    toolchain::venv()?;
    toolchain::packages(&[("readelf", "binutils"), ("cc", "gcc")])?;
    let step = ui::step("Python reference packages");
    step.expect("about 5 minutes the first time");
    let said =
        command::run(Command::new("python3").arg("tests/python/setup.py").current_dir(paths::repository()))?;
    let python = said.lines().last().unwrap_or_default();
    step.done(python);
    Ok(python.to_owned())
}

fn cargo(args: &[&str]) -> Result<()> {
    let mut cargo = command::cargo();
    let status = cargo.args(args).status().context("cannot start cargo")?;
    if !status.success() {
        bail!("cargo {} ended with {status}", args.join(" "));
    }
    Ok(())
}
