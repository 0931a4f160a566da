//! A mutable slice that the parts of one run write to, each its own piece. Nothing else.

use std::marker::PhantomData;

/// Hands out pieces of one exclusive borrow to several threads.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for an exclusive slice; who calls `piece` promises that pieces do not overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Shared<'a, T> {
        Shared {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            borrow: PhantomData,
        }
    }

    /// The piece of `len` elements from `from` on; outside the slice it panics.
    /// # Safety
    /// While this piece is alive, no other piece that overlaps it is.
    #[inline]
    #[allow(clippy::mut_from_ref)] // the contract above is what makes the borrows disjoint
    pub(super) unsafe fn piece(&self, from: usize, len: usize) -> &'a mut [T] {
        assert!(
            from <= self.len && len <= self.len - from,
            "piece outside the slice"
        );
        // SAFETY: inside the slice; disjoint by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }

    /// The start of `len` elements from `from` on, of which the caller writes only some (rows of a
    /// matrix, a few columns each), so that a slice would claim too much. Outside it panics.
    /// # Safety
    /// What the caller writes through it, nobody else touches meanwhile.
    #[inline]
    pub(super) unsafe fn start_of(&self, from: usize, len: usize) -> *mut T {
        assert!(
            from <= self.len && len <= self.len - from,
            "piece outside the slice"
        );
        self.start.wrapping_add(from)
    }
}
