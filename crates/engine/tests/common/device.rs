//! A device in a test's hands: buffers in, operations, buffers out.

use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Buf, Data, DataMut, Device, Element};

use lathe_engine::plan::{PRODUCT_PANEL, PRODUCT_SCRATCH};

use super::noise;

pub fn cpu(threads: usize, level: Level) -> Cpu {
    cpu_with(threads, level, PRODUCT_SCRATCH)
}

/// A device whose threads have so much scratch each.
fn cpu_with(threads: usize, level: Level, scratch: usize) -> Cpu {
    let mut cpu = Cpu::new(threads, level);
    let scratch = threads * scratch + PRODUCT_PANEL;
    let scratch = cpu.alloc("scratch", Element::F32, scratch).unwrap();
    cpu.set_scratch(scratch);
    cpu
}

/// A device of this level, where the machine has it; else it says that the test is skipped.
pub fn here(threads: usize, level: Level) -> Option<Cpu> {
    here_with(threads, level, PRODUCT_SCRATCH)
}

/// As [`here`], with so much scratch for each thread.
pub fn here_with(threads: usize, level: Level, scratch: usize) -> Option<Cpu> {
    if Level::here().any(|here| here == level) {
        return Some(cpu_with(threads, level, scratch));
    }
    eprintln!("skipped: this machine lacks {}", level.name());
    None
}

pub fn put(cpu: &mut Cpu, values: &[f32]) -> Buf {
    let buf = cpu.alloc("test", Element::F32, values.len()).unwrap();
    cpu.write(buf, Data::F32(values));
    buf
}

pub fn numbers(cpu: &mut Cpu, values: &[u32]) -> Buf {
    let buf = cpu.alloc("test", Element::U32, values.len()).unwrap();
    cpu.write(buf, Data::U32(values));
    buf
}

pub fn get(cpu: &mut Cpu, buf: Buf) -> Vec<f32> {
    let mut values = vec![0.0; buf.len()];
    cpu.read(buf, DataMut::F32(&mut values));
    values
}

pub fn random(key: u64, len: usize) -> Vec<f32> {
    (0..len).map(|i| noise(key, i as u64) as f32).collect()
}
