//! Matrices of 8 or 4 bits, and rows of activations quantized to meet them.
//!
//! [`QUANT_GROUP`] numbers of a row share a scale: `w = scale * (code - bias)`, codes of 8 bits with bias 128 and within
//! 1..=255, codes of 4 bits with bias 8. A group's codes of 4 bits lie in 64 bytes, the first 64 in the lower halves.
#![allow(unsafe_code)] // Threads write disjoint rows.

use super::Matrix;
use crate::device::cpu::Cpu;
use crate::device::cpu::cells::Cells;
use crate::device::cpu::simd::{MOST_LANES, Simd, kernel};
use crate::device::{Buf, Element};
use lathe_plan::QUANT_GROUP as GROUP;

/// A quantized weight.
#[derive(Clone, Copy)]
pub(in super::super) struct Quantized {
    /// Of all rows, the last group of each filled up with zeros.
    pub codes: Cells<u8>,
    /// `[outputs, groups]`
    pub scales: Cells<f32>,
    pub outputs: usize,
    pub inputs: usize,
    pub bits: Bits,
}

/// Bits of a code.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Bits {
    Eight,
    Four,
}

impl Bits {
    /// The code of zero.
    pub(super) fn bias(self) -> i32 {
        match self {
            Bits::Eight => 128,
            Bits::Four => 8,
        }
    }
}

impl Quantized {
    /// The matrix in a buffer as [`Element::quantized_bytes`] lays it out.
    pub(in super::super) fn of(cpu: &Cpu, buf: Buf, outputs: usize, inputs: usize) -> Quantized {
        let element = buf.element();
        let bits = if element == Element::Int8 { Bits::Eight } else { Bits::Four };
        let all: Cells<u8> = cpu.cells(buf, element);
        let codes = all.part(0..outputs * element.code_bytes(inputs));
        let scales = all.part(codes.len()..codes.len() + outputs * inputs.div_ceil(GROUP) * size_of::<f32>());
        Quantized { codes, scales: scales.cast(), outputs, inputs, bits }
    }

    pub(super) fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// Bytes of a group's codes.
    pub(super) fn group_bytes(&self) -> usize {
        match self.bits {
            Bits::Eight => GROUP,
            Bits::Four => GROUP / 2,
        }
    }

    /// `to[..]` = the weights from `at`, all of one row.
    pub(super) fn copy(self, at: usize, to: Cells<f32>) {
        let (output, first) = (at / self.inputs, at % self.inputs);
        let group_bytes = self.group_bytes();
        let row = output * self.groups();
        // SAFETY: nobody writes a weight while an operation reads it, and `to` is the caller's.
        unsafe {
            let (codes, scales) = (self.codes.read(), self.scales.read());
            for (i, to) in to.write().iter_mut().enumerate() {
                let (group, term) = ((first + i) / GROUP, (first + i) % GROUP);
                let codes = &codes[(row + group) * group_bytes..][..group_bytes];
                let code = match self.bits {
                    Bits::Eight => i32::from(codes[term]),
                    Bits::Four => i32::from(codes[term % 64] >> (term / 64 * 4) & 15),
                };
                *to = scales[row + group] * (code - self.bits.bias()) as f32;
            }
        }
    }
}

/// Quantizes the rows of `from [rows, inputs]` to the rows of `to` from `first` on.
pub(in super::super) fn quantize(cpu: &Cpu, from: Matrix, to: Quantized, first: usize, rows: usize) {
    assert!(first + rows <= to.outputs && rows * to.inputs <= from.len(), "there are no such rows");
    let groups = to.groups();
    cpu.run_ranges(rows, 16, |level, rows, _| {
        for row in rows {
            for group in 0..groups {
                let terms = group * GROUP..((group + 1) * GROUP).min(to.inputs);
                let mut w = [0.0; GROUP];
                let at = (first + row) * groups + group;
                let codes = to.codes.part(at * to.group_bytes()..(at + 1) * to.group_bytes());
                // SAFETY: `w` is this task's, and so is the row of `to`.
                unsafe {
                    let here = Cells::new(w.as_mut_ptr(), terms.len());
                    from.copy(level, row * to.inputs + terms.start, here);
                    let scale = to.scales.part(at..at + 1).ptr_mut();
                    match to.bits {
                        Bits::Eight => quantize8(level, w.as_ptr(), codes.ptr_mut(), scale),
                        Bits::Four => quantize4(level, w.as_ptr(), codes.ptr_mut(), scale),
                    }
                }
            }
        }
    });
}

kernel! { quantize8 = quantize_to_bytes(w: *const f32, codes: *mut u8, scale: *mut f32) }

#[inline(always)]
unsafe fn quantize_to_bytes<S: Simd>(w: *const f32, codes: *mut u8, scale: *mut f32) {
    // SAFETY: a group of numbers, a group of codes, and a scale.
    unsafe {
        let (w, codes) = (&*w.cast::<[f32; GROUP]>(), &mut *codes.cast::<[u8; GROUP]>());
        let signed: [i8; GROUP];
        (*scale, signed) = rounded(w);
        for (code, signed) in codes.iter_mut().zip(signed) {
            *code = (i32::from(signed) + 128) as u8;
        }
    }
}

