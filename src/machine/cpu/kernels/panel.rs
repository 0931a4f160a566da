//! The layout `cpu-panel64`: 64 output rows beside each other for one input after the other, and how
//! vectors of weights are read from it in every format. No multiplying, no packing.
//!
//! F32, F16, BF16: `[input][64 rows]`, rows past the matrix zero.
//! Q4: for each group of 64 inputs 64 fp16 scales, 64 fp16 minima, then 32 units of 64 bytes. Unit
//! 4 o + v holds inputs 8 o..8 o + 8 of rows 16 v..16 v + 16, a row in each of sixteen little-endian
//! words: byte b of a word has the code of input 8 o + b in its low and of 8 o + 4 + b in its high
//! nibble. So one mask gives four inputs' codes as bytes, in the order that byte products want.

use super::simd::{LANES, Simd};
use crate::dtype::{PANEL_ROWS, Q4_GROUP};

/// Bytes of one Q4 group of a panel: scales, minima, codes.
pub(super) const GROUP_BYTES: usize = PANEL_ROWS * crate::dtype::Q4_GROUP_BYTES;
/// Where the codes of a group begin.
pub(super) const CODES_AT: usize = 4 * PANEL_ROWS;
/// Bytes of one unit: eight inputs of sixteen rows.
pub(super) const UNIT_BYTES: usize = 64;
/// Inputs of one unit.
pub(super) const UNIT_INPUTS: usize = 8;
/// Units beside each other for the same inputs.
pub(super) const UNITS_ACROSS: usize = PANEL_ROWS / LANES;

/// Which nibble of its word, the lowest first, holds the code of input `k` of a unit.
#[inline(always)]
pub(super) fn nibble_of(k: usize) -> usize {
    2 * (k % 4) + k / 4
}

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
    /// Those of input `k`, counted from where the source begins; `phase` = k mod the panel's STEP.
    /// # Safety
    /// `k` inside the source.
    unsafe fn load(&self, k: usize, phase: usize) -> [V::F; NV];

    /// Those of inputs 2 `pair` and the next (zeros unless `both`) as bf16 pairs.
    /// # Safety
    /// The pair inside the source.
    #[inline(always)]
    unsafe fn load_pairs(&self, pair: usize, both: bool) -> [V::I; NV] {
        // SAFETY: the caller's.
        unsafe {
            let even = self.load(2 * pair, 0);
            let odd = match both {
                true => self.load(2 * pair + 1, 1),
                false => [V::splat(0.0); NV],
            };
            let mut pairs = [V::splat_word(0); NV];
            for j in 0..NV {
                pairs[j] = V::pairs(even[j], odd[j]);
            }
            pairs
        }
    }
}

