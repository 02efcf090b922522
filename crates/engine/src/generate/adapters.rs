//! Resident adapters on the device: each slot is one flat buffer, cut by the adapter that lies in it.

use std::sync::Arc;

use lathe_plan::{AdapterBudget, ModelShape, Target};

use crate::adapter::extents;
use crate::decoder::{LayerLora, Planned};
use crate::device::{Buf, Data, Device, LoraSlot};
use crate::{Adapter, Error, Result, host};

/// The inner activations of each target that an adapter may change; all share one buffer.
pub(super) fn mids(budget: &AdapterBudget, mid: Option<Buf>) -> [Option<Buf>; 7] {
    Target::ALL.map(|target| mid.filter(|_| budget.targets.contains(&target)))
}

/// Slots without adapters.
pub(super) fn empty(shape: &ModelShape, budget: &AdapterBudget, planned: &Planned) -> Vec<LayerLora> {
    let buffers: Vec<Buf> =
        (0..budget.slots).filter_map(|slot| planned.find(&format!("adapter.{slot}"))).collect();
    let slots = |target| {
        let none = |buf: &Buf| LoraSlot { a: buf.first(0), b: buf.first(0), rank: 0, scale: 0.0 };
        let some = budget.slots > 0 && budget.targets.contains(&target);
        some.then(|| buffers.iter().map(none).collect::<Arc<[_]>>())
    };
    vec![LayerLora { slots: Target::ALL.map(slots), stride: budget.max_rank }; shape.layers]
}

/// Whether an adapter fits base and budget.
///
/// # Errors
/// [`Error::Adapter`].
pub(super) fn check(adapter: &Adapter, shape: &ModelShape, budget: &AdapterBudget) -> Result<()> {
    adapter.check_base(shape)?;
    let spec = adapter.spec();
    if spec.rank > budget.max_rank {
        let what =
            format!("its rank is {}, the service was planned for at most {}", spec.rank, budget.max_rank);
        return Err(Error::Adapter { what });
    }
    if let Some(target) = spec.targets.difference(&budget.targets).next() {
        let what = format!("it changes {}, which the service was not planned for", target.name());
        return Err(Error::Adapter { what });
    }
    Ok(())
}

/// Writes an adapter to a slot and makes blocks see it.
///
/// # Errors
/// The plan has no such slot.
pub(super) fn write(
    dev: &mut dyn Device,
    planned: &Planned,
    slot: usize,
    adapter: &Adapter,
    lora: &mut [LayerLora],
) -> Result<()> {
    let buffer = planned.get(&format!("adapter.{slot}"))?;
    let (spec, shape) = (adapter.spec(), adapter.shape());
    let none = LoraSlot { a: buffer.first(0), b: buffer.first(0), rank: 0, scale: 0.0 };
    let mut entries = vec![[none; 7]; lora.len()];
    let mut next = 0;
    for (layer, target, a, b) in adapter.pairs() {
        let (_, b_shape) = extents(shape, spec, target);
        let mut put = |matrix: &[f32]| {
            let part = buffer.part(next, matrix.len());
            next += part.len();
            dev.write(part, Data::F32(matrix));
            part
        };
        let (a, b) = (put(a), put(&host::transposed(b, b_shape)));
        entries[layer][target as usize] = LoraSlot { a, b, rank: spec.rank, scale: spec.scale() };
    }
    for (layer, entries) in lora.iter_mut().zip(entries) {
        for (slots, entry) in layer.slots.iter_mut().zip(entries) {
            if let Some(slots) = slots {
                let mut all = slots.to_vec();
                all[slot] = entry;
                *slots = all.into();
            }
        }
    }
    Ok(())
}
