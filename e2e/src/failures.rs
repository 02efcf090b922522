//! docs/failures.md names no reason that the sources do not.
use std::{collections::BTreeSet, fs, path::Path};

use crate::{machine::files, repository};

/// Words in backquotes in the first column of a table, such as `DiskFull`.
fn reasons(page: &str) -> BTreeSet<&str> {
    let first = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let words = first.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    words.filter(|word| word.starts_with(|c: char| c.is_ascii_uppercase()) && !word.contains('=')).collect()
}

fn sources(folder: &Path) -> String {
    let code = files(folder).expect("sources").into_iter().filter(|file| file.ends_with(".rs"));
    code.filter(|file| file.contains("/src/") && !file.contains("tests"))
        .map(|file| fs::read_to_string(folder.join(file)).expect("text"))
        .collect()
}

#[test]
fn every_reason_on_the_page_is_one_that_the_programs_give() {
    let page = fs::read_to_string(repository().join("docs/failures.md")).expect("the page");
    let named = reasons(&page);
    assert!(named.len() > 40, "the tables are not found: {named:?}");
    let sources = sources(&repository().join("crates"));
    let unknown: Vec<_> = named.iter().filter(|word| !sources.contains(&format!("\"{word}\""))).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
