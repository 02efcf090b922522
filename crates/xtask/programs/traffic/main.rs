//! Both ends of `cargo xtask bench gateway`: a worker that does as little as it can, and the clients that ask it through a proxy.
//!
//! ```text
//! traffic stub ADDRESS
//! traffic load address=ADDRESS key=KEY model=NAME connections=N warm=SECONDS seconds=SECONDS [tokens=N] [rate=N] [hold=1] [pids=PID,..]
//! ```
//!
//! Threads that block, and nothing but the standard library: a request costs both ends together less than it costs any proxy.

mod answer;
mod latency;
mod load;
#[path = "../../src/bench/proc.rs"]
mod proc;
mod stub;
mod text;
mod wire;

use std::process::ExitCode;

fn main() -> ExitCode {
    // A sleep ends 50 us late otherwise. Threads have it from the first one; where the kernel has no such file, all contestants
    // are as late.
    let _ = std::fs::write("/proc/self/timerslack_ns", "1");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.split_first() {
        Some((role, rest)) if role == "stub" => stub::run(rest),
        Some((role, rest)) if role == "load" => load::run(rest),
        _ => Err("say `stub ADDRESS` or `load address=.. key=.. model=..`".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}
