//! A run's state as bytes: identity, kernel level, step, then weights and moments of every parameter, then a checksum.

use std::io::{Read, Seek, SeekFrom, Write};

use super::optimizer::Parameters;
use crate::device::cpu::Level;
use crate::device::{Buf, Data, Device, Element};
use crate::random::mix;
use crate::{Error, Result, host};

const MAGIC: &[u8; 16] = b"lathe training 3";

/// Bytes for a level's name, filled up with zeros.
const LEVEL: usize = 32;

/// A running checksum: finds truncation and damage, not malice (a manifest's digest does that).
struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            self.0 = mix(self.0 ^ u64::from_le_bytes(padded)).wrapping_add(word.len() as u64);
        }
    }
}

/// Writes a state.
pub(super) fn save(
    dev: &mut dyn Device,
    identity: &str,
    level: Level,
    steps: u64,
    parameters: &Parameters,
    to: &mut dyn Write,
) -> Result<()> {
    let mut sum = Sum(0);
    let mut put = |bytes: &[u8]| {
        sum.add(bytes);
        to.write_all(bytes)
    };
    put(MAGIC)?;
    put(&(identity.len() as u64).to_le_bytes())?;
    put(identity.as_bytes())?;
    let mut name = [0; LEVEL];
    name.iter_mut().zip(level.name().bytes()).for_each(|(to, byte)| *to = byte);
    put(&name)?;
    put(&steps.to_le_bytes())?;
    for (part, _) in parts(parameters) {
        put(&host::read_bytes(dev, part))?;
    }
    let sum = sum.0;
    to.write_all(&sum.to_le_bytes())?;
    Ok(to.flush()?)
}

/// All values of a state in their order, in parts so small that a copy of one does not matter; where a part is of
/// weights, with the bf16 weights that follow them.
fn parts(parameters: &Parameters) -> impl Iterator<Item = (Buf, Option<Buf>)> {
    parameters.states().flat_map(|(buf, copy)| {
        host::chunks(buf.len()).map(move |range| {
            let part = |buf: Buf| buf.part(range.start, range.len());
            (part(buf), copy.map(part))
        })
    })
}

/// Reads a state to its end and checks it. Returns its step and the name of its kernel level; `from` stands where the values
/// begin then.
pub(super) fn check(
    identity: &str,
    parameters: &Parameters,
    from: &mut (impl Read + Seek),
) -> Result<(u64, String)> {
    let mut sum = Sum(0);
    let mut take = |bytes: &mut [u8]| -> Result<()> {
        fill(from, bytes)?;
        sum.add(bytes);
        Ok(())
    };
    let mut magic = [0; MAGIC.len()];
    take(&mut magic)?;
    if magic != *MAGIC {
        return Err(damaged("it is not a training state of this version"));
    }
    let mut word = [0; 8];
    take(&mut word)?;
    if u64::from_le_bytes(word) != identity.len() as u64 {
        return Err(damaged("it belongs to another model, method, kind of optimizer state or seed"));
    }
    let mut found = vec![0; identity.len()];
    take(&mut found)?;
    if found != identity.as_bytes() {
        return Err(damaged("it belongs to another model, method, kind of optimizer state or seed"));
    }
    let mut level = [0; LEVEL];
    take(&mut level)?;
    let level = String::from_utf8_lossy(&level).trim_end_matches('\0').to_owned();
    take(&mut word)?;
    let steps = u64::from_le_bytes(word);
    let (mut bytes, mut read) = (Vec::new(), 0);
    for (part, _) in parts(parameters) {
        bytes.resize(part.len() * part.element().bytes(), 0);
        take(&mut bytes)?;
        read += bytes.len() as i64;
    }
    let expected = sum.0;
    fill(from, &mut word)?;
    if u64::from_le_bytes(word) != expected {
        return Err(damaged("its checksum is wrong"));
    }
    from.seek(SeekFrom::Current(-read - word.len() as i64))?;
    Ok((steps, level))
}

/// Takes up the values of a state that was checked.
pub(super) fn take_up(dev: &mut dyn Device, parameters: &Parameters, from: &mut dyn Read) -> Result<()> {
    let mut bytes = Vec::new();
    for (part, copy) in parts(parameters) {
        bytes.resize(part.len() * part.element().bytes(), 0);
        fill(from, &mut bytes)?;
        if part.element() == Element::U8 {
            dev.write(part, Data::U8(&bytes));
            continue;
        }
        let values: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        dev.write(part, Data::F32(&values));
        if let Some(copy) = copy {
            host::write_f32(dev, copy, &values);
        }
    }
    Ok(())
}

fn fill(from: &mut (impl Read + ?Sized), bytes: &mut [u8]) -> Result<()> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
        _ => Error::Io(error),
    })
}

fn damaged(what: &str) -> Error {
    Error::State { what: what.to_owned() }
}
