//! A run's state as bytes: identity, step, then weights and moments of every parameter, then a checksum.

use std::io::{Read, Write};

use super::optimizer::Parameters;
use crate::device::{Data, Device};
use crate::random::mix;
use crate::{Error, Result, host};

const MAGIC: &[u8; 16] = b"lathe training 2";

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
    put(&steps.to_le_bytes())?;
    for (buffers, _) in parameters.states() {
        for buf in buffers {
            let bytes: Vec<u8> = host::read_f32(dev, buf).into_iter().flat_map(f32::to_le_bytes).collect();
            put(&bytes)?;
        }
    }
    let sum = sum.0;
    to.write_all(&sum.to_le_bytes())?;
    Ok(to.flush()?)
}

/// Reads a state, checks it in full, and only then takes it up; returns its step.
pub(super) fn load(
    dev: &mut dyn Device,
    identity: &str,
    parameters: &Parameters,
    from: &mut dyn Read,
) -> Result<u64> {
    let damaged = |what: &str| Error::State { what: what.to_owned() };
    let mut sum = Sum(0);
    let mut take = |bytes: &mut [u8]| -> Result<()> {
        from.read_exact(bytes).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
            _ => Error::Io(error),
        })?;
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
        return Err(damaged("it belongs to another model, method, seed or kernel level"));
    }
    let mut found = vec![0; identity.len()];
    take(&mut found)?;
    if found != identity.as_bytes() {
        return Err(damaged("it belongs to another model, method, seed or kernel level"));
    }
    take(&mut word)?;
    let steps = u64::from_le_bytes(word);
    let mut values = Vec::new();
    for (buffers, _) in parameters.states() {
        for buf in buffers {
            let mut bytes = vec![0; buf.len() * 4];
            take(&mut bytes)?;
            values.push(bytes);
        }
    }
    let expected = sum.0;
    from.read_exact(&mut word).map_err(|_| damaged("it ends too early"))?;
    if u64::from_le_bytes(word) != expected {
        return Err(damaged("its checksum is wrong"));
    }
    let mut values = values.into_iter().map(|bytes| {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<f32>>()
    });
    for (buffers, copy) in parameters.states() {
        for (i, buf) in buffers.into_iter().enumerate() {
            let values = values.next().unwrap_or_default();
            dev.write(buf, Data::F32(&values));
            if let (0, Some(copy)) = (i, copy) {
                host::write_f32(dev, copy, &values);
            }
        }
    }
    Ok(steps)
}
