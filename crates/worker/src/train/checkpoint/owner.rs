//! Who may write the checkpoints of a run: the worker that came last.
//!
//! Nothing tells a dead worker of another node from one that the network hides, and locks of shared volumes hold between
//! nodes on some of them only. So nobody waits for a lease to expire: each worker takes the next number (`owner-<n>`, made
//! by an exclusive create, which every shared file system does on its server), an earlier one ends as soon as it sees a
//! higher number, and whatever it writes before that bears its own token in the name, so that it can never mix with
//! anybody's.
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::{at, list, remove};
use crate::failure::{Done, Halt};

const PREFIX: &str = "owner-";

/// The right to write, until somebody takes the next number.
#[derive(Debug)]
pub struct Owner {
    dir: PathBuf,
    number: u64,
    /// In the name of everything that this worker writes.
    pub token: String,
}

#[derive(Serialize, Deserialize)]
struct Claim {
    token: String,
    who: String,
}

impl Owner {
    /// Takes the next number. `token` must be like no other's; `who` is for the message to whoever had the one before.
    pub fn claim(dir: &Path, token: &str, who: &str) -> Done<Owner> {
        let earlier = numbers(dir)?;
        let mut number = earlier.last().map_or(1, |last| last + 1);
        let claim = Claim { token: token.to_owned(), who: who.to_owned() };
        let text = serde_json::to_vec(&claim).map_err(std::io::Error::from).map_err(at("write", dir))?;
        let (path, mut file) = loop {
            let path = place(dir, number);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                // What a node lists may be older than what there is.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(at("create", &path)(error)),
            }
        };
        file.write_all(&text).map_err(at("write", &path))?;
        file.sync_all().map_err(at("sync", &path))?;
        for number in earlier {
            remove(&place(dir, number))?;
        }
        Ok(Owner { dir: dir.to_owned(), number, token: token.to_owned() })
    }

    /// To be asked before every write that replaces or removes something, and now and then.
    ///
    /// # Errors
    /// `CheckpointsTaken`.
    pub fn holds(&self) -> Done<()> {
        let last = match numbers(&self.dir) {
            Ok(numbers) => numbers.last().copied(),
            // The whole folder went: the one who came after has done the work.
            Err(_) if !self.dir.exists() => None,
            Err(halt) => return Err(halt),
        };
        let claim = last.and_then(|number| {
            let text = fs::read(place(&self.dir, number)).ok()?;
            serde_json::from_slice::<Claim>(&text).ok()
        });
        if last == Some(self.number) && claim.as_ref().is_some_and(|claim| claim.token == self.token) {
            return Ok(());
        }
        let who = claim.map_or_else(|| "another worker".to_owned(), |claim| claim.who);
        let who: String = who.chars().take(200).flat_map(char::escape_debug).collect();
        let cause = format!("{who} has begun the same training since, and goes on from its checkpoints");
        // It may be this one's own successor, or nobody's: another try finds what the other one made.
        Err(Halt::transient(
            "CheckpointsTaken",
            cause,
            "let one of both run alone: the other takes its result over",
        ))
    }
}

fn place(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{PREFIX}{number}"))
}

/// All numbers that are taken, ascending.
fn numbers(dir: &Path) -> Done<Vec<u64>> {
    let mut numbers: Vec<u64> =
        list(dir)?.iter().filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}
