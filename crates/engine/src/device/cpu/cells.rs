//! A buffer's elements as kernels see them: a pointer and a length that several threads share.
#![allow(unsafe_code)] // Threads write disjoint parts of one buffer.

use std::ops::Range;

/// Elements of a live buffer.
#[derive(Clone, Copy)]
pub(super) struct Cells<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: a `Cells` gives access only through unsafe functions, whose callers keep threads to disjoint parts.
unsafe impl<T: Send> Send for Cells<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Cells<T> {}

impl<T> Cells<T> {
    /// # Safety
    /// `start..start + len` stays allocated while the value is used.
    pub(super) unsafe fn new(start: *mut T, len: usize) -> Cells<T> {
        Cells { start, len }
    }

    pub(super) fn len(self) -> usize {
        self.len
    }

    /// A part, with the range checked.
    pub(super) fn part(self, range: Range<usize>) -> Cells<T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} outside {}", self.len);
        // SAFETY: the range was checked.
        Cells { start: unsafe { self.start.add(range.start) }, len: range.end - range.start }
    }

    /// Rows `range` of a matrix of this width.
    pub(super) fn rows(self, range: Range<usize>, width: usize) -> Cells<T> {
        self.part(range.start * width..range.end * width)
    }

    /// The same bytes as elements of another type.
    ///
    /// # Panics
    /// They do not lie as such elements do.
    pub(super) fn cast<U>(self) -> Cells<U> {
        let bytes = self.len * size_of::<T>();
        assert!(self.start.addr().is_multiple_of(align_of::<U>()) && bytes.is_multiple_of(size_of::<U>()));
        Cells { start: self.start.cast(), len: bytes / size_of::<U>() }
    }

    pub(super) fn ptr(self) -> *const T {
        self.start
    }

    pub(super) fn ptr_mut(self) -> *mut T {
        self.start
    }

    /// # Safety
    /// Nobody writes these elements while the slice lives.
    pub(super) unsafe fn read<'a>(self) -> &'a [T] {
        // SAFETY: allocated by `new`'s contract, not written by the caller's.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// # Safety
    /// Nobody else reads or writes these elements while the slice lives.
    pub(super) unsafe fn write<'a>(self) -> &'a mut [T] {
        // SAFETY: allocated by `new`'s contract, not shared by the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}
