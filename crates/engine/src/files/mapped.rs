//! Files mapped into memory, for as long as somebody uses a part of them.
#![allow(unsafe_code)] // Memory mappings.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw};

/// Bytes of a file, mapped copy on write: unchanged pages are the page cache's own, shared with every process that
/// maps the file; whoever writes gets pages of its own, and the file stays as it is.
///
/// The file must not be cut short while it is mapped: reading a page that is gone ends the process, as with any memory
/// map. Models lie in folders that only Lathe writes, by rename.
#[derive(Debug, Clone)]
pub struct Mapped {
    map: Arc<MmapRaw>,
    range: Range<usize>,
}

impl Mapped {
    /// Maps a whole file, which must not be empty.
    pub(super) fn open(file: &File) -> std::io::Result<Mapped> {
        // SAFETY: private to this process; files of a model are replaced by rename, so the bytes do not change.
        let map = MmapRaw::from(unsafe { MmapOptions::new().map_copy(file) }?);
        let range = 0..map.len();
        Ok(Mapped { map: Arc::new(map), range })
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `range` is inside the map, which lives as long as `self`. A device writes to a part of it only after
        // [`crate::Model::load`] has returned, when no slice is left.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.range.start), self.range.len()) }
    }

    /// The part that `bytes`, a slice of these bytes, is.
    pub(super) fn part(&self, bytes: &[u8]) -> Option<Mapped> {
        let start = bytes.as_ptr().addr().checked_sub(self.map.as_ptr().addr())?;
        let range = start..start.checked_add(bytes.len())?;
        (range.end <= self.map.len()).then(|| Mapped { map: Arc::clone(&self.map), range })
    }

    /// The first byte, for a device that keeps `self` as long as it uses the pointer.
    pub(crate) fn start(&self) -> *mut u8 {
        // SAFETY: `range` is inside the map.
        unsafe { self.map.as_mut_ptr().add(self.range.start) }
    }

    /// Number of bytes.
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }

    /// Lets the kernel read the bytes ahead.
    pub(crate) fn read_ahead(&self) {
        // Only advice: where it is refused, pages come when they are touched.
        let _ = self.map.advise_range(Advice::WillNeed, self.range.start, self.range.len());
    }
}
