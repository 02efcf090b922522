//! Files mapped into memory, for as long as somebody uses a part of them.
#![allow(unsafe_code)] // Memory mappings.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use memmap2::{Advice, Mmap, MmapOptions, MmapRaw, UncheckedAdvice};

/// Linux maps pages around one that is touched: those of a large folio, at most these bytes.
const AROUND: usize = 1 << 21;

/// Bytes of a file, mapped twice: once to be read, once copy on write for a device. Unchanged pages of both are the page
/// cache's own, shared with every process that maps the file; a device that writes gets pages of its own, and neither the
/// file nor who reads it sees that.
///
/// The file must not be cut short while it is mapped: reading a page that is gone ends the process, as with any memory
/// map. Models lie in folders that only Lathe writes, by rename.
#[derive(Debug, Clone)]
pub struct Mapped {
    maps: Arc<Maps>,
    range: Range<usize>,
}

#[derive(Debug)]
struct Maps {
    read: Mmap,
    device: MmapRaw,
}

impl Mapped {
    /// Maps a whole file, which must not be empty.
    pub(super) fn open(file: &File) -> std::io::Result<Mapped> {
        // SAFETY: files of a model are replaced by rename, so the bytes do not change.
        let read = unsafe { Mmap::map(file) }?;
        // SAFETY: as above; and what is written stays private to this process.
        let device = MmapRaw::from(unsafe { MmapOptions::new().len(read.len()).map_copy(file) }?);
        let range = 0..read.len();
        Ok(Mapped { maps: Arc::new(Maps { read, device }), range })
    }

    /// The file's bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.maps.read[self.range.clone()]
    }

    /// The part that `bytes`, a slice of these bytes, is.
    pub(super) fn part(&self, bytes: &[u8]) -> Option<Mapped> {
        let read = &self.maps.read;
        let start = bytes.as_ptr().addr().checked_sub(read.as_ptr().addr())?;
        let range = start..start.checked_add(bytes.len())?;
        (range.end <= read.len()).then(|| Mapped { maps: Arc::clone(&self.maps), range })
    }

    /// The first byte, for a device that keeps `self` as long as it uses the pointer.
    pub(crate) fn start(&self) -> *mut u8 {
        // SAFETY: `range` is inside the map.
        unsafe { self.maps.device.as_mut_ptr().add(self.range.start) }
    }

    /// Number of bytes.
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }

    /// Lets the kernel read the bytes ahead.
    pub(crate) fn read_ahead(&self) {
        // Only advice: where it is refused, pages come when they are touched.
        let _ = self.maps.device.advise_range(Advice::WillNeed, self.range.start, self.range.len());
    }

    /// Gives back the pages of a part that was read: who has copied the bytes needs them no more, and would hold them
    /// twice.
    pub(crate) fn release(&self, part: Range<usize>) {
        let read = &self.maps.read;
        let start = (self.range.start + part.start).saturating_sub(AROUND);
        let end = (self.range.start + part.end + AROUND).min(read.len());
        // SAFETY: nobody writes to this map, so a page that is touched again is read from the file as it was.
        let _ = unsafe { read.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
    }
}
