//! The gateway beside nginx and LiteLLM: what a proxied request, a streamed token and an open stream cost.
//!
//! Every proxy is a process on one core, in front of the same stub of a worker; stub and clients have the other cores. In each
//! round all proxies do the same, one after the other, so that what else the machine does falls on all of them. Processor time
//! and memory are those of the proxy's process while it is asked, and an answer that is not the right one fails the run.

mod api;
mod cores;
mod measure;
mod peers;
mod proxy;
mod table;

use std::path::Path;

use anyhow::Result;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use super::worker::empty_folder;
use super::{Found, machine};
use crate::{paths, ui};
use cores::Cores;
use measure::{Bench, Measured};
use proxy::{Contestant, Ground};

/// Of a page, and of a look.
const ROUNDS: [usize; 2] = [3, 1];

/// Measures all proxies.
///
/// # Errors
/// A peer cannot be had, a program does not start, or an answer is wrong.
pub fn run(program: &Path, quick: bool) -> Result<Found> {
    // For what is started here: a stream is a file of the client, two of the proxy and one of the stub.
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })?;
    let cores = Cores::of_this_process()?;
    let folder = empty_folder(&paths::cache()?.join("bench"), "gateway")?;
    let ground = Ground::prepare(program, folder, cores)?;
    let bench = Bench::start(&ground, quick)?;
    let mut rounds: Vec<Vec<Measured>> = Vec::new();
    for round in 0..ROUNDS[usize::from(quick)] {
        let mut found: Vec<Measured> = Vec::new();
        for contestant in Contestant::ALL {
            let step = ui::step(format!("round {}: {}", round + 1, contestant.name()));
            let measured = bench.measure(contestant, found.first())?;
            step.done(&measured.words());
            found.push(measured);
        }
        rounds.push(found);
    }
    let tables = vec![table::table(&rounds, &ground.cores)];
    let figures = json!({"cores": ground.cores, "rounds": rounds});
    Ok(Found { part: "gateway", tables, figures, loads: [0.0, machine::load()] })
}
