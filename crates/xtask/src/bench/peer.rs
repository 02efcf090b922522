//! The same work by torch, transformers and peft, in the same run.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use lathe_plan::Precision;
use serde::Serialize;
use serde_json::Value;

use super::engine::{Effort, PROMPT, RANK, ROW, Row, SEQUENCES, STEP_ROWS};
use super::models::Model;
use super::process::Watched;
use super::stats::{Figure, bytes, number};
use super::table::Table;
use crate::{command, paths};

const PATIENCE: Duration = Duration::from_secs(1800);

/// What the peer did.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    /// As [`Row::what`].
    pub what: String,
    /// Of all its numbers.
    pub precision: Precision,
    /// Tokens a second.
    pub rate: Figure,
    /// Tokens a second by the processor time that it used, as [`Row::by_processor`].
    pub by_processor: f64,
    /// The most memory that its process held, in bytes.
    pub resident: u64,
}

/// The interpreter with the packages, installed where need be.
///
/// # Errors
/// They cannot be had.
pub fn python() -> Result<String> {
    let mut setup = Command::new("python3");
    let said = command::run(setup.arg("tests/python/setup.py").current_dir(paths::repository()))?;
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

/// Lets it work on the model.
///
/// # Errors
/// It fails; the text has its last words.
pub fn run(
    python: &str,
    scratch: &Path,
    model: &Model,
    precision: Precision,
    work: &str,
    effort: Effort,
) -> Result<Vec<Peer>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let numbers =
        [threads, ROW, STEP_ROWS, RANK, PROMPT, SEQUENCES, effort.runs, effort.answer].map(|n| n.to_string());
    let log = scratch.join("peer.log");
    let mut command = Command::new(python);
    command
        .arg(paths::repository().join("crates/xtask/src/bench/peer.py"))
        .arg(&model.folder)
        .args([if precision == Precision::F32 { "f32" } else { "bf16" }, work])
        .args(numbers)
        .envs([("TRANSFORMERS_OFFLINE", "1"), ("TRANSFORMERS_VERBOSITY", "error")]);
    let mut process = Watched::start(&mut command, &log)?;
    process.finish("torch", PATIENCE)?;
    let resident = process.memory().resident;
    lines(&std::fs::read_to_string(&log)?)
        .map(|(what, rates, by_processor)| {
            let rate = Figure::of(rates).context("the peer measured nothing")?;
            Ok(Peer { what, precision, rate, by_processor, resident })
        })
        .collect()
}

/// What it told, among other things that its packages say.
fn lines(said: &str) -> impl Iterator<Item = (String, Vec<f64>, f64)> {
    said.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let runs = line["runs"].as_array()?.iter().filter_map(Value::as_f64).collect();
        Some((line["what"].as_str()?.to_owned(), runs, line["by_processor"].as_f64()?))
    })
}

/// Both side by side; ratios are those of the best of each, by the clock and by processor time.
pub fn table(rows: &[Row], peers: &[Peer]) -> Table {
    let headings =
        ["Q05", "Lathe bf16", "Lathe f32", "torch f32", "torch bf16", "best / best", "by processor time"];
    let mut table = Table::new("Beside torch, transformers and peft (tokens/s)", &headings);
    let mut done: Vec<&str> = Vec::new();
    for Peer { what, .. } in peers {
        if done.contains(&what.as_str()) {
            continue;
        }
        done.push(what);
        let ours = |precision| {
            let of = |row: &&Row| row.model == "Q05" && row.what == what && row.precision == precision;
            rows.iter().find(of).map(|row| (row.rate, row.by_processor))
        };
        let theirs = |precision| {
            let of = |peer: &&Peer| peer.what == *what && peer.precision == precision;
            peers.iter().find(of).map(|peer| (peer.rate, peer.by_processor))
        };
        let (f32, bf16) = (Precision::F32, Precision::BF16);
        let figures = [ours(bf16), ours(f32), theirs(f32), theirs(bf16)];
        let ratio = |of: fn(&(Figure, f64)) -> f64| {
            let best = |some: &[Option<(Figure, f64)>]| some.iter().flatten().map(of).reduce(f64::max);
            let ratio = best(&figures[..2]).zip(best(&figures[2..])).map(|(ours, theirs)| ours / theirs);
            ratio.map_or("-".to_owned(), |ratio| format!("{} x", number(ratio)))
        };
        let mut cells = vec![what.clone()];
        cells.extend(figures.map(|figure| figure.map_or("-".to_owned(), |(rate, _)| rate.shown())));
        cells.extend([ratio(|(rate, _)| rate.median), ratio(|(_, by_processor)| *by_processor)]);
        table.rows.push(cells);
    }
    let mut memory: Vec<String> = Vec::new();
    for Peer { what, precision, resident, .. } in peers {
        let what = if what == "LoRA training" { "training" } else { "inference" };
        let line = format!("{what} {precision:?} {}", bytes(*resident));
        if !memory.contains(&line) {
            memory.push(line);
        }
    }
    table.notes.push("Ratios: the faster of Lathe's two precisions over the faster of torch's.".to_owned());
    table.notes.push(format!("torch's peak memory (VmHWM): {}.", memory.join(", ")));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(median: f64) -> Figure {
        Figure { median, least: median, most: median, runs: 1 }
    }

    #[test]
    fn lines_of_figures_are_found_among_others() {
        let said = "warning: x\n{\"what\": \"prefill\", \"runs\": [1.5, 2], \"by_processor\": 3.0}\n{\"other\": 1}\n";
        assert_eq!(lines(said).collect::<Vec<_>>(), [("prefill".to_owned(), vec![1.5, 2.0], 3.0)]);
    }

    #[test]
    fn the_ratio_is_that_of_the_best_of_each() {
        let row = |precision, rate| Row {
            model: "Q05",
            what: "prefill",
            precision,
            rate: figure(rate),
            cores: 1.0,
            by_processor: 2.0 * rate,
        };
        let (what, rate) = ("prefill".to_owned(), figure(100.0));
        let peer = Peer { what, precision: Precision::F32, rate, by_processor: 100.0, resident: 1 };
        let found = table(&[row(Precision::F32, 50.0), row(Precision::BF16, 150.0)], &[peer]);
        assert_eq!(found.rows, [["prefill", "150", "50.0", "100", "-", "1.50 x", "3.00 x"]]);
    }
}
