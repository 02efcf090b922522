//! `cargo xtask bench --profile`: the engine's own profile, beside the limits of this machine.

use std::fs;

use anyhow::Result;

use super::limits::Limits;
use crate::{command, paths, ui};

/// What is looked at: what `examples/profile.rs` of the engine takes.
const WORK: [[&str; 3]; 6] = [
    ["train", "256", "bf16"],
    ["prefill", "512", "bf16"],
    ["decode", "1", "bf16"],
    ["decode", "8", "bf16"],
    ["decode", "1", "int8"],
    ["decode", "1", "int4"],
];

/// Measures the limits, then runs the profile of each kind of work.
///
/// # Errors
/// Something does not build or run.
pub fn run() -> Result<()> {
    let step = ui::step("build the profile");
    let example = ["run", "--release", "-q", "-p", "lathe-engine", "--example", "profile", "--"];
    command::run(command::cargo().args([
        "build",
        "--release",
        "-p",
        "lathe-engine",
        "--example",
        "profile",
    ]))?;
    step.done("");
    let step = ui::step("limits of the machine");
    let mut limits = Limits::build()?;
    limits.measure()?;
    let [limit, _] = limits.ceilings()?;
    let all =
        [limit.read, limit.f32, limit.bf16, limit.int8].map(|limit| format!("{:.2}", limit / 1e9)).join(",");
    step.done(&format!("read, f32, bf16, int8 in 1e9 a second: {all}"));
    let traces = paths::cache()?.join("bench");
    fs::create_dir_all(&traces)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).to_string();
    for work in WORK {
        let trace = traces.join(format!("{}.json", work.join("-")));
        let [what, number, precision] = work;
        let mut command = command::cargo();
        command.args(example).args([what, number, &threads, precision, "--limits", &all]);
        command.arg("--trace").arg(trace);
        println!("\n{}", command::run(&mut command)?);
    }
    Ok(())
}
