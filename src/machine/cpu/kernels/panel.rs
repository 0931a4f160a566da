//! The layout `cpu-panel64`: 64 output rows beside each other for one input after the other, and how
//! vectors of weights are read from it in every format. No multiplying, no packing.
//!
//! F32, F16, BF16: `[input][64 rows]`, rows past the matrix zero.
//! Q4: for each group of 64 inputs 64 fp16 scales, 64 fp16 minima, then 32 units of 64 bytes. Unit u
//! holds inputs 2u and 2u + 1 as sixteen little-endian words; nibble j of word i is the code of
//! row 16 (j mod 4) + i at input 2u + j / 4. So one load and eight shifts give 128 weights.

use super::simd::{LANES, Simd};
use crate::dtype::{PANEL_ROWS, Q4_GROUP};

/// Bytes of one Q4 group of a panel: scales, minima, codes.
pub(super) const GROUP_BYTES: usize = PANEL_ROWS * crate::dtype::Q4_GROUP_BYTES;
/// Where the codes of a group begin.
pub(super) const CODES_AT: usize = 4 * PANEL_ROWS;
/// Bytes of one unit: two inputs of 64 rows.
pub(super) const UNIT_BYTES: usize = PANEL_ROWS;

/// One stored element format.
pub(super) trait Element {
    const BYTES: usize;
    /// # Safety
    /// Sixteen elements readable at `from`.
    unsafe fn load<V: Simd>(from: *const u8) -> V::F;

