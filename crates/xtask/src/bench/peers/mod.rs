//! `cargo xtask bench engine --peers`: the same work by Lathe and by each peer, in turns.
//!
//! All engines of a group (a model at a precision) hold it at the same time, and each row of a round is done by one after the
//! other: what else the machine does changes from minute to minute and falls on all of them.

mod contestant;
mod driver;
mod install;
mod ours;
mod table;
mod task;

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use lathe_plan::Precision;
use serde::Serialize;
use serde_json::json;

use super::limits::Limits;
use super::machine;
use super::models::{Model, l1b, q05, random};
use super::{Found, worker};
use crate::{paths, ui};
use contestant::{CONTESTANTS, Contestant, Session};
use install::Python;
use task::{Task, Unit};

/// Rounds, where none are asked for: of a page, and of a look.
const ROUNDS: [usize; 2] = [5, 1];

/// One row of a table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    precision: Precision,
    task: Task,
    unit: Unit,
    /// Of each of [`CONTESTANTS`], one a round.
    runs: [Vec<f64>; CONTESTANTS.len()],
}

/// What was found of one model.
struct Contest<'a> {
    model: &'a Model,
    rows: Vec<Row>,
    /// What a peer says of the rows that it did not do.
    refused: Vec<(String, Vec<String>)>,
}

/// What is needed to start any contestant.
pub struct Ground {
    /// The worker.
    pub worker: PathBuf,
    /// For files that nobody needs later.
    pub scratch: PathBuf,
    python: Python,
    /// Whether the processor multiplies bf16 faster than f32: where not, torch takes minutes for what f32 does in seconds.
    bf16: bool,
}

/// Measures all shapes, and makes a table of each.
///
/// # Errors
/// Lathe fails, or Python cannot be had. What a peer cannot do is told below the table.
pub fn run(worker: PathBuf, quick: bool, rounds: Option<usize>) -> Result<Found> {
    let cache = paths::cache()?.join("bench");
    let scratch = worker::empty_folder(&cache, "peers")?;
    let rounds = rounds.unwrap_or(ROUNDS[usize::from(quick)]);
    let mut limits = Limits::build()?;
    limit(&mut limits)?;
    let [ceiling, _] = limits.ceilings()?;
    let ground = Ground { worker, scratch, python: Python::prepare()?, bf16: ceiling.bf16 > ceiling.f32 };
    let mut tables = Vec::new();
    let mut figures = Vec::new();
    for (name, shape) in [("Q05", q05()), ("L1B", l1b())] {
        let step = ui::step(format!("{name}: random weights, tokenizer of {} entries", shape.vocab));
        let model = random(name, shape, &cache.join("models").join(name))?;
        step.done("");
        let mut contest = Contest { model: &model, rows: Vec::new(), refused: Vec::new() };
        for (precision, tasks) in task::groups(name, quick) {
            limit(&mut limits)?;
            contest.group(&ground, precision, &tasks, rounds)?;
        }
        limit(&mut limits)?;
        let [ceiling, _] = limits.ceilings()?;
        let mut notes = ground.python.notes();
        notes.extend(contest.refused.iter().map(|(reason, rows)| format!("{reason} ({}).", rows.join("; "))));
        tables.push(table::table(&model, &contest.rows, notes, &ceiling, rounds));
        figures.push(json!({"model": name, "rows": contest.rows}));
    }
    fs::remove_dir_all(&ground.scratch)?;
    tables.insert(0, limits.table());
    let figures = json!({"limits": limits.ceilings()?, "contests": figures});
    Ok(Found { part: "peers", tables, figures, loads: [0.0, machine::load()] })
}

fn limit(limits: &mut Limits) -> Result<()> {
    let step = ui::step("limits of the machine");
    limits.measure()?;
    step.done("");
    Ok(())
}

impl Contest<'_> {
    /// All rounds of what is done at one precision.
    fn group(&mut self, ground: &Ground, precision: Precision, tasks: &[Task], rounds: usize) -> Result<()> {
        let begin = self.rows.len();
        for task in tasks {
            for unit in task.units() {
                let runs = Default::default();
                self.rows.push(Row { precision, task: *task, unit, runs });
            }
        }
        let mut places: Vec<Place> = CONTESTANTS.iter().map(|_| Place::default()).collect();
        for round in 0..rounds {
            for task in tasks {
                for (number, contestant) in CONTESTANTS.iter().enumerate() {
                    if places[number].failed.contains(task) {
                        continue;
                    }
                    let what = format!("{}, {precision:?}, round {}: {task}", self.model.name, round + 1);
                    let step = ui::step(format!("{what}: {}", contestant.name()));
                    match places[number].measure(ground, *contestant, self.model, precision, task) {
                        Ok(found) => {
                            step.done(
                                &found
                                    .iter()
                                    .map(|(unit, value)| format!("{} {}", unit.shown(*value), unit.name()))
                                    .collect::<Vec<_>>()
                                    .join(", "),
                            );
                            for (unit, value) in found {
                                let of = |row: &&mut Row| row.task == *task && row.unit == unit;
                                if let Some(row) = self.rows[begin..].iter_mut().find(of) {
                                    row.runs[number].push(value);
                                }
                            }
                        }
                        Err(error) if *contestant == Contestant::Lathe => return Err(error),
                        Err(error) => {
                            let text = format!("{error:#}");
                            let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
                            step.done(&format!("not done: {last}"));
                            let reason = format!("{}: {last}", contestant.name());
                            let row = table::label(precision, task);
                            match self.refused.iter_mut().find(|(of, _)| *of == reason) {
                                Some((_, rows)) => rows.push(row),
                                None => self.refused.push((reason, vec![row])),
                            }
                            places[number].failed.push(*task);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// A contestant of a group: its process, once it has begun.
#[derive(Default)]
struct Place {
    session: Option<Session>,
    /// What it has done before.
    warm: Vec<Task>,
    gone: bool,
    failed: Vec<Task>,
}

impl Place {
    fn measure(
        &mut self,
        ground: &Ground,
        contestant: Contestant,
        model: &Model,
        precision: Precision,
        task: &Task,
    ) -> Result<Vec<(Unit, f64)>> {
        contestant.can(ground, precision, task)?;
        if task.alone() {
            return contestant.start(ground, model, precision, task)?.measure(task);
        }
        ensure!(!self.gone, "it has not answered in an earlier row");
        let session = match &mut self.session {
            Some(session) => session,
            None => self.session.insert(contestant.start(ground, model, precision, task)?),
        };
        // The first time of each shape does not count: pages are touched, graphs compiled.
        let warm = self.warm.contains(task) || session.measure(&task.short()).is_ok();
        let found = session.measure(task);
        self.warm.extend(warm.then_some(*task));
        if found.is_err() && !session.answers() {
            // Each further row would take as long as anybody waits.
            (self.session, self.gone) = (None, true);
        }
        found
    }
}
