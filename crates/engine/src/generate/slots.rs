//! The slots of resident adapters: who holds them.

use super::AdapterId;

/// One place for an adapter.
#[derive(Debug, Clone, Copy)]
struct Slot {
    id: AdapterId,
    /// Sequences in flight that use it.
    leases: usize,
    /// Taken away: stays until the last lease ends.
    leaving: bool,
}

/// The places for adapters.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Option<Slot>>,
    next: u64,
}

impl Slots {
    pub(super) fn new(count: usize) -> Slots {
        Slots { slots: vec![None; count], next: 1 }
    }

    pub(super) fn free(&self) -> usize {
        self.slots.iter().filter(|s| s.is_none()).count()
    }

    /// Takes a free slot under a new id.
    pub(super) fn add(&mut self) -> Option<(AdapterId, usize)> {
        let place = self.slots.iter().position(Option::is_none)?;
        let id = AdapterId(self.next);
        self.next += 1;
        self.slots[place] = Some(Slot { id, leases: 0, leaving: false });
        Some((id, place))
    }

    /// A sequence begins to use an adapter; `None` where it is gone or leaving.
    pub(super) fn lease(&mut self, id: AdapterId) -> Option<usize> {
        let place = self.find(id)?;
        let slot = self.slots[place].as_mut().filter(|s| !s.leaving)?;
        slot.leases += 1;
        Some(place)
    }

    /// A sequence ends.
    pub(super) fn release(&mut self, place: usize) {
        if let Some(slot) = &mut self.slots[place] {
            slot.leases -= 1;
            if slot.leaving && slot.leases == 0 {
                self.slots[place] = None;
            }
        }
    }

    /// Takes an adapter away, at once or when its last sequence ends; false where it is gone already.
    pub(super) fn remove(&mut self, id: AdapterId) -> bool {
        let Some(place) = self.find(id) else { return false };
        match &mut self.slots[place] {
            Some(slot) if slot.leaving => return false,
            Some(slot) if slot.leases > 0 => slot.leaving = true,
            other => *other = None,
        }
        true
    }

    fn find(&self, id: AdapterId) -> Option<usize> {
        self.slots.iter().position(|s| s.is_some_and(|s| s.id == id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_leaves_with_its_last_sequence() {
        let mut slots = Slots::new(1);
        let Some((id, place)) = slots.add() else { panic!("a slot is free") };
        assert_eq!(slots.add(), None);
        assert_eq!(slots.lease(id), Some(place));
        assert!(slots.remove(id));
        assert_eq!((slots.lease(id), slots.free()), (None, 0));
        slots.release(place);
        assert_eq!(slots.free(), 1);
        assert!(!slots.remove(id));
        assert_ne!(slots.add().map(|a| a.0), Some(id));
    }
}
