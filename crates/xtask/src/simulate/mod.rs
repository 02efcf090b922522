//! `cargo xtask simulate`: the scaling decision beside models of other autoscalers, on traces of requests.

mod compare;
mod plot;
mod random;
mod replica;
mod scalers;
mod service;
mod tables;
mod trace;

use std::fs;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::{bench, paths, ui};
use compare::{Comparison, START_UPS, compare};
use replica::SERVER;
use tables::Compared;
use trace::Trace;

const PAGE: &str = "docs/scaling.md";
const FIGURES: &str = "docs/scaling";
/// Chance decides much of what a burst meets: each trace is drawn so often.
const SEEDS: [u64; 3] = [1, 2, 3];

/// Replays traces of requests through the scaling decision and through models of HPA, KEDA and Knative, and compares them.
#[derive(clap::Args)]
pub struct Args {
    /// This trace alone.
    #[arg(long, conflicts_with = "write")]
    trace: Option<String>,
    /// Put the tables into docs/scaling.md and the figures into docs/scaling/.
    #[arg(long)]
    write: bool,
}

/// Runs the command.
///
/// # Errors
/// There is no such trace, or the page or a figure cannot be written.
pub fn run(args: &Args) -> Result<()> {
    if args.write {
        for (path, content) in files()? {
            fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
            ui::note(&format!("wrote {}", path.display()));
        }
        return Ok(());
    }
    let traces = match &args.trace {
        None => traces(),
        Some(name) => vec![named(name)?],
    };
    let all = compared(&traces)?;
    all.iter().for_each(|compared| println!("{}", tables::runs(compared).text()));
    println!("{}", tables::summary(&all).text());
    Ok(())
}

/// Path and content of the page and of every figure, always the same.
///
/// # Errors
/// The page cannot be read, or has no marks for its tables.
pub fn files() -> Result<Vec<(PathBuf, String)>> {
    let traces = traces();
    let all = compared(&traces)?;
    let mut text = tables::summary(&all).markdown();
    if let Some((step, comparisons)) = all.iter().find(|(trace, _)| trace.name == "step") {
        text.push_str(&tables::reaction(step, comparisons).markdown());
    }
    all.iter().for_each(|compared| text.push_str(&tables::runs(compared).markdown()));
    let root = paths::repository();
    let page = fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    let page = bench::page::between(&page, "tables", &text)
        .with_context(|| format!("{PAGE} has no marks `<!-- tables -->` and `<!-- /tables -->`"))?;
    let figures = all.iter().map(|(trace, comparisons)| {
        (root.join(FIGURES).join(format!("{}.svg", trace.name)), plot::figure(trace, comparisons))
    });
    Ok(figures.chain([(root.join(PAGE), page)]).collect())
}

/// The section of the page and the figure of one trace.
///
/// # Errors
/// There is no such trace.
pub fn part(name: &str) -> Result<(String, String)> {
    let traces = [named(name)?];
    let all = compared(&traces)?;
    let (trace, comparisons) = all.first().context("nothing was compared")?;
    Ok((tables::runs(&all[0]).markdown(), plot::figure(trace, comparisons)))
}

/// Every trace, drawn as often as there are seeds.
fn traces() -> Vec<Vec<Trace>> {
    let mut drawn = SEEDS.map(|seed| trace::all(&SERVER, seed).into_iter());
    std::iter::from_fn(|| {
        let next: Vec<Trace> = drawn.iter_mut().filter_map(Iterator::next).collect();
        (!next.is_empty()).then_some(next)
    })
    .collect()
}

fn named(name: &str) -> Result<Vec<Trace>> {
    let traces = traces();
    let names: Vec<&str> = traces.iter().flat_map(|draws| draws.first()).map(|trace| trace.name).collect();
    let unknown = format!("there is no trace {name}; there are {}", names.join(", "));
    traces.into_iter().find(|draws| draws[0].name == name).context(unknown)
}

/// Every trace with every start-up time.
fn compared(traces: &[Vec<Trace>]) -> Result<Vec<Compared<'_>>> {
    thread::scope(|scope| {
        let running: Vec<_> = traces
            .iter()
            .filter_map(|draws| {
                Some((
                    draws.first()?,
                    START_UPS.map(|start_up| scope.spawn(move || compare(draws, &SERVER, start_up))),
                ))
            })
            .collect();
        running
            .into_iter()
            .map(|(trace, runs)| {
                let done: Result<Vec<Comparison>, _> = runs.into_iter().map(|run| run.join()).collect();
                match done {
                    Ok(comparisons) => Ok((trace, comparisons)),
                    Err(_) => bail!("a run of {} panicked", trace.name),
                }
            })
            .collect()
    })
}
