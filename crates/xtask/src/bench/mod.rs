//! `cargo xtask bench`: how fast and how large the engine, the operator and the gateway are, as shares of what the machine can do
//! and beside others.

pub(crate) mod ask;
mod engine;
mod gateway;
mod limits;
mod machine;
mod models;
mod operator;
pub(crate) mod page;
mod peers;
mod proc;
pub(crate) mod process;
mod profile;
mod report;
mod scaling;
mod stats;
pub(crate) mod table;
mod work;
mod worker;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use lathe_plan::{Precision, TrainMethod};
use serde_json::{Value, json};

use crate::images::programs;
use crate::{paths, ui};
use engine::{Bench, Effort, Held, Row, lora};
use limits::Limits;
use machine::Machine;
use models::Model;
use table::Table;

/// Measure speed and memory, of the engine, the operator and the gateway, and how fast replicas follow a load.
#[derive(clap::Args)]
pub struct Args {
    /// This part alone.
    #[arg(value_enum)]
    part: Option<Part>,
    /// Fewer and shorter runs: for a look, not for a page.
    #[arg(long)]
    quick: bool,
    /// Of the engine, instead: the same work by torch, llama.cpp and OpenVINO too (installs them once).
    #[arg(long, requires = "part")]
    peers: bool,
    /// Rounds beside the peers (5; with --quick 1).
    #[arg(long, value_name = "N", requires = "peers", value_parser = clap::value_parser!(u8).range(1..))]
    rounds: Option<u8>,
    /// Instead, where the time of each operation of a model of half a billion goes, with its share of the limit that binds it,
    /// and traces for Perfetto.
    #[arg(long, conflicts_with_all = ["part", "quick", "peers", "json", "write"])]
    profile: bool,
    /// Write every figure as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Put the tables into docs/benchmarks.md.
    #[arg(long)]
    write: bool,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Training and serving.
    Engine,
    /// Reconciling 500 objects.
    Operator,
    /// Requests and streams, beside nginx and LiteLLM (fetches them once).
    Gateway,
    /// From zero, and up under load, on a cluster of its own (needs root); by its name alone.
    Scaling,
}

impl Part {
    /// Those that need no cluster.
    const ALL: [Self; 3] = [Self::Engine, Self::Operator, Self::Gateway];

    /// The program that is measured, where it is one.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Engine => Some("lathe-worker"),
            Self::Operator => Some("lathe-operator"),
            Self::Gateway => Some("lathe-gateway"),
            Self::Scaling => None,
        }
    }
}

/// What a part found.
struct Found {
    part: &'static str,
    tables: Vec<Table>,
    figures: Value,
    loads: [f64; 2],
}

