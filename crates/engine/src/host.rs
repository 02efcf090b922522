//! Between the host's numbers and a device's buffers.

use std::ops::Range;

use half::bf16;
use lathe_plan::Element;

use crate::TensorView;
use crate::device::{Buf, Data, DataMut, Device};

/// Elements that are converted at a time, so that no second copy of a tensor exists.
const CHUNK: usize = 1 << 16;

/// Ranges of at most [`CHUNK`] elements that cover `0..len`.
pub(crate) fn chunks(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(CHUNK).map(move |start| start..(start + CHUNK).min(len))
}

/// Writes a tensor's elements.
pub(crate) fn write_tensor(dev: &mut dyn Device, to: Buf, view: &TensorView<'_>) {
    let mut values = Vec::with_capacity(CHUNK.min(to.len()));
    for range in chunks(to.len()) {
        values.clear();
        values.extend(view.widen(range.clone()));
        write_f32(dev, to.part(range.start, range.len()), &values);
        if let Some(bytes) = &view.in_place {
            let width = view.dtype.bytes();
            bytes.release(range.start * width..range.end * width);
        }
    }
}

/// Writes values to a buffer of f32 or bf16.
pub(crate) fn write_f32(dev: &mut dyn Device, to: Buf, values: &[f32]) {
    match to.element() {
        Element::BF16 => {
            let bits: Vec<u16> = values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
            dev.write(to, Data::BF16(&bits));
        }
        _ => dev.write(to, Data::F32(values)),
    }
}

/// Reads a buffer of f32 or bf16.
pub(crate) fn read_f32(dev: &mut dyn Device, from: Buf) -> Vec<f32> {
    match from.element() {
        Element::BF16 => {
            let mut bits = vec![0u16; from.len()];
            dev.read(from, DataMut::BF16(&mut bits));
            bits.into_iter().map(|b| bf16::from_bits(b).to_f32()).collect()
        }
        _ => {
            let mut values = vec![0.0; from.len()];
            dev.read(from, DataMut::F32(&mut values));
            values
        }
    }
}

/// Reads a buffer of f32, or of codes, as the little-endian bytes of its elements.
pub(crate) fn read_bytes(dev: &mut dyn Device, from: Buf) -> Vec<u8> {
    match from.element() {
        Element::U8 => {
            let mut bytes = vec![0; from.len()];
            dev.read(from, DataMut::U8(&mut bytes));
            bytes
        }
        _ => read_f32(dev, from).into_iter().flat_map(f32::to_le_bytes).collect(),
    }
}

/// A row-major `[rows, columns]` matrix with rows and columns exchanged.
pub(crate) fn transposed(matrix: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    let mut to = vec![0.0; matrix.len()];
    for (row, values) in matrix.chunks_exact(columns.max(1)).enumerate() {
        for (column, &x) in values.iter().enumerate() {
            to[column * rows + row] = x;
        }
    }
    to
}
