//! Whether a gate holds.
use kube::ResourceExt as _;
use lathe_api::{EndedStatus, Model, RolloutGate, RolloutMetric};

/// Requests that a gate is judged by at least.
const LEAST: i64 = 20;
/// Requests that are asked for at most, however close to zero errors have to be.
const MOST: i64 = 100;

/// What a gate says of a step's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Holds,
    Fails,
    /// There are too few requests to say so.
    Waits,
}

/// Judges a gate by the requests to the candidate. Scores were judged before.
///
/// Errors fail as soon as no later request could make up for them; the others once there are enough.
pub fn judge(gate: &RolloutGate, ended: &EndedStatus) -> Verdict {
    let need = needs(gate);
    let verdict = |holds: bool| if holds { Verdict::Holds } else { Verdict::Fails };
    match gate.metric {
        RolloutMetric::ErrorRate => {
            let share = ended.errors as f64 / ended.requests.max(need) as f64;
            match bound(gate) {
                Some(most) if share > most => Verdict::Fails,
                _ if ended.requests < need => Verdict::Waits,
                _ => Verdict::Holds,
            }
        }
        RolloutMetric::TimeToFirstToken | RolloutMetric::TokensPerSecond => {
            match (value(gate.metric, ended), bound(gate)) {
                _ if ended.streams < need => Verdict::Waits,
                (Some(seconds), Some(most)) if gate.metric == RolloutMetric::TimeToFirstToken => {
                    verdict(seconds <= most)
                }
                (Some(speed), Some(least)) => verdict(speed >= least),
                _ => Verdict::Waits,
            }
        }
        _ => Verdict::Holds,
    }
}

/// Requests without which a gate says nothing: a share of one in a hundred cannot be seen in twenty.
pub fn needs(gate: &RolloutGate) -> i64 {
    match (gate.metric, bound(gate)) {
        (RolloutMetric::ErrorRate, Some(most)) => ((1.0 / most).ceil() as i64).clamp(LEAST, MOST),
        _ => LEAST,
    }
}

/// Whether a gate counts streamed answers alone.
pub fn is_of_streams(gate: &RolloutGate) -> bool {
    matches!(gate.metric, RolloutMetric::TimeToFirstToken | RolloutMetric::TokensPerSecond)
}

/// What was measured of requests; `None`: nothing yet.
pub fn value(metric: RolloutMetric, ended: &EndedStatus) -> Option<f64> {
    let over = |sum: i64, of: i64| (of > 0).then(|| sum as f64 / of as f64);
    match metric {
        RolloutMetric::ErrorRate => over(ended.errors, ended.requests),
        RolloutMetric::TimeToFirstToken => Some(over(ended.first_token_millis, ended.streams)? / 1000.0),
        RolloutMetric::TokensPerSecond if ended.tokens > 0 => {
            // Tokens that came within a millisecond.
            over(ended.tokens.saturating_mul(1000), ended.decode_millis.max(1))
        }
        _ => None,
    }
}

/// The bound, whichever side it is on.
pub fn bound(gate: &RolloutGate) -> Option<f64> {
    gate.at_most.as_ref().or(gate.at_least.as_ref())?.value()
}

/// Why a gate on a score does not hold; `None`: it does, or is none.
pub fn score(gate: &RolloutGate, model: Option<&Model>) -> Option<String> {
    let metric = gate.metric.score()?;
    let (name, scores) = model.map_or_else(Default::default, |model| {
        (model.name_any(), model.status.as_ref().map(|status| status.scores.clone()).unwrap_or_default())
    });
    let score = scores.iter().find(|score| score.metric == metric).and_then(|score| score.after.as_ref());
    let Some((told, score)) = score.and_then(|score| Some((score, score.value()?))) else {
        return Some(format!("Model {name} has no score {metric:?}; a FineTuneJob measures it"));
    };
    let (least, most) = (gate.at_least.as_ref(), gate.at_most.as_ref());
    let too_low = least.filter(|least| least.value().is_some_and(|least| score < least));
    let too_high = most.filter(|most| most.value().is_some_and(|most| score > most));
    let must =
        too_low.map(|least| format!("at least {least}")).or(too_high.map(|most| format!("at most {most}")));
    must.map(|must| format!("{metric:?} of Model {name} is {told} and must be {must}"))
}
