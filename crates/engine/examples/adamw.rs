//! How fast AdamW's update runs here, with moments of f32 and of 8 bits:
//! `cargo run --release -p lathe-engine --example adamw [threads]`.
//!
//! Times are the best of a few rounds. Bytes are those that must pass: weights and moments twice, gradients once.
#![allow(clippy::unwrap_used)] // A program for developers.

use std::time::Instant;

use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Data, Device, Element, MOMENT_BLOCK, Moments, Op, Profiler};

/// Far more than caches hold.
const WEIGHTS: usize = 1 << 25;
const ROUNDS: usize = 12;

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |threads| threads.parse().unwrap());
    println!("{:11} {:8} {:>14} {:>8}", "level", "moments", "10^6 weights/s", "GB/s");
    for level in Level::here() {
        let (mut cpu, spans) = Profiler::new(Cpu::new(threads, level));
        let mut buffer = |element, len| cpu.alloc("bench", element, len).unwrap();
        let [weights, gradients, m, v] = [WEIGHTS; 4].map(|len| buffer(Element::F32, len));
        let codes = [WEIGHTS; 2].map(|len| buffer(Element::U8, len));
        let scales = [WEIGHTS / MOMENT_BLOCK; 2].map(|len| buffer(Element::F32, len));
        let settings = buffer(Element::F32, 4);
        let [norm, loss] = [1; 2].map(|len| buffer(Element::F64, len));
        cpu.write(settings, Data::F32(&[1e-4, 1.0, 1.0, f32::INFINITY]));
        // Of all sizes, as gradients are.
        let noise = |i: u32| {
            let hash = i.wrapping_mul(0x9e37_79b9) ^ i.wrapping_mul(0x85eb_ca6b).rotate_left(13);
            (hash as i32 as f32 / i32::MAX as f32).powi(5) * 1e-3
        };
        cpu.write(gradients, Data::F32(&(0..WEIGHTS as u32).map(noise).collect::<Vec<f32>>()));
        for (name, moments) in [("f32", Moments::F32([m, v])), ("8 bits", Moments::Int8 { codes, scales })] {
            let op = Op::AdamW {
                weights,
                copy: None,
                gradients,
                moments,
                settings,
                norm,
                loss,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                decay: 0.01,
            };
            let round = |_| {
                let started = Instant::now();
                cpu.enqueue(op.clone());
                started.elapsed().as_secs_f64()
            };
            let seconds = (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min);
            let bytes = spans.lock().unwrap().last().unwrap().work.bytes as f64;
            let rate = WEIGHTS as f64 / seconds / 1e6;
            println!("{:11} {name:8} {rate:14.0} {:8.1}", level.name(), bytes / seconds / 1e9);
        }
    }
}
