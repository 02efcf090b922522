//! `docs/benchmarks.md`: words by hand, tables between marks.

use std::fs;

use anyhow::{Context, Result};

use super::Found;
use super::machine::Machine;
use super::stats::bytes;
use crate::paths;

const PAGE: &str = "docs/benchmarks.md";

/// Puts what was found between the part's marks.
///
/// # Errors
/// The page cannot be read or written, or has no such marks.
pub(super) fn write(machine: &Machine, quick: bool, found: &Found) -> Result<()> {
    let path = paths::repository().join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("cannot read {PAGE}"))?;
    let mut text = about(machine, quick, found.loads);
    found.tables.iter().for_each(|table| text.push_str(&table.markdown()));
    let page = between(&page, found.part, &text)
        .with_context(|| format!("{PAGE} has no marks `<!-- {0} -->` and `<!-- /{0} -->`", found.part))?;
    fs::write(&path, page).with_context(|| format!("cannot write {PAGE}"))
}

fn about(machine: &Machine, quick: bool, [before, after]: [f64; 2]) -> String {
    let Machine { processor, cores, memory, features, date, commit } = machine;
    let runs = if quick { ", with few runs (`--quick`)" } else { "" };
    format!(
        "Measured {date}{runs} at commit {commit} on {processor}, {cores} cores ({}), {} of memory. Load average of the machine \
         before: {before:.1}, after: {after:.1} (the measurements themselves make up to {cores}; what is above was other work).\n\n",
        features.join(", "),
        bytes(*memory),
    )
}

/// The page with `text` between the marks of `part`.
pub(crate) fn between(page: &str, part: &str, text: &str) -> Option<String> {
    let (open, close) = (format!("<!-- {part} -->\n"), format!("<!-- /{part} -->"));
    let (before, rest) = page.split_once(&open)?;
    let (_, after) = rest.split_once(&close)?;
    Some(format!("{before}{open}\n{text}{close}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_replaced_and_the_rest_stays() {
        let page = "words\n<!-- a -->\nold\n<!-- /a -->\nmore\n<!-- b -->\n<!-- /b -->\n";
        let expected = "words\n<!-- a -->\n\nnew\n<!-- /a -->\nmore\n<!-- b -->\n<!-- /b -->\n";
        assert_eq!(between(page, "a", "new\n").as_deref(), Some(expected));
        assert_eq!(between(page, "c", "new\n"), None);
    }
}
