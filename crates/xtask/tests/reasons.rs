//! Every reason that a status, or an exit of `lathe`, can carry is explained in docs/failures.md, and nothing else is.
//!
//! Reasons are API: people and programs look them up. They stand in the code where they are decided, as words in CamelCase;
//! this test reads every such word and asks for it on the page, so that the page is the one list of them.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Crates that decide reasons.
const CRATES: [&str; 6] = ["cli", "operator", "resolve", "scaling", "source", "worker"];

/// Words in CamelCase that are no reasons of ours, by what they are.
const OTHERS: &[&str] = &[
    // Kinds, conditions and columns.
    "AcceleratorProfile Arrow Available Base Chat DatasetValid FineTuneJob",
    "InferenceService Ingress List Method Model Optimizer PersistentVolumeClaim Ready RolledOut Rows ScalingActive Schedule Seed",
    "Steps Succeeded Targets Text Tokens",
    // Values of Kubernetes' objects, and what its status says.
    "Always AlwaysAllow Complete DisruptionTarget Recreate DoesNotExist Equal Exists FailJob Failed False",
    "FieldManagerConflict File Gt Ignore In Lt NamespaceTerminating Never NoSchedule NotIn OnRootMismatch Opaque Pending",
    "PodScheduled ReadWriteOnce ReplicaFailure RollingUpdate Running RuntimeDefault True Unknown",
    "ContainerCreating CreateContainerConfigError CreateContainerError ErrImageNeverPull ErrImagePull",
    "FailedAttachVolume FailedCreate FailedCreatePodSandBox FailedMount ImagePullBackOff InvalidImageName OOMKilled Pulling",
    "Preempting PreemptionByScheduler RunContainerError",
    // Values of manifests and files, and other programs' words.
    "AdamW AllLinear GatedRepo Parquet PromptCompletion",
    // Events of the operator, and states that `lathe status` shows.
    "AttemptStarted Cancelled Deleting Done FellBack ModelMade Read Reconcile Resumed RollOut Scale Stuck Working",
];

#[test]
fn every_reason_is_explained() {
    let (coded, page) = (coded(), page());
    let unexplained: Vec<String> = coded
        .iter()
        .filter(|(word, _)| !page.contains(*word))
        .map(|(word, file)| format!("{word} ({})", file.display()))
        .collect();
    assert!(
        unexplained.is_empty(),
        "not in docs/failures.md: {unexplained:#?}. Next: explain it there, or name it in OTHERS here if it is no reason."
    );
    let gone: Vec<&String> = page.iter().filter(|word| !coded.contains_key(*word)).collect();
    assert!(gone.is_empty(), "docs/failures.md explains what nothing says any more: {gone:?}");
}

#[test]
fn no_word_is_excused_in_vain() {
    let known = words(&CRATES, |_| true);
    let vain: Vec<&str> = others().into_iter().filter(|word| !known.contains_key(*word)).collect();
    assert!(vain.is_empty(), "in no crate any more: {vain:?}");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn others() -> BTreeSet<&'static str> {
    OTHERS.iter().flat_map(|line| line.split(' ')).collect()
}

/// Reasons of the code, each with a file that has it.
fn coded() -> BTreeMap<String, PathBuf> {
    let others = others();
    let mut coded = words(&CRATES, |word| !others.contains(word));
    // The phases of a worker are reasons of `Training`.
    let file = root().join("crates/contract/src/report.rs");
    let text = fs::read_to_string(&file).unwrap();
    let phases = text.split_once("pub enum Phase {").unwrap().1.split_once('}').unwrap().0;
    let phases = phases.lines().filter_map(|line| line.trim().strip_suffix(','));
    let phases = phases.filter(|phase| !["Serving", "Draining", "Done"].contains(phase));
    coded.extend(phases.map(|phase| (phase.to_owned(), file.clone())));
    coded
}

/// String literals in CamelCase outside of tests.
fn words(crates: &[&str], wanted: impl Fn(&str) -> bool) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    let mut folders: Vec<PathBuf> =
        crates.iter().map(|name| root().join("crates").join(name).join("src")).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            if ["tests", "testing", "fixtures", "recorded"].contains(&name) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            // Between quotes: whatever stands in the wrong half is no single word.
            let literals = code
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .flat_map(|line| line.split('"'));
            for word in literals.filter(|word| is_camel_case(word) && wanted(word)) {
                found.insert(word.to_owned(), path.clone());
            }
        }
    }
    found
}

/// `NotFound`, `Queued`; not `OK`, `BF16` or `_Not`.
fn is_camel_case(word: &str) -> bool {
    let small = word.bytes().filter(u8::is_ascii_lowercase).count();
    word.len() > 1
        && word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.bytes().all(|b| b.is_ascii_alphanumeric())
        && small * 2 >= word.len()
}

/// Words in the first column of the page's tables of reasons.
fn page() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("docs/failures.md")).unwrap();
    let mut reasons = BTreeSet::new();
    let mut in_table = false;
    for line in text.lines() {
        in_table = line.starts_with("| Reason ") || (in_table && line.starts_with('|'));
        let first = line.split('|').nth(1).filter(|_| in_table).unwrap_or_default();
        reasons.extend(first.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    reasons
}