/// Factors of a scale that are tried: a smaller one cuts the largest weights and keeps the others finer.
const TRIED: [f32; 6] = [1.0, 0.94, 0.88, 0.82, 0.76, 0.7];

kernel! { quantize4 = quantize_to_halves(w: *const f32, codes: *mut u8, scale: *mut f32) }

/// The scale is the one of [`TRIED`] with the least squared error; the largest number becomes -8, so the scale may be
/// negative.
#[inline(always)]
unsafe fn quantize_to_halves<S: Simd>(w: *const f32, codes: *mut u8, scale: *mut f32) {
    // SAFETY: a group of numbers, of codes, and a scale.
    unsafe {
        let (w, codes) = (&*w.cast::<[f32; GROUP]>(), &mut *codes.cast::<[u8; GROUP / 2]>());
        let largest = w.iter().fold(0.0_f32, |a, &b| if b.abs() > a.abs() || b.is_nan() { b } else { a });
        let steps = |w: f32, by: f32| (w * by).round_ties_even().clamp(-8.0, 7.0);
        let inverse = |scale: f32| if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let (mut best, mut least) = (largest / -8.0, f32::INFINITY);
        for factor in TRIED {
            let scale = largest / -8.0 * factor;
            let by = inverse(scale);
            let mut errors = [0.0_f32; MOST_LANES];
            for some in w.as_chunks::<MOST_LANES>().0 {
                for (sum, &w) in errors.iter_mut().zip(some) {
                    let error = w - scale * steps(w, by);
                    *sum += error * error;
                }
            }
            let error = errors.iter().sum::<f32>();
            if error < least {
                (best, least) = (scale, error);
            }
        }
        *scale = best;
        let by = inverse(best);
        let code = |w: f32| (steps(w, by) as i32 + 8) as u8;
        let (low, high) = w.split_at(GROUP / 2);
        for ((to, low), high) in codes.iter_mut().zip(low).zip(high) {
            *to = code(*low) | code(*high) << 4;
        }
    }
}

/// Rows of activations in groups: `x = scale * code`, codes within +-127.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// `[rows, groups, GROUP]`
    pub codes: *mut i8,
    /// `[rows, groups]`
    pub scales: *mut f32,
    /// `[rows, groups]`: of the codes.
    pub sums: *mut i32,
}

impl Rows {
    /// Elements of scratch that `rows` rows of `groups` groups take.
    pub(super) fn room(rows: usize, groups: usize) -> usize {
        rows * groups * (GROUP / 4 + 2)
    }

    /// `rows` rows of `groups` groups in a thread's scratch.
    ///
    /// # Panics
    /// The scratch is too small: a mistake of the plan.
    pub(super) fn within(scratch: Cells<f32>, rows: usize, groups: usize) -> Rows {
        let all = rows * groups;
        let codes = scratch.part(0..all * GROUP / 4);
        let scales = scratch.part(codes.len()..codes.len() + all);
        let sums = scratch.part(codes.len() + all..Rows::room(rows, groups));
        Rows { codes: codes.ptr_mut().cast(), scales: scales.ptr_mut(), sums: sums.ptr_mut().cast() }
    }

    /// The same rows from a group on.
    pub(super) fn from(self, group: usize) -> Rows {
        Rows {
            codes: self.codes.wrapping_add(group * GROUP),
            scales: self.scales.wrapping_add(group),
            sums: self.sums.wrapping_add(group),
        }
    }

    /// From row `i` on, where rows have `groups` groups.
    pub(super) fn row(self, i: usize, groups: usize) -> Rows {
        self.from(i * groups)
    }
}

kernel! {
    /// Quantizes `len` numbers of a row to `groups` groups, filled up with zeros.
    ///
    /// # Safety
    /// All are there, and nobody else's.
    pub(super) quantize_row = quantize_groups(x: *const f32, len: usize, to: Rows, groups: usize)
}

/// [`quantize_row`], inside of a kernel.
#[inline(always)]
pub(super) unsafe fn quantize_groups<S: Simd>(x: *const f32, len: usize, to: Rows, groups: usize) {
    for group in 0..groups {
        let count = (len - group * GROUP).min(GROUP);
        // SAFETY: the caller's.
        unsafe {
            let mut filled = [0.0; GROUP];
            let x = x.add(group * GROUP);
            let x = if count == GROUP {
                &*x.cast::<[f32; GROUP]>()
            } else {
                std::ptr::copy_nonoverlapping(x, filled.as_mut_ptr(), count);
                &filled
            };
            let codes = &mut *to.codes.add(group * GROUP).cast::<[i8; GROUP]>();
            (*to.scales.add(group), *codes) = rounded(x);
            *to.sums.add(group) = codes.iter().map(|&code| i32::from(code)).sum();
        }
    }
}

/// The scale of a group (NaN where a number is none) and its codes: the largest number becomes 127 or -127.
#[inline(always)]
fn rounded(x: &[f32; GROUP]) -> (f32, [i8; GROUP]) {
    // Without the sign, bits are in the order of the numbers, and NaN above all.
    let largest = f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)));
    let by = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let mut codes = [0; GROUP];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (x * by).round_ties_even().clamp(-127.0, 127.0) as i32 as i8;
    }
    (largest / 127.0, codes)
}
