//! AMX's kernels: the emulation is held to formulas like every level; here the instructions are held to it.
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{get, here, put, random};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Data, Device, Element, Op, Start};
use rstest::rstest;

#[rstest]
fn whole_products_have_the_bits_of_the_emulation(
    #[values((1, 70, 1500), (3, 33, 40), (16, 16, 32), (17, 31, 94), (50, 48, 640), (100, 35, 2700), (390, 270, 34), (530, 33, 1100), (530, 1100, 40))]
    extent: (usize, usize, usize),
    #[values(Element::BF16, Element::Int8, Element::Int4)] element: Element,
) {
    let (Some(amx), Some(emulated)) = (here(2, Level::Amx), here(1, Level::AmxEmulated)) else { return };
    assert_eq!(products(amx, element, extent), products(emulated, element, extent));
}

/// The bits of `y` and of `dx`.
fn products(mut cpu: Cpu, element: Element, (rows, outputs, inputs): (usize, usize, usize)) -> [Vec<u32>; 2] {
    let weights = random(3, outputs * inputs);
    let w = if element == Element::BF16 {
        let w = cpu.alloc("test", element, weights.len()).unwrap();
        cpu.write(w, Data::BF16(&weights.iter().map(|x| (x.to_bits() >> 16) as u16).collect::<Vec<_>>()));
        w
    } else {
        let from = put(&mut cpu, &weights);
        let to = cpu.alloc("test", element, element.quantized_bytes(outputs, inputs).unwrap()).unwrap();
        cpu.enqueue(Op::Quantize { from, to, first: 0, rows: outputs, outputs, inputs });
        to
    };
    let [x, dy] = [(1, inputs), (2, outputs)].map(|(key, width)| put(&mut cpu, &random(key, rows * width)));
    let [y, dx] = [outputs, inputs].map(|width| put(&mut cpu, &vec![0.0; rows * width]));
    cpu.enqueue(Op::Linear { x, w, y, rows, outputs, inputs, start: Start::Zero });
    let mut results = [get(&mut cpu, y), Vec::new()];
    // Weights of few bits are widened for their gradient, as at other levels.
    if element == Element::BF16 {
        cpu.enqueue(Op::LinearInputGrad { dy, w, dx, rows, outputs, inputs, keep: false });
        results[1] = get(&mut cpu, dx);
    }
    results.map(|result| result.iter().map(|x| x.to_bits()).collect())
}
