//! What is left of a checkpoint after every accident, and what is made of it.
use std::fs;
use std::io::Read;

use super::disk::list;
use super::*;

const SETTINGS: &str = "0123456789abcdef0123";

fn position(step: u64) -> Position {
    Position { step, tokens: step * 100, ..Position::default() }
}

fn write(store: &Store, step: u64) -> Done<String> {
    store.write(&position(step), |to| Ok(to.write_all(format!("state {step}").as_bytes())?))
}

fn resumed(store: &Store) -> Option<u64> {
    let mut text = String::new();
    let found = store
        .resume(|_, state| {
            text.clear();
            state.read_to_string(&mut text).unwrap();
            Ok(())
        })
        .unwrap()?;
    assert_eq!(text, format!("state {}", found.position.step));
    assert_eq!(found.position.tokens, found.position.step * 100);
    Some(found.position.step)
}

#[test]
fn the_newest_of_those_kept_is_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
    assert_eq!(resumed(&store), None);
    for step in [5, 9, 10, 100] {
        write(&store, step).unwrap();
    }
    assert_eq!(store.steps().unwrap(), [10, 100]);
    assert_eq!(resumed(&Store::open(dir.path(), SETTINGS, 2).unwrap()), Some(100));
    assert_eq!(resumed(&Store::open(dir.path(), "fedcba9876543210", 2).unwrap()), None);
}

#[test]
fn a_damaged_one_falls_back_to_the_one_before_whatever_byte_is_damaged() {
    for file in [STATE, MANIFEST] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
        write(&store, 1).unwrap();
        write(&store, 2).unwrap();
        let path = store.dir.join("step-2").join(file);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            // A changed line end at the very end changes nothing that is read.
            let expected = if file == MANIFEST && at + 1 == whole.len() { continue } else { 1 };
            assert_eq!(resumed(&store), Some(expected), "{file} byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(resumed(&store), Some(1), "{file} cut at {at}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(resumed(&store), Some(1));
        // Training comes past it again.
        write(&store, 2).unwrap();
        assert_eq!(resumed(&store), Some(2));
    }
}

#[test]
fn one_that_the_trainer_refuses_falls_back_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
    write(&store, 1).unwrap();
    write(&store, 2).unwrap();
    let refuse = |found: &Found, _: &mut dyn Read| match found.position.step {
        2 => Err(Halt::user("CheckpointUnusable", "x", "y")),
        _ => Ok(()),
    };
    assert_eq!(store.resume(refuse).unwrap().map(|found| found.position.step), Some(1));
}

#[test]
fn a_failed_write_leaves_nothing_and_keeps_those_before() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
    write(&store, 1).unwrap();
    let full = store.write(&position(2), |to| {
        to.write_all(b"half")?;
        Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into())
    });
    assert!(matches!(full, Err(Halt::Failed(t)) if t.reason == "DiskFull" && t.user_error));
    assert_eq!(list(&store.dir).unwrap(), ["step-1"]);
}

#[test]
fn what_a_killed_process_left_is_removed_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
    fs::create_dir(store.dir.join(".step-7.partial")).unwrap();
    fs::write(store.dir.join(".step-7.partial/state"), "half").unwrap();
    fs::write(store.dir.join(".before.partial"), "half").unwrap();
    let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
    assert!(list(&store.dir).unwrap().is_empty());
}

#[test]
fn a_note_is_whole_or_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SETTINGS, 2).unwrap();
    assert_eq!(store.noted::<u32>("before"), None);
    store.note("before", &7u32).unwrap();
    assert_eq!(store.noted::<u32>("before"), Some(7));
    fs::write(store.dir.join("before.json"), "8\n").unwrap();
    assert_eq!(store.noted::<u32>("before"), None);
}
