//! Between a file's row-major matrices and the engine's panels.

use half::bf16;
use lathe_plan::{Element, PANEL};

use crate::device::{Buf, Data, DataMut, Device};
use crate::{Result, TensorView};

/// Writes a `[rows, columns]` matrix into panels, a panel at a time, so that no second copy of it exists.
pub(crate) fn write_matrix(
    dev: &mut dyn Device,
    to: Buf,
    view: &TensorView<'_>,
    [rows, columns]: [usize; 2],
) {
    let mut panel = vec![0.0f32; columns * PANEL];
    for first in (0..rows).step_by(PANEL) {
        panel.fill(0.0);
        for row in first..(first + PANEL).min(rows) {
            for (column, x) in view.widen(row * columns..(row + 1) * columns).enumerate() {
                panel[column * PANEL + row - first] = x;
            }
        }
        write_f32(dev, to.part(first * columns, columns * PANEL), &panel);
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

/// Reads a `[rows, columns]` matrix from panels, row-major.
pub(crate) fn read_matrix(dev: &mut dyn Device, from: Buf, [rows, columns]: [usize; 2]) -> Vec<f32> {
    let mut matrix = vec![0.0; rows * columns];
    for first in (0..rows).step_by(PANEL) {
        let panel = read_f32(dev, from.part(first * columns, columns * PANEL));
        for row in first..(first + PANEL).min(rows) {
            for column in 0..columns {
                matrix[row * columns + column] = panel[column * PANEL + row - first];
            }
        }
    }
    matrix
}

/// A row-major matrix as panels.
pub(crate) fn panels(matrix: &[f32], [rows, columns]: [usize; 2]) -> Result<Vec<f32>> {
    let mut panels = vec![0.0; lathe_plan::packed_len(rows, columns)?];
    for (row, values) in matrix.chunks_exact(columns.max(1)).enumerate().take(rows) {
        for (column, &x) in values.iter().enumerate() {
            panels[row / PANEL * columns * PANEL + column * PANEL + row % PANEL] = x;
        }
    }
    Ok(panels)
}
