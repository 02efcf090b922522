//! AMX's kernels: the emulation is held to formulas like every level; here the instructions are held to it.
#![allow(clippy::unwrap_used)]

mod common;

use common::device::{get, here, numbers, put, random};
use lathe_engine::device::cpu::{Cpu, Level};
use lathe_engine::device::{Activation, Data, Device, Element, Op, Start};
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

/// The bits of `y`, `dx` and `dw`.
fn products(mut cpu: Cpu, element: Element, (rows, outputs, inputs): (usize, usize, usize)) -> [Vec<u32>; 3] {
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
    let mut results = [get(&mut cpu, y), Vec::new(), Vec::new()];
    // Weights of few bits are widened for their gradient, as at other levels.
    if element == Element::BF16 {
        cpu.enqueue(Op::LinearInputGrad { dy, w, dx, rows, outputs, inputs, keep: false });
        results[1] = get(&mut cpu, dx);
        let dw = put(&mut cpu, &weights);
        let positions = Some(numbers(&mut cpu, &(0..rows as u32).collect::<Vec<_>>()));
        cpu.enqueue(Op::LinearWeightGrad { x, dy, dw, rows, outputs, inputs, positions });
        results[2] = get(&mut cpu, dw);
    }
    results.map(|result| result.iter().map(|x| x.to_bits()).collect())
}

/// At every level, whether it takes both products at once or one after the other.
#[rstest]
fn a_gated_layer_has_the_bits_of_its_parts(
    #[values(Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx, Level::AmxEmulated)]
    level: Level,
    #[values(Activation::Silu, Activation::GeluTanh)] activation: Activation,
    #[values((3, 32, 40), (40, 48, 70), (40, 50, 70), (530, 64, 1000), (460, 64, 1100), (230, 16, 2090), (530, 16, 1100))]
    extent: (usize, usize, usize),
) {
    let Some(mut cpu) = here(3, level) else { return };
    let (rows, outputs, inputs) = extent;
    let w = [1, 2].map(|key| {
        let w = cpu.alloc("test", Element::BF16, outputs * inputs).unwrap();
        let numbers = random(key, outputs * inputs);
        cpu.write(w, Data::BF16(&numbers.iter().map(|x| (x.to_bits() >> 16) as u16).collect::<Vec<_>>()));
        w
    });
    let x = put(&mut cpu, &random(3, rows * inputs));
    let [gate, up, out] = [(); 3].map(|()| put(&mut cpu, &vec![9.0; rows * outputs]));
    for (w, y) in [(w[0], gate), (w[1], up)] {
        cpu.enqueue(Op::Linear { x, w, y, rows, outputs, inputs, start: Start::Zero });
    }
    cpu.enqueue(Op::Glu { activation, gate, up, out });
    let expected = get(&mut cpu, out);
    cpu.write(out, Data::F32(&vec![9.0; rows * outputs]));
    let y = [gate, up];
    cpu.enqueue(Op::LinearGlu { activation, x, w, y, out, rows, outputs, inputs });
    let found = get(&mut cpu, out);
    assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
}

/// Also where tiles need no room for both products.
#[rstest]
#[should_panic(expected = "y is too small")]
fn a_gated_layer_without_room_for_its_parts_is_refused(#[values(0, 1)] short: usize) {
    let mut cpu = here(1, Level::AmxEmulated).unwrap();
    let (rows, outputs, inputs) = (40, 16, 32);
    let w = cpu.alloc("test", Element::BF16, outputs * inputs).unwrap();
    let [x, out, whole] = [inputs, outputs, outputs].map(|width| put(&mut cpu, &vec![0.0; rows * width]));
    let mut y = [whole; 2];
    y[short] = whole.first(rows * outputs - 1);
    let activation = Activation::Silu;
    cpu.enqueue(Op::LinearGlu { activation, x, w: [w; 2], y, out, rows, outputs, inputs });
}
