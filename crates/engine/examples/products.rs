//! How fast the products of a decoder run here, beside the multiply-adds that one thread can do at most:
//! `cargo run --release -p lathe-engine --example products [rows] [level]`.
//!
//! Times are the best of a few rounds on one thread.
#![allow(clippy::unwrap_used)] // A program for developers.

use std::time::Instant;

use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Buf, Data, Device, Element, Op, Start};
use lathe_engine::plan::{PRODUCT_PANEL, PRODUCT_SCRATCH};

/// Outputs and inputs of the linear layers of a 0.5 B model, and its head.
const SHAPES: [(usize, usize); 4] = [(896, 896), (4864, 896), (896, 4864), (151_936, 896)];
const ROUNDS: usize = 5;

fn main() {
    let rows = std::env::args().nth(1).map_or(512, |rows| rows.parse().unwrap());
    let only = std::env::args().nth(2);
    println!(
        "{:11} {:16} {:>5} {:>8} {:>6} {:>10} {:>8}",
        "level", "product", "rows", "outputs", "inputs", "GFLOP/s", "GB/s"
    );
    for level in Level::here().filter(|level| only.as_deref().is_none_or(|only| level.name() == only)) {
        for (outputs, inputs) in SHAPES {
            let rows = if outputs > 100_000 { rows.min(128) } else { rows };
            let mut cpu = Cpu::new(1, level);
            let scratch = cpu.alloc("scratch", Element::F32, PRODUCT_SCRATCH + PRODUCT_PANEL).unwrap();
            cpu.set_scratch(scratch);
            let mut f32 = |len| cpu.alloc("bench", Element::F32, len).unwrap();
            let (x, y) = (f32(rows * inputs), f32(rows * outputs));
            let wide = f32(outputs * inputs);
            let narrow = cpu.alloc("bench", Element::BF16, outputs * inputs).unwrap();
            let mut few_bits = |element: Element| {
                let to = element.quantized_bytes(outputs, inputs).unwrap();
                let to = cpu.alloc("bench", element, to).unwrap();
                cpu.enqueue(Op::Quantize { from: narrow, to, first: 0, rows: outputs, outputs, inputs });
                to
            };
            let (int8, int4) = (few_bits(Element::Int8), few_bits(Element::Int4));
            let forward = |w: Buf| Op::Linear { x, w, y, rows, outputs, inputs, start: Start::Zero };
            let back = |w: Buf| Op::LinearInputGrad { dy: y, w, dx: x, rows, outputs, inputs, keep: false };
            let positions = cpu.alloc("positions", Element::U32, rows).unwrap();
            cpu.write(positions, Data::U32(&(0..rows as u32).collect::<Vec<_>>()));
            let weight = |positions| {
                let (dy, dw) = (y, wide);
                Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions }
            };
            for (name, op, w) in [
                ("y = x w^T, f32", forward(wide), wide),
                ("y = x w^T, bf16", forward(narrow), narrow),
                ("y = x w^T, int8", forward(int8), int8),
                ("y = x w^T, int4", forward(int4), int4),
                ("dx = dy w, bf16", back(narrow), narrow),
                ("dw = dy^T x, f32", weight(None), wide),
                ("dw = dy^T x, bf16", weight(Some(positions)), wide),
            ] {
                let seconds = fastest(&mut cpu, &op);
                let bytes = (w.len() * w.element().bytes()) as f64;
                let flops = (2 * rows * outputs * inputs) as f64;
                let (flops, bytes) = (flops / seconds / 1e9, bytes / seconds / 1e9);
                println!(
                    "{:11} {name:16} {rows:5} {outputs:8} {inputs:6} {flops:10.1} {bytes:8.2}",
                    level.name()
                );
            }
        }
    }
}

fn fastest(cpu: &mut Cpu, op: &Op) -> f64 {
    cpu.enqueue(op.clone());
    let round = |_| {
        let started = Instant::now();
        cpu.enqueue(op.clone());
        started.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}