/// A panel in some format.
pub(super) trait Panel {
    /// Inputs that one source covers at most.
    const SEGMENT: usize;
    /// Inputs that are stored together, an even number.
    const STEP: usize;
    /// Multiplied as bf16 pairs: x, too, is pairs then.
    const PAIRED: bool;
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
    unsafe fn load(&self, k: usize, _phase: usize) -> [V::F; NV] {
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
    const STEP: usize = 2;
    const PAIRED: bool = false;
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

/// A panel of elements that are multiplied as bf16 pairs, rounded as they are loaded.
pub(super) struct Narrowed<E>(std::marker::PhantomData<E>);

impl<E: Element> Panel for Narrowed<E> {
    const SEGMENT: usize = usize::MAX;
    const STEP: usize = 2;
    const PAIRED: bool = true;
    const LINES: usize = E::LINES;
    const WIDE: bool = false;
    type At<V: Simd, const NV: usize> = Plain<E>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        E::bytes_of(inputs)
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(panel: *const u8, k: usize, row: usize) -> Plain<E> {
        // SAFETY: the caller's.
        unsafe { E::at::<V, NV>(panel, k, row) }
    }
}

/// Weights that were rounded before: `[pair of inputs][64 rows]` words of two bf16.
pub(super) struct Pairs;

/// Pairs from some row on.
pub(super) struct PairsAt(*const u8);

impl<V: Simd, const NV: usize> Source<V, NV> for PairsAt {
    #[inline(always)]
    unsafe fn load(&self, _k: usize, _phase: usize) -> [V::F; NV] {
        unreachable!("pairs are loaded as pairs")
    }
    #[inline(always)]
    unsafe fn load_pairs(&self, pair: usize, _both: bool) -> [V::I; NV] {
        let mut found = [V::splat_word(0); NV];
        for (j, vector) in found.iter_mut().enumerate() {
            // SAFETY: 64 words a pair, the pair inside by the caller.
            *vector = unsafe { V::load_words(self.0.add((pair * PANEL_ROWS + j * LANES) * 4)) };
        }
        found
    }
}

impl Panel for Pairs {
    const SEGMENT: usize = usize::MAX;
    const STEP: usize = 2;
    const PAIRED: bool = true;
    const LINES: usize = 4;
    const WIDE: bool = false;
    type At<V: Simd, const NV: usize> = PairsAt;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        inputs / 2 * PANEL_ROWS * 4
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(panel: *const u8, k: usize, row: usize) -> PairsAt {
        // SAFETY: inside the panel by the caller.
        PairsAt(unsafe { panel.add((k / 2 * PANEL_ROWS + row) * 4) })
    }
}

/// One group of codes with the scales and minima of its rows.
pub(super) struct Group<V: Simd, const NV: usize> {
    units: *const u8,
    scales: [V::F; NV],
    minima: [V::F; NV],
}

impl<V: Simd, const NV: usize> Source<V, NV> for Group<V, NV> {
    #[inline(always)]
    unsafe fn load(&self, k: usize, phase: usize) -> [V::F; NV] {
        let mut found = [V::splat(0.0); NV];
        for (j, vector) in found.iter_mut().enumerate() {
            let unit = k / UNIT_INPUTS * UNITS_ACROSS + j;
            // SAFETY: k < 64, so the unit lies inside the group.
            let words = unsafe { V::load_words(self.units.add(unit * UNIT_BYTES)) };
            let codes = V::nibbles(words, 4 * nibble_of(phase) as u32);
            *vector = V::fma(codes, self.scales[j], self.minima[j]);
        }
        found
    }
}

impl Panel for Q4 {
    const SEGMENT: usize = Q4_GROUP;
    const STEP: usize = UNIT_INPUTS;
    const PAIRED: bool = false;
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
            scales: [V::splat(0.0); NV],
            minima: [V::splat(0.0); NV],
        };
        // SAFETY: whole groups are stored, so scales, minima and units of k's group are there.
        unsafe {
            let base = panel.add(k / Q4_GROUP * GROUP_BYTES);
            group.units = base.add(CODES_AT + row / LANES * UNIT_BYTES);
            for j in 0..NV {
                let scales: *const u16 = base.cast::<u16>().add(row + j * LANES);
                group.scales[j] = V::load_f16(scales);
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
            let whole = some / P::STEP * P::STEP;
            for k in (0..whole).step_by(P::STEP) {
                for phase in 0..P::STEP {
                    let at = to.add((k + phase) * PANEL_ROWS);
                    write::<V, 4>(at, source.load(k + phase, phase));
                }
            }
            for k in whole..some {
                write::<V, 4>(to.add(k * PANEL_ROWS), source.load(k, k - whole));
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

/// Writes inputs `from..from + count` of a panel as bf16 pairs, `[pair][64 rows]`.
/// # Safety
/// The panel has them; `to` has 64 words for each started pair.
#[inline(always)]
pub(super) unsafe fn narrow<V: Simd, E: Element>(
    panel: *const u8,
    from: usize,
    count: usize,
    to: *mut u32,
) {
    // SAFETY: the caller's.
    unsafe {
        let source = <Narrowed<E> as Panel>::at::<V, 4>(panel, from, 0);
        for pair in 0..count.div_ceil(2) {
            let both = 2 * pair + 1 < count;
            let words = <Plain<E> as Source<V, 4>>::load_pairs(&source, pair, both);
            for (j, words) in words.into_iter().enumerate() {
                V::store_words(to.add(pair * PANEL_ROWS + j * LANES), words);
            }
        }
    }
}
