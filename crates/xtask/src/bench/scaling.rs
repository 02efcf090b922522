//! How fast replicas follow a load, on a real node: the worker of the image, its processor time limited as a test's is.

use std::fs;

use anyhow::{Context, Result};
use serde_json::json;

use super::stats::Figure;
use super::table::Table;
use super::{Found, machine};
use crate::test::{clusters, programs};
use crate::{images, ui};

/// Brings a cluster up, lets the end-to-end test of scaling measure, and takes the cluster down.
///
/// # Errors
/// The cluster does not come up, or a part of it takes minutes.
pub fn run(quick: bool) -> Result<Found> {
    let rounds = if quick { 2 } else { 5 };
    let archives = images::archives()?;
    let programs = programs::build()?;
    let program = programs.iter().find(|program| program.package == "lathe-e2e" && program.name == "scaling");
    let program = program.context("there is no test program lathe-e2e/scaling")?;
    let scratch = tempfile::tempdir()?;
    let file = scratch.path().join("figures");
    let step = ui::step(format!("{rounds} times to zero, awake, to three replicas and back"));
    step.expect(&format!("{} minutes", 2 * rounds));
    clusters::with_images("lathe-bench", 1, &archives, |cluster| {
        let mut environment = clusters::environment(cluster)?.to_vec();
        environment.push(("LATHE_ROUNDS", rounds.to_string()));
        environment.push(("LATHE_FIGURES", file.display().to_string()));
        programs::run_all([program].into_iter(), &environment, &["--ignored", "--nocapture"])
    })?;
    step.done("");
    let seconds: Vec<(String, Vec<f64>)> = serde_json::from_slice(&fs::read(&file)?)?;
    let mut table = Table::new("Replicas that follow", &["what", "seconds"]);
    for (what, runs) in &seconds {
        let shown = Figure::of(runs.clone()).map(|figure| figure.shown()).unwrap_or_default();
        table.rows.push(vec![what.clone(), shown]);
    }
    table.notes.push(format!("Medians of {rounds} rounds, and the smallest and largest of them."));
    Ok(Found {
        part: "scaling",
        tables: vec![table],
        figures: json!({"seconds": seconds}),
        loads: [0.0, machine::load()],
    })
}
