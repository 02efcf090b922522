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
