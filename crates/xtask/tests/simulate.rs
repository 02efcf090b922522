//! docs/scaling.md says what the scaling decision does today: one of its traces is run again and compared.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::fs;

use xtask::{paths, simulate};

#[test]
fn the_page_is_what_the_simulator_says() {
    let (section, figure) = simulate::part("bursty").unwrap();
    let docs = paths::repository().join("docs");
    let page = fs::read_to_string(docs.join("scaling.md")).unwrap();
    let written = fs::read_to_string(docs.join("scaling/bursty.svg")).unwrap();
    let next = "Next: cargo xtask simulate --write";
    assert!(page.contains(&section), "docs/scaling.md has not this section. {next}\n{section}");
    assert!(written == figure, "docs/scaling/bursty.svg is another figure. {next}");
}
