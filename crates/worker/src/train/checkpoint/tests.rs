//! What is left of a checkpoint after every accident, and what is made of it.
use std::fs;
use std::io::Read;

use super::disk::list;
use super::*;

const SETTINGS: &str = "0123456789abcdef0123";

fn position(step: u64) -> Position {
    Position { step, tokens: step * 100, ..Position::default() }
}

/// As a worker opens it, each with a token of its own.
fn open(dir: &Path, settings: &str, keep: usize, token: &str) -> Store {
    Store::open(dir, settings, keep, token, &format!("FineTuneJob ns/{token}")).unwrap()
}

fn taken(done: Done<impl Sized>) -> String {
    match done {
        Err(Halt::Failed(trouble)) => {
            assert_eq!((trouble.reason.as_str(), trouble.user_error), ("CheckpointsTaken", false));
            trouble.cause
        }
        _ => panic!("two writers at once"),
    }
}

fn checkpoints(store: &Store) -> Vec<String> {
    store.places().unwrap().into_iter().map(|place| place.name).collect()
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
    let store = open(dir.path(), SETTINGS, 2, "w1");
    assert_eq!(resumed(&store), None);
    for step in [5, 9, 10, 100] {
        write(&store, step).unwrap();
    }
    assert_eq!(checkpoints(&store), ["step-10.w1", "step-100.w1"]);
    assert_eq!(resumed(&open(dir.path(), SETTINGS, 2, "w2")), Some(100));
    assert_eq!(resumed(&open(dir.path(), "fedcba9876543210", 2, "w3")), None);
}

#[test]
fn a_damaged_one_falls_back_to_the_one_before_whatever_byte_is_damaged() {
    for file in [STATE, MANIFEST] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), SETTINGS, 2, "w4");
        write(&store, 1).unwrap();
        write(&store, 2).unwrap();
        let path = store.dir.join("step-2.w4").join(file);
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
        let store = open(dir.path(), SETTINGS, 2, "w10");
        write(&store, 2).unwrap();
        assert_eq!(resumed(&store), Some(2));
    }
}

#[test]
fn one_that_the_trainer_refuses_falls_back_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), SETTINGS, 2, "w5");
    write(&store, 1).unwrap();
    write(&store, 2).unwrap();
    let refuse = |found: &Found, _: &mut File| match found.position.step {
        2 => Err(Halt::user("CheckpointUnusable", "x", "y")),
        _ => Ok(()),
    };
    assert_eq!(store.resume(refuse).unwrap().map(|found| found.position.step), Some(1));
}

#[test]
fn a_failed_write_leaves_nothing_and_keeps_those_before() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), SETTINGS, 2, "w6");
    write(&store, 1).unwrap();
    let full = store.write(&position(2), |to| {
        to.write_all(b"half")?;
        Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into())
    });
    assert!(matches!(full, Err(Halt::Failed(t)) if t.reason == "DiskFull" && t.user_error));
    assert_eq!(checkpoints(&store), ["step-1.w6"]);
}

#[test]
fn what_a_killed_process_left_is_removed_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), SETTINGS, 2, "w7");
    fs::create_dir(store.dir.join(".step-7.partial")).unwrap();
    fs::write(store.dir.join(".step-7.partial/state"), "half").unwrap();
    fs::write(store.dir.join(".before.partial"), "half").unwrap();
    let store = open(dir.path(), SETTINGS, 2, "w8");
    assert_eq!(list(&store.dir).unwrap(), ["owner-2"]);
}

#[test]
fn a_note_is_whole_or_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), SETTINGS, 2, "w9");
    assert_eq!(store.noted::<u32>("before"), None);
    store.note("before", &7u32).unwrap();
    assert_eq!(store.noted::<u32>("before"), Some(7));
    fs::write(store.dir.join("before.json"), "8\n").unwrap();
    assert_eq!(store.noted::<u32>("before"), None);
}

#[test]
fn the_one_that_comes_last_has_the_folder_and_the_others_end() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path(), SETTINGS, 2, "first");
    write(&first, 1).unwrap();
    let second = open(dir.path(), SETTINGS, 2, "second");
    assert_eq!(resumed(&second), Some(1));
    let cause = taken(write(&first, 2));
    assert!(cause.starts_with("FineTuneJob ns/second has begun the same training"), "{cause}");
    taken(first.clear());
    write(&second, 2).unwrap();
    assert_eq!(checkpoints(&second), ["step-1.first", "step-2.second"]);
    second.clear().unwrap();
    taken(second.is_ours());
    // A folder of the same name, made anew, is not the old one's.
    let third = open(dir.path(), SETTINGS, 2, "third");
    taken(write(&second, 3));
    write(&third, 1).unwrap();
    assert_eq!(checkpoints(&third), ["step-1.third"]);
}

#[test]
fn one_that_is_taken_over_in_the_middle_of_a_write_mixes_with_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path(), SETTINGS, 2, "first");
    write(&first, 1).unwrap();
    let mut second = None;
    let written = first.write(&position(2), |to| {
        to.write_all(b"half of ")?;
        let other = open(dir.path(), SETTINGS, 2, "second");
        other
            .write(&position(2), |to| Ok(to.write_all(b"state 2")?))
            .map_err(|_| std::io::Error::other("x"))?;
        second = Some(other);
        Ok(to.write_all(b"state 2")?)
    });
    taken(written);
    let second = second.unwrap();
    assert_eq!(checkpoints(&second), ["step-1.first", "step-2.second"]);
    assert_eq!(resumed(&second), Some(2));
}

#[test]
fn of_many_that_come_at_once_one_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let stores: Vec<Store> = std::thread::scope(|scope| {
        let one = |token: usize| open(dir.path(), SETTINGS, 2, &format!("w{token}"));
        let all: Vec<_> = (0..8).map(|token| scope.spawn(move || one(token))).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let left: Vec<&Store> = stores.iter().filter(|store| store.is_ours().is_ok()).collect();
    assert_eq!(left.len(), 1);
    write(left[0], 1).unwrap();
}

#[test]
fn what_lies_ahead_and_cannot_be_used_does_not_displace_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    write(&open(dir.path(), SETTINGS, 1, "w1"), 100).unwrap();
    let store = open(dir.path(), SETTINGS, 1, "w2");
    fs::write(store.dir.join("step-100.w1").join(STATE), "damaged").unwrap();
    assert_eq!(resumed(&store), None);
    write(&store, 1).unwrap();
    assert_eq!(checkpoints(&store), ["step-1.w2"]);
}