    /// The first `n` of sixteen, zeros behind.
    /// # Safety
    /// `min(n, 16)` elements readable at `from`.
    #[inline(always)]
    unsafe fn load_first<V: Simd>(from: *const u8, n: usize) -> V::F {
        let mut bytes = [0u8; 4 * LANES];
        // SAFETY: the caller's; the array holds sixteen of the widest elements.
        unsafe {
            if n >= LANES {
                return Self::load::<V>(from);
            }
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), n * Self::BYTES);
            Self::load::<V>(bytes.as_ptr())
        }
    }
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q4;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V::F {
        // SAFETY: the caller's.
        unsafe { V::load(from.cast()) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V::F {
        // SAFETY: the caller's.
        unsafe { V::load_f16(from.cast()) }
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V::F {
        // SAFETY: the caller's.
        unsafe { V::load_bf16(from.cast()) }
    }
}

/// Weights of 16 × NV neighbouring rows, input after input.
pub(super) trait Source<V: Simd, const NV: usize> {
    /// Those of input `k`, counted from where the source begins; `odd` = k mod 2, known when compiled.
    /// # Safety
    /// `k` inside the source.
    unsafe fn load(&self, k: usize, odd: usize) -> [V::F; NV];
}

/// A panel in some format.
pub(super) trait Panel {
    /// Inputs that one source covers at most.
    const SEGMENT: usize;
    /// Cache lines of two inputs.
    const LINES: usize;
    /// Already f32: nothing to gain from widening, and the tiles of attention, which may be narrow.
    const WIDE: bool;
    /// Bytes that `inputs` inputs (whole segments) take.
    fn bytes_of(inputs: usize) -> usize;
    type At<V: Simd, const NV: usize>: Source<V, NV>;
    /// The weights of rows `row..row + 16 NV` from input `k` on; `k` is a multiple of SEGMENT.
    /// # Safety
    /// `panel` is a whole panel with more than `k` inputs.
    unsafe fn at<V: Simd, const NV: usize>(
        panel: *const u8,
        k: usize,
        row: usize,
    ) -> Self::At<V, NV>;
}

/// Elements as they are.
pub(super) struct Plain<E> {
    from: *const u8,
    element: std::marker::PhantomData<E>,
}

impl<V: Simd, E: Element, const NV: usize> Source<V, NV> for Plain<E> {
    #[inline(always)]
    unsafe fn load(&self, k: usize, _odd: usize) -> [V::F; NV] {
        let mut found = [V::splat(0.0); NV];
        for (j, vector) in found.iter_mut().enumerate() {
            // SAFETY: 64 rows per input, k inside by the caller.
            *vector =
                unsafe { E::load::<V>(self.from.add((k * PANEL_ROWS + j * LANES) * E::BYTES)) };
        }
        found
    }
}

impl<E: Element> Panel for E {
    const SEGMENT: usize = usize::MAX;
    const LINES: usize = 2 * E::BYTES;
    const WIDE: bool = E::BYTES == 4;
    type At<V: Simd, const NV: usize> = Plain<E>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        inputs * PANEL_ROWS * E::BYTES
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(panel: *const u8, k: usize, row: usize) -> Plain<E> {
        // SAFETY: inside the panel by the caller.
        let from = unsafe { panel.add((k * PANEL_ROWS + row) * E::BYTES) };
        Plain {
            from,
            element: std::marker::PhantomData,
        }
    }
}

/// One group of codes with the scales and minima of its rows.
pub(super) struct Group<V: Simd, const NV: usize> {
    units: *const u8,
    first_vector: usize,
    /// For even and odd inputs, times what undoes the height of their nibbles.
    scales: [[V::F; NV]; 2],
    minima: [V::F; NV],
}

impl<V: Simd, const NV: usize> Source<V, NV> for Group<V, NV> {
    #[inline(always)]
    unsafe fn load(&self, k: usize, odd: usize) -> [V::F; NV] {
        // SAFETY: k < 64, so the unit lies inside the group.
        let words = unsafe { V::load_words(self.units.add(k / 2 * UNIT_BYTES)) };
        let mut found = [V::splat(0.0); NV];
        for (j, vector) in found.iter_mut().enumerate() {
            let raised = V::raised_nibbles(words, (4 * odd + self.first_vector + j) as u32);
            *vector = V::fma(raised, self.scales[odd][j], self.minima[j]);
        }
        found
    }
}

impl Panel for Q4 {
    const SEGMENT: usize = Q4_GROUP;
    const LINES: usize = 1;
    const WIDE: bool = false;
    type At<V: Simd, const NV: usize> = Group<V, NV>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        inputs / Q4_GROUP * GROUP_BYTES
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(panel: *const u8, k: usize, row: usize) -> Group<V, NV> {
        let mut group = Group {
            units: std::ptr::null(),
            first_vector: row / LANES,
            scales: [[V::splat(0.0); NV]; 2],
            minima: [V::splat(0.0); NV],
        };
        // SAFETY: whole groups are stored, so scales, minima and units of k's group are there.
        unsafe {
            let base = panel.add(k / Q4_GROUP * GROUP_BYTES);
            group.units = base.add(CODES_AT);
            for j in 0..NV {
                let scales: *const u16 = base.cast::<u16>().add(row + j * LANES);
                for odd in 0..2 {
                    let height = V::nibble_height((4 * odd + group.first_vector + j) as u32);
                    let undo = V::splat(1.0 / height);
                    group.scales[odd][j] = V::mul(V::load_f16(scales), undo);
                }
                group.minima[j] = V::load_f16(scales.add(PANEL_ROWS));
            }
        }
        group
    }
}

/// Writes inputs `from..from + count` of a panel as f32 `[input][64 rows]`.
/// # Safety
/// The panel has them; `from` is a multiple of the format's SEGMENT or 0; `to` has 64 × count.
#[inline(always)]
pub(super) unsafe fn widen<V: Simd, P: Panel>(
    panel: *const u8,
    from: usize,
    count: usize,
    to: *mut f32,
) {
    let mut done = 0;
    while done < count {
        let some = P::SEGMENT.min(count - done);
        // SAFETY: the caller's.
        unsafe {
            let source = P::at::<V, 4>(panel, from + done, 0);
            let to = to.add(done * PANEL_ROWS);
            for k in (0..some).step_by(2) {
                write::<V, 4>(to.add(k * PANEL_ROWS), source.load(k, 0));
                if k + 1 < some {
                    write::<V, 4>(to.add((k + 1) * PANEL_ROWS), source.load(k + 1, 1));
                }
            }
        }
        done += some;
    }
}

/// # Safety
/// 16 × NV writable at `to`.
#[inline(always)]
unsafe fn write<V: Simd, const NV: usize>(to: *mut f32, vectors: [V::F; NV]) {
    for (j, vector) in vectors.into_iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { V::store(to.add(j * LANES), vector) };
    }
}