/// Runs the command.
///
/// # Errors
/// Something does not build or run; the text has its last words.
pub fn run(args: &Args) -> Result<()> {
    if args.profile {
        return profile::run();
    }
    ensure!(
        !args.peers || args.part == Some(Part::Engine),
        "--peers goes with the engine: cargo xtask bench engine --peers"
    );
    let parts = args.part.map_or(Part::ALL.to_vec(), |only| vec![only]).into_iter();
    let machine = Machine::here();
    ui::heading(&format!("{}, {} cores, {}", machine.processor, machine.cores, machine.features.join(" ")));
    let minutes = |part| match (part, args.quick) {
        (Part::Engine, true) if args.peers => 20,
        (Part::Engine, false) if args.peers => 90,
        (Part::Engine, true) => 5,
        (Part::Engine, false) => 15,
        (Part::Operator, true) => 2,
        (Part::Operator, false) => 8,
        (Part::Gateway, true) => 2,
        (Part::Gateway, false) => 6,
        (Part::Scaling, true) => 5,
        (Part::Scaling, false) => 11,
    };
    let total: u32 = parts.clone().map(minutes).sum();
    ui::heading(&format!("about {total} minutes on 2 cores, and up to 10 more where nothing is built yet"));
    let packages: Vec<_> = parts.clone().filter_map(Part::program).collect();
    let mut built = Vec::new();
    if !packages.is_empty() {
        let step = ui::step(format!("build {}", packages.join(", ")));
        step.expect("up to 10 minutes from scratch on 2 cores");
        built = programs::workspace(&packages)?;
        step.done("");
    }
    let mut built = built.into_iter();

    let mut all = Vec::new();
    for part in parts {
        let mut program = || built.next().context("cargo built fewer programs than were asked for");
        let load = machine::load();
        let mut found = match part {
            Part::Engine if args.peers => peers::run(program()?, args.quick, args.rounds.map(usize::from))?,
            Part::Engine => engine_part(&program()?, args)?,
            Part::Operator => operator::run(&program()?, args.quick)?,
            Part::Gateway => gateway::run(&program()?, args.quick)?,
            Part::Scaling => scaling::run(args.quick)?,
        };
        found.loads[0] = load;
        found.tables.iter().for_each(|table| println!("\n{}", table.text()));
        if args.write {
            page::write(&machine, args.quick, &found)?;
        }
        all.push(found);
    }
    if let Some(file) = &args.json {
        let parts: serde_json::Map<_, _> =
            all.into_iter().map(|found| (found.part.to_owned(), found.figures)).collect();
        let whole = json!({"machine": machine, "parts": parts});
        fs::write(file, serde_json::to_vec_pretty(&whole)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn engine_part(worker: &Path, args: &Args) -> Result<Found> {
    let cache = paths::cache()?.join("bench");
    fs::create_dir_all(&cache)?;
    // One name: what a run that was stopped has left is emptied by the next.
    let scratch = worker::empty_folder(&cache, "engine")?;
    let bench = Bench { program: worker.to_path_buf(), scratch };
    let mut engine = Engine { limits: Limits::build()?, rows: Vec::new(), held: Vec::new() };
    let measured = engine.measure(&bench, args);
    let folder = bench.scratch.display();
    let cleaned = fs::remove_dir_all(&bench.scratch).with_context(|| format!("cannot remove {folder}"));
    let found = engine.found();
    if let (Err(_), Ok(found)) = (&measured, &found) {
        // Minutes of measurements are not lost with what failed after them.
        found.tables.iter().for_each(|table| println!("\n{}", table.text()));
    }
    measured.and(cleaned)?;
    found
}

/// What is known of the engine so far.
struct Engine {
    limits: Limits,
    rows: Vec<Row>,
    held: Vec<Held>,
}

impl Engine {
    fn measure(&mut self, bench: &Bench, args: &Args) -> Result<()> {
        let step = ui::step("random weights in the shape of a model of half a billion");
        let q05 = models::random("Q05", models::q05(), &paths::cache()?.join("bench/models/Q05"))?;
        step.done("");
        let demo = models::demo()?;
        let (few, many) = efforts(args.quick);
        self.limit()?;
        self.train(bench, &demo, &TrainMethod::Full, Precision::F32, many)?;
        self.train(bench, &demo, &lora(), Precision::F32, many)?;
        self.serve(bench, &demo, Precision::F32, many)?;
        let both = [Precision::BF16, Precision::F32];
        for precision in both {
            self.limit()?;
            self.train(bench, &q05, &lora(), precision, few)?;
        }
        for precision in [Precision::BF16, Precision::F32, Precision::Int8, Precision::Int4] {
            self.limit()?;
            self.serve(bench, &q05, precision, few)?;
        }
        self.limit()
    }

    fn found(&self) -> Result<Found> {
        let Self { limits, rows, held } = self;
        let ceilings = limits.ceilings()?;
        let tables = vec![limits.table(), report::speed(rows, &ceilings)?, report::memory(held)];
        let figures = json!({"limits": ceilings, "speed": rows, "memory": held});
        Ok(Found { part: "engine", tables, figures, loads: [0.0, machine::load()] })
    }

    fn train(
        &mut self,
        bench: &Bench,
        model: &Model,
        method: &TrainMethod,
        precision: Precision,
        effort: Effort,
    ) -> Result<()> {
        let how = if *method == TrainMethod::Full { "full training" } else { "LoRA training" };
        let step = ui::step(format!("{}, {precision:?}: {how}", model.name));
        let (row, memory) = bench.train(model, method, precision, effort)?;
        step.done(&row.words());
        self.rows.push(row);
        self.held.push(memory);
        Ok(())
    }

    fn serve(&mut self, bench: &Bench, model: &Model, precision: Precision, effort: Effort) -> Result<()> {
        let step = ui::step(format!("{}, {precision:?}: serving", model.name));
        let (found, memory) = bench.serve(model, precision, effort)?;
        let shown: Vec<String> = found.iter().map(Row::words).collect();
        step.done(&shown.join("; "));
        self.rows.extend(found);
        self.held.push(memory);
        Ok(())
    }

    fn limit(&mut self) -> Result<()> {
        let step = ui::step("limits of the machine");
        self.limits.measure()?;
        let shown = self.limits.ceilings()?.map(|ceiling| {
            format!("reads {:.1} GB/s, f32 {:.0} GFLOP/s", ceiling.read / 1e9, ceiling.f32 / 1e9)
        });
        step.done(&shown.join("; by processor time "));
        Ok(())
    }
}

/// Of the large model, and of the small one.
fn efforts(quick: bool) -> (Effort, Effort) {
    let few = Effort { warm_up: 1, stretches: 3, steps: 1, runs: 3, answer: 32 };
    let many = Effort { warm_up: 10, stretches: 5, steps: 20, runs: 7, answer: 256 };
    if quick {
        return (
            Effort { stretches: 1, runs: 1, answer: 16, ..few },
            Effort { stretches: 2, runs: 3, answer: 128, ..many },
        );
    }
    (few, many)
}
