//! Figures of Prometheus' text format.

/// The sum of all series of that name whose labels hold `label` (empty: any).
pub fn sum(text: &str, name: &str, label: &str) -> f64 {
    let series = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once('}')?,
            None => ("", rest.strip_prefix(' ')?),
        };
        if !labels.contains(label) {
            return None;
        }
        value.split_whitespace().next()?.parse::<f64>().ok()
    });
    series.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_series_count() {
        let text = "# HELP a_total words\na_total{kind=\"x\"} 3\na_total{kind=\"y\"} 4 1700000000\na_total_more{kind=\"x\"} 9\nb 2.5\n";
        assert_eq!(sum(text, "a_total", ""), 7.0);
        assert_eq!(sum(text, "a_total", "kind=\"x\""), 3.0);
        assert_eq!(sum(text, "b", ""), 2.5);
        assert_eq!(sum(text, "c", ""), 0.0);
    }
}
