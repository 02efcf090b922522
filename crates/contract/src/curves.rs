//! Loss curves of jobs, as the operator's leader hands them to every replica of the gateway, whose page shows them.
use serde::{Deserialize, Serialize};

use crate::report::ReportError;

/// Path on the gateway's port of probes and metrics: `PUT` of [`JobCurves`], with a token of the operator for
/// [`crate::TRAFFIC_AUDIENCE`] and [`crate::Scope::Curves`]. 503 until the gateway knows which jobs there are.
pub const CURVES_PATH: &str = "/v1/curves";
/// Points of a curve.
pub const MAX_POINTS: usize = 200;
/// Curves of one call.
pub const MAX_CURVES: usize = 50;
/// Longest call.
pub const MAX_CURVES_BYTES: usize = 1 << 20;

/// Curves that changed since the last call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobCurves {
    /// At most [`MAX_CURVES`].
    pub curves: Vec<JobCurve>,
}

/// The whole curve of one job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobCurve {
    /// Namespace of the FineTuneJob.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: another job of that name has another curve.
    pub uid: String,
    /// Steps, counted from 1, and losses in nats a token; at most [`MAX_POINTS`], in the order of steps.
    pub points: Vec<(i64, f64)>,
}

impl JobCurves {
    /// Reads a call.
    ///
    /// # Errors
    /// It is too long, no JSON, or has more curves or points than it may have.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        let told: Self = crate::report::parse(bytes, MAX_CURVES_BYTES)?;
        let longest = told.curves.iter().map(|curve| curve.points.len()).max().unwrap_or(0);
        for (limit, found) in [(MAX_CURVES, told.curves.len()), (MAX_POINTS, longest)] {
            if found > limit {
                return Err(ReportError::TooMany { limit, found });
            }
        }
        Ok(told)
    }
}

/// At most `most` points, evenly chosen, the first and the last among them.
#[must_use]
pub fn thinned(points: &[(i64, f64)], most: usize) -> Vec<(i64, f64)> {
    let (count, last) = (points.len(), points.len().saturating_sub(1));
    match most {
        _ if count <= most => points.to_vec(),
        0 => Vec::new(),
        1 => points[last..].to_vec(),
        _ => (0..most).map(|place| points[place * last / (most - 1)]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(count: i64) -> Vec<(i64, f64)> {
        (1..=count).map(|step| (step, 1.0 / step as f64)).collect()
    }

    #[test]
    fn a_thinned_curve_begins_and_ends_as_the_whole_one() {
        for (count, most) in [(0, 5), (5, 5), (6, 5), (200, 50), (200, 2), (7, 3)] {
            let (whole, few) = (points(count), thinned(&points(count), most));
            assert_eq!(few.len(), whole.len().min(most));
            assert_eq!((few.first(), few.last()), (whole.first(), whole.last()));
            assert!(few.is_sorted_by(|a, b| a.0 < b.0), "{few:?}");
        }
        assert_eq!(thinned(&points(9), 1), points(9)[8..]);
        assert_eq!(thinned(&points(9), 0), []);
    }

    #[test]
    fn the_longest_call_is_read_and_one_of_more_is_refused() {
        let curve = JobCurve {
            namespace: "n".repeat(63),
            name: "j".repeat(253),
            uid: "u".repeat(36),
            points: vec![(i64::MAX, -1.234_567_890_123_456_7e-300); MAX_POINTS],
        };
        let call = |curves: Vec<JobCurve>| serde_json::to_vec(&JobCurves { curves }).unwrap_or_default();
        let read = JobCurves::parse(&call(vec![curve.clone(); MAX_CURVES]));
        assert_eq!(read.map(|told| told.curves.len()).ok(), Some(MAX_CURVES));
        let long = JobCurve { points: vec![(1, 1.0); MAX_POINTS + 1], ..curve };
        assert!(matches!(
            JobCurves::parse(&call(vec![long])),
            Err(ReportError::TooMany { limit: MAX_POINTS, found: 201 })
        ));
        let many = vec![JobCurve::default(); MAX_CURVES + 1];
        assert!(matches!(JobCurves::parse(&call(many)), Err(ReportError::TooMany { limit: MAX_CURVES, .. })));
    }
}
