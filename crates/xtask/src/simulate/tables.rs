//! The tables of docs/scaling.md.
use super::compare::{Comparison, Goal, Run};
use super::trace::Trace;
use crate::bench::table::Table;

/// A trace and its comparisons.
pub type Compared<'a> = (&'a Trace, Vec<Comparison>);

/// One row for each trace and start-up time.
pub fn summary(all: &[Compared<'_>]) -> Table {
    let headings = [
        "Trace",
        "Start-up",
        "Lathe, defaults",
        "Lathe",
        "Best other",
        "Informed",
        "Lathe / best other",
        "Goal",
    ];
    let mut table = Table::new("Late requests at equal replica-hours", &headings);
    for (trace, comparisons) in all {
        for comparison in comparisons {
            let late = |run: &Run| percent(run.outcome.late_share());
            let (best, ours) = (comparison.best(), &comparison.lathe);
            let ratio = f64::from(ours.outcome.late) / f64::from(best.outcome.late);
            let (ratio, goal) = match comparison.goal() {
                Goal::NothingLate => ("-".to_owned(), "nothing late"),
                Goal::Reached => (format!("{ratio:.2}"), "reached"),
                Goal::Missed => (format!("{ratio:.2}"), "**missed**"),
            };
            table.rows.push(vec![
                trace.name.to_owned(),
                format!("{} s", comparison.start_up),
                late(&comparison.defaults),
                late(ours),
                format!("{} ({})", late(best), best.name),
                late(&comparison.informed),
                ratio,
                goal.to_owned(),
            ]);
        }
    }
    table
}

/// How soon a step is answered: seconds from its first report to the first, and to enough, replicas asked for.
pub fn reaction(step: &Trace, comparisons: &[Comparison]) -> Table {
    let mut table = Table::new(
        "Step, first draw: seconds from the first report",
        &["Scaler", "Start-up", "First asked", "Asked for 7"],
    );
    for comparison in comparisons {
        for run in comparison.runs() {
            let after = |enough: u32| {
                let seconds = seconds_to(step, &run.outcome.asked, enough);
                seconds.map_or("never".to_owned(), |seconds| seconds.to_string())
            };
            let row = [run.name.to_owned(), format!("{} s", comparison.start_up), after(1), after(7)];
            table.rows.push(row.into());
        }
    }
    table
}

/// Seconds from the first report of the step until more than before, and at least `enough`, replicas are asked for.
fn seconds_to(step: &Trace, asked: &[u32], enough: u32) -> Option<usize> {
    let load = step.counted();
    let at = load.windows(2).position(|pair| pair[1] > pair[0])? + 1;
    asked[at..].iter().position(|replicas| *replicas > asked[at - 1] && *replicas >= enough)
}

/// Every run of a trace.
pub fn runs((trace, comparisons): &Compared<'_>) -> Table {
    let headings = ["Start-up", "Scaler", "Target, window", "Replica-hours", "Late", "Direction changes"];
    let mut table = Table::new(trace.name, &headings);
    for comparison in comparisons {
        for run in comparison.runs() {
            table.rows.push(vec![
                format!("{} s", comparison.start_up),
                run.name.to_owned(),
                run.settings.clone(),
                format!("{:.2}", run.outcome.replica_hours),
                percent(run.outcome.late_share()),
                run.outcome.turns.to_string(),
            ]);
        }
    }
    let requests = trace.requests.len();
    table.notes = vec![
        format!("{}: {requests} requests of {:.2} s of a replica each.", trace.about, trace.work),
        format!("![Replicas over time]({}/{}.svg)", super::FIGURES.trim_start_matches("docs/"), trace.name),
    ];
    table
}

fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}
