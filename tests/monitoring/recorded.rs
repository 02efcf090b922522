//! A program's numbers as they are recorded beside this file, for `cargo xtask test --only chart` to have a real Prometheus read.
use std::collections::BTreeSet;
use std::path::Path;
use std::{env, fs};

/// Holds names and labels of `text` against the recorded file; values differ from run to run.
pub fn hold(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/monitoring").join(file);
    if env::var_os("LATHE_RECORD").is_some() {
        fs::write(&path, text).expect("the file is written");
    }
    let recorded = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        series(&recorded) == series(text),
        "tests/monitoring/{file} is not what the program says. Next: run this test with LATHE_RECORD=1, then\n\
         cargo xtask test --only chart. The program says:\n{text}"
    );
}

fn series(text: &str) -> BTreeSet<&str> {
    let without_value = |line: &'_ str| line.rfind(' ').unwrap_or(line.len());
    text.lines().map(|line| if line.starts_with('#') { line } else { &line[..without_value(line)] }).collect()
}
