//! Several measurements of one thing.

use serde::Serialize;

/// A median, and how far the measurements lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The middle one; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
    /// How many.
    pub runs: usize,
}

impl Figure {
    /// Of measurements in any order; none where there are none.
    pub fn of(mut runs: Vec<f64>) -> Option<Self> {
        runs.sort_by(f64::total_cmp);
        let (least, most) = (*runs.first()?, *runs.last()?);
        let middle = runs.len() / 2;
        let median =
            if runs.len().is_multiple_of(2) { (runs[middle - 1] + runs[middle]) / 2.0 } else { runs[middle] };
        Some(Self { median, least, most, runs: runs.len() })
    }

    /// "48.3 (46.0-49.1)"; of one measurement without a range.
    pub fn shown(&self) -> String {
        let Self { median, least, most, runs } = *self;
        if runs == 1 {
            number(median)
        } else {
            format!("{} ({}-{})", number(median), number(least), number(most))
        }
    }
}

/// Three digits that mean something, without an exponent.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// "53 %".
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Bytes as people read them.
pub fn bytes(bytes: u64) -> String {
    let mega = bytes as f64 / 1e6;
    if mega >= 1000.0 { format!("{:.2} GB", mega / 1e3) } else { format!("{mega:.0} MB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_what_was_measured() {
        let odd = Figure::of(vec![3.0, 1.0, 200.0]).map(|f| (f.median, f.least, f.most, f.runs));
        assert_eq!(odd, Some((3.0, 1.0, 200.0, 3)));
        assert_eq!(Figure::of(vec![4.0, 1.0, 2.0, 100.0]).map(|f| f.median), Some(3.0));
        assert_eq!(Figure::of(Vec::new()), None);
    }

    #[test]
    fn figures_have_as_many_digits_as_mean_something() {
        let of = |runs: &[f64]| Figure::of(runs.to_vec()).map(|f| f.shown()).unwrap_or_default();
        assert_eq!(of(&[1.234]), "1.23");
        assert_eq!(of(&[48.26, 46.0, 149.1]), "48.3 (46.0-149)");
        assert_eq!(
            (percent(0.526), bytes(987_654_321), bytes(1_234_567_890)),
            ("53 %".into(), "988 MB".into(), "1.23 GB".into())
        );
    }
}
