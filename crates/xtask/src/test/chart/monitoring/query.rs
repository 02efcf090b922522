//! A query: whether it has an answer, and whether all that it names is there.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::prometheus::Api;

/// What Grafana puts in, and one thing that it may put in: the recorded service.
const VARIABLES: [(&str, &str); 3] =
    [("$__rate_interval", "1m"), ("$namespace", "team-a"), ("$service", "support")];

/// Words that are followed by a list of labels in parentheses.
const GROUPING: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Words that are neither metric nor function.
const WORDS: [&str; 6] = ["and", "or", "unless", "bool", "offset", "atan2"];

/// An expression and what stands around it.
pub struct Query {
    /// Where it stands.
    pub place: String,
    pub expression: String,
    /// Labels that are shown.
    pub labels: BTreeSet<String>,
    /// Whether there must be series; alerts have none while all is well.
    pub answers: bool,
}

impl Query {
    /// Of a rule or a panel.
    ///
    /// # Errors
    /// It has no name, no expression, or a variable that nobody knows.
    pub fn of(place: &Value, expression: &Value, labels: BTreeSet<String>, answers: bool) -> Result<Self> {
        let place = place.as_str().context("a query has no name")?.to_owned();
        let mut text = expression.as_str().with_context(|| format!("{place} has no expression"))?.to_owned();
        for (variable, value) in VARIABLES {
            text = text.replace(variable, value);
        }
        ensure!(!text.contains('$'), "{place}: a variable that nobody knows: {text}");
        Ok(Self { place, expression: text, labels, answers })
    }

    /// # Errors
    /// Prometheus refuses the expression, or there are no series, or they lack a label that is shown.
    pub fn answer(&self, api: &Api) -> Result<()> {
        let series = api.query(&self.expression)?;
        if !self.answers {
            return Ok(());
        }
        ensure!(!series.is_empty(), "no series: {}", self.expression);
        let lacking = self.labels.iter().find(|label| series.iter().all(|of| of[label.as_str()].is_null()));
        ensure!(lacking.is_none(), "{lacking:?} is shown, and no series has it: {}", self.expression);
        Ok(())
    }

    /// # Errors
    /// A selector finds nothing, or a label is of none of them.
    pub fn strangers(&self, api: &Api) -> Result<()> {
        let Named { selectors, labels } = named(&self.expression);
        let place = || format!("{}: {}", self.place, self.expression);
        ensure!(!selectors.is_empty(), "{} names no metric", place());
        let mut known = BTreeSet::new();
        for selector in selectors {
            let series = api.series(&selector).with_context(place)?;
            ensure!(!series.is_empty(), "{}: no program of ours has {selector}", place());
            known.extend(series.iter().filter_map(Value::as_object).flat_map(|of| of.keys().cloned()));
        }
        let strange: Vec<_> = labels.union(&self.labels).filter(|label| !known.contains(*label)).collect();
        ensure!(strange.is_empty(), "{}: no program of ours has the label {strange:?}", place());
        Ok(())
    }
}

/// What an expression names.
#[derive(Debug, Default, PartialEq, Eq)]
struct Named {
    /// Each with its matchers, as it stands there.
    selectors: BTreeSet<String>,
    /// Labels of `by`, `on` and their like.
    labels: BTreeSet<String>,
}

/// Finds them, by as much of PromQL's grammar as our expressions use. What Prometheus itself refuses may come out as anything.
fn named(expression: &str) -> Named {
    let mut found = Named::default();
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        if is_name(first) && !first.is_ascii_digit() {
            let (word, after) = rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len()));
            let next = after.trim_start();
            rest = after;
            if GROUPING.contains(&word) && next.starts_with('(') {
                let (list, after) = enclosed(next, ')');
                let labels = list.split([',', '(', ')']).map(str::trim).filter(|label| !label.is_empty());
                found.labels.extend(labels.map(str::to_owned));
                rest = after;
            } else if next.starts_with('{') {
                let (matchers, after) = enclosed(next, '}');
                found.selectors.insert(format!("{word}{matchers}"));
                rest = after;
            } else if !WORDS.contains(&word) && !next.starts_with('(') && !is_aggregation(next) {
                found.selectors.insert(word.to_owned());
            }
        } else if first == '"' || first == '\'' {
            rest = string(rest).1;
        } else if first == '[' {
            rest = enclosed(rest, ']').1;
        } else if first.is_ascii_digit() {
            rest = rest.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '.');
        } else {
            rest = &rest[first.len_utf8()..];
        }
    }
    found
}

/// The words of a template that are put in where it says `{{label}}`, or `$labels.label`.
pub fn labels_of(template: &str, before: &str) -> BTreeSet<String> {
    let ends = |text: &str| text.find(|c| !is_name(c)).unwrap_or(text.len());
    template.split(before).skip(1).map(|text| text[..ends(text)].to_owned()).collect()
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// True before `by (...)` or `without (...)`: the word was `sum` or the like.
fn is_aggregation(next: &str) -> bool {
    ["by", "without"]
        .iter()
        .any(|word| next.strip_prefix(word).is_some_and(|after| after.trim_start().starts_with('(')))
}

/// Up to and with `end`, strings apart, and what follows.
fn enclosed(text: &str, end: char) -> (&str, &str) {
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        rest = if first == '"' || first == '\'' { string(rest).1 } else { &rest[first.len_utf8()..] };
        if first == end {
            break;
        }
    }
    text.split_at(text.len() - rest.len())
}

/// A string in its quotes, and what follows.
fn string(text: &str) -> (&str, &str) {
    let (quote, mut escaped) = (text.chars().next(), false);
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let ends = !escaped && Some(*c) == quote;
        escaped = !escaped && *c == '\\';
        ends
    });
    text.split_at(end.map_or(text.len(), |(at, quote)| at + quote.len_utf8()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(words: &[&str]) -> BTreeSet<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn selectors_and_labels_are_found() {
        for (expression, selectors, labels) in [
            ("up", &["up"][..], &[][..]),
            (
                "sum by (a, by) (rate(x_total{code=~\"5..\", by=\"a}\"}[5m] offset 1h)) > 0.05",
                &["x_total{code=~\"5..\", by=\"a}\"}"],
                &["a", "by"],
            ),
            (
                "sum(vllm:waiting) by (pod) / on () group_left (c) level:x:rate5m",
                &["vllm:waiting", "level:x:rate5m"],
                &["pod", "c"],
            ),
            ("absent(leader == 1) or vector(0)", &["leader"], &[]),
            ("a and b unless c{}", &["a", "b", "c{}"], &[]),
            (r#"label_replace(x, "to", "\"$1", "from", "(.*)") + 1e3"#, &["x"], &[]),
        ] {
            let expected = Named { selectors: set(selectors), labels: set(labels) };
            assert_eq!(named(expression), expected, "{expression}");
        }
    }

    #[test]
    fn labels_of_templates_are_found() {
        assert_eq!(labels_of("{{kind}} failed: {{reason}}", "{{"), set(&["kind", "reason"]));
        assert_eq!(labels_of("{{ with $labels.a }}{{ $labels.b_c}}", "$labels."), set(&["a", "b_c"]));
    }
}
