//! What is told of a roll-out, with the numbers.
use lathe_api::{
    EndedStatus, MAX_ROLLOUT_MESSAGE, Rollout, RolloutGate, RolloutMetric, RolloutStatus, RolloutStep,
};

use super::gates::{self, Verdict};

/// Where a candidate stands that gets its share; `None`: the rules have no steps.
pub fn doing(rules: &Rollout, status: &RolloutStatus, stable: &str) -> Option<String> {
    let (number, step) = rules.step(status.step)?;
    let passed = status.counted.saturating_sub(status.since).max(0);
    let waits = rules.gates.iter().find(|gate| gates::judge(gate, &status.candidate) == Verdict::Waits);
    let waits = waits.filter(|_| passed >= step.after.seconds().unwrap_or(0)).map_or(String::new(), |gate| {
        let (kind, has) = match gates::is_of_streams(gate) {
            true => ("streamed answers", status.candidate.streams),
            false => ("requests", status.candidate.requests),
        };
        format!(
            " The step waits: {:?} is judged by {} {kind}, and {has} came. All requests of one key, or of one `user` that they name, \
             go to one side.",
            gate.metric,
            gates::needs(gate)
        )
    });
    Some(format!(
        "candidate {} answers {} % of the users beside {stable}, step {number} of {}, {passed}s of {}. {}{waits}",
        status.revision,
        status.percent,
        rules.steps.len(),
        step.after,
        capital(&numbers(rules, status)),
    ))
}

/// Everything that was measured in the step.
pub fn numbers(rules: &Rollout, status: &RolloutStatus) -> String {
    let RolloutStatus { candidate, stable, .. } = status;
    let mut told = vec![format!(
        "{} requests ended there ({} at the stable revision)",
        candidate.requests, stable.requests
    )];
    told.extend(rules.gates.iter().filter_map(|gate| measured(gate, candidate, stable)));
    format!("{}.", told.join("; "))
}

/// Why the candidate goes.
pub fn failed(rules: &Rollout, step: &RolloutStep, status: &RolloutStatus, stable: &str) -> String {
    let fails = |gate: &&RolloutGate| gates::judge(gate, &status.candidate) == Verdict::Fails;
    let fails = rules.gates.iter().filter(fails);
    let fails: Vec<String> =
        fails.filter_map(|gate| measured(gate, &status.candidate, &status.stable)).collect();
    let RolloutStatus { revision, candidate: ended, step: number, .. } = status;
    cut(format!(
        "candidate {revision} has not held a gate in step {number} of {} ({} % of the users): {}, in {} requests, {} of them errors. \
         {}",
        rules.steps.len(),
        step.percent,
        fails.join("; "),
        ended.requests,
        ended.errors,
        stays(stable)
    ))
}

/// Why there is no candidate.
pub fn failed_score(revision: &str, stable: &str, why: &str) -> String {
    cut(format!("candidate {revision} is not tried: {why}. {}", stays(stable)))
}

/// Why the candidate stays.
pub fn promoted(rules: &Rollout, status: &RolloutStatus) -> String {
    let gates = if rules.gates.is_empty() { "all of its steps" } else { "every gate" };
    let numbers = numbers(rules, status);
    cut(format!("candidate {} has held {gates}; in the last step {numbers}", status.revision))
}

fn stays(stable: &str) -> String {
    format!(
        "{stable} goes on as before. Next: correct what `spec` asks for, or take the change back; the same is tried again only after \
         a change of `spec.rollout`."
    )
}

/// "ErrorRate is 0.12 and must be at most 0.01 (at the stable revision 0.002)".
fn measured(gate: &RolloutGate, candidate: &EndedStatus, stable: &EndedStatus) -> Option<String> {
    let value = gates::value(gate.metric, candidate)?;
    let unit = match gate.metric {
        RolloutMetric::TimeToFirstToken => " s",
        _ => "",
    };
    let must = match (&gate.at_most, &gate.at_least) {
        (Some(most), _) => format!("at most {most}"),
        (None, Some(least)) => format!("at least {least}"),
        (None, None) => return None,
    };
    let beside = gates::value(gate.metric, stable);
    let beside =
        beside.map_or(String::new(), |value| format!(" (at the stable revision {}{unit})", digits(value)));
    Some(format!("{:?} is {}{unit} and must be {must}{beside}", gate.metric, digits(value)))
}

/// Three digits of it.
fn digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let places = (2 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.places$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

fn cut(text: String) -> String {
    lathe_api::cut(&text, MAX_ROLLOUT_MESSAGE)
}
