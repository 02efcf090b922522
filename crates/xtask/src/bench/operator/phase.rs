//! What a stretch of the operator's life cost.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::Operator;
use super::api::{Api, FLOW};
use super::prometheus::sum;
use crate::bench::ask;
use crate::bench::stats::{bytes, number};
use crate::bench::table::Table;

/// Rounds of reconciling, in the operator's metrics.
pub const ROUNDS: &str = "lathe_operator_reconciles_total";
const ROUND_SECONDS: &str = "lathe_operator_reconcile_duration_seconds_sum";
const FAILURES: &str = "lathe_operator_reconcile_failures_total";
/// Calls that the API server has let through, in its metrics.
const CALLS: &str = "apiserver_flowcontrol_dispatched_requests_total";

/// One stretch.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// What went on.
    pub what: &'static str,
    /// How long it took.
    pub seconds: f64,
    /// Rounds of reconciling.
    pub rounds: f64,
    /// Those of them that failed and were tried again.
    pub failures: f64,
    /// Milliseconds of a round, on average.
    pub round_ms: f64,
    /// Calls to the API server, watches included.
    pub calls: f64,
    /// Seconds of a processor.
    pub processor: f64,
    /// The most memory that the process has held until its end, in bytes.
    pub resident: u64,
}

/// Counters at the beginning of a stretch.
pub struct Meter {
    begin: Counters,
}

#[derive(Clone, Copy, Default)]
struct Counters {
    rounds: f64,
    seconds: f64,
    failures: f64,
    calls: f64,
    processor: f64,
}

/// The operator's metrics.
///
/// # Errors
/// No answer.
pub fn metrics(url: &str) -> Result<String> {
    Ok(ask::agent(Duration::from_secs(5)).get(url).call()?.into_body().read_to_string()?)
}

impl Counters {
    fn read(api: &Api, operator: &Operator) -> Result<Self> {
        let own = metrics(&operator.metrics)?;
        let server = api.text("/metrics")?;
        Ok(Self {
            rounds: sum(&own, ROUNDS, ""),
            seconds: sum(&own, ROUND_SECONDS, ""),
            failures: sum(&own, FAILURES, ""),
            calls: calls(&server),
            processor: operator.process.processor_seconds(),
        })
    }
}

fn calls(server: &str) -> f64 {
    sum(server, CALLS, &format!("flow_schema=\"{FLOW}\""))
}

impl Meter {
    /// From the start of an operator on, which comes now.
    ///
    /// # Errors
    /// The API server does not answer.
    pub fn fresh(api: &Api) -> Result<Self> {
        Ok(Self { begin: Counters { calls: calls(&api.text("/metrics")?), ..Counters::default() } })
    }

    /// From now on.
    ///
    /// # Errors
    /// The operator or the API server does not answer.
    pub fn begin(api: &Api, operator: &Operator) -> Result<Self> {
        Ok(Self { begin: Counters::read(api, operator)? })
    }

    /// Until now; `seconds` of it count.
    ///
    /// # Errors
    /// The operator or the API server does not answer.
    pub fn end(&self, what: &'static str, seconds: f64, api: &Api, operator: &Operator) -> Result<Phase> {
        let (begin, end) = (self.begin, Counters::read(api, operator)?);
        let rounds = end.rounds - begin.rounds;
        Ok(Phase {
            what,
            seconds,
            rounds,
            failures: end.failures - begin.failures,
            round_ms: (end.seconds - begin.seconds) * 1e3 / rounds.max(1.0),
            calls: end.calls - begin.calls,
            processor: end.processor - begin.processor,
            resident: operator.process.memory().resident,
        })
    }
}

impl Phase {
    /// In one line.
    pub fn words(&self) -> String {
        let Self { seconds, rounds, calls, resident, .. } = self;
        format!("{} s, {rounds:.0} rounds, {calls:.0} calls, {}", number(*seconds), bytes(*resident))
    }
}

/// All stretches with so many objects.
pub fn table(phases: &[Phase], objects: usize) -> Table {
    let headings = [
        "What",
        "seconds",
        "rounds",
        "rounds/s",
        "ms a round",
        "API calls",
        "calls an object",
        "calls a minute",
        "CPU seconds",
        "peak memory",
    ];
    let mut table = Table::new(format!("Operator with {objects} objects"), &headings);
    for phase in phases {
        let Phase { what, seconds, rounds, round_ms, calls, processor, resident, .. } = phase;
        table.rows.push(vec![
            (*what).to_owned(),
            number(*seconds),
            format!("{rounds:.0}"),
            number(rounds / seconds),
            number(*round_ms),
            format!("{calls:.0}"),
            number(calls / objects as f64),
            number(calls * 60.0 / seconds),
            number(*processor),
            bytes(*resident),
        ]);
    }
    let failures: f64 = phases.iter().map(|phase| phase.failures).sum();
    table.notes.push(format!(
        "Rounds that failed and were tried again: {failures:.0}. Calls are counted by the API server, as those of the operator's \
         user, watches and the Lease included. Peak memory is the process's VmHWM."
    ));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_the_object_and_by_the_minute() {
        let phase = Phase {
            what: "x",
            seconds: 30.0,
            rounds: 900.0,
            failures: 2.0,
            round_ms: 4.5,
            calls: 1000.0,
            processor: 3.0,
            resident: 25_000_000,
        };
        let table = table(&[phase], 500);
        assert_eq!(
            table.rows,
            [["x", "30.0", "900", "30.0", "4.50", "1000", "2.00", "2000", "3.00", "25 MB"]]
        );
        assert!(table.notes[0].contains("tried again: 2."));
    }
}
