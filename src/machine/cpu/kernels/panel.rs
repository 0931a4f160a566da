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

/// Inputs of a panel of halves in one slice for narrow registers: 4 KiB.
const HALVES_SLICE: usize = 32;

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

/// Inputs that a tile multiplies: of which panel, which first, and where to keep them for the tiles that
/// follow (`Kept` only).
#[derive(Clone, Copy)]
pub(super) struct Weights {
    pub panel: *const u8,
    pub first_input: usize,
    pub keep: *mut f32,
}

impl Weights {
    /// From an input further on; not for panels that keep.
    #[inline(always)]
    pub(super) fn beyond(self, inputs: usize) -> Weights {
        Weights {
            first_input: self.first_input + inputs,
            ..self
        }
    }
}

/// A panel in some format.
pub(super) trait Panel {
    /// Inputs that one source covers at most.
    const SEGMENT: usize;
    /// Inputs that are stored together. One where nothing asks for more: of several in one body the compiler
    /// loads all weights first, and then the sums do not fit the registers.
    const STEP: usize;
    /// Multiplied as bf16 pairs: x, too, is pairs then.
    const PAIRED: bool;
    /// Cache lines that tiles ask for at each input, or pair of them.
    const AHEAD: usize;
    /// Already f32: nothing to gain from widening, and the tiles of attention, which may be narrow.
    const WIDE: bool;
    /// Writes what it reads to where `Weights` say.
    const KEEPS: bool = false;
    /// Brought into the registers' format by an instruction or two: narrow registers, too, do that for each
    /// of a few tiles.
    const CHEAP: bool = false;
    /// Inputs that narrow registers, which walk over a panel several times, take at a time: as many as stay in
    /// the first cache. Those that are far apart already gain nothing, sums would only be put down more often.
    const SLICE: usize = usize::MAX;
    /// Bytes that `inputs` inputs (whole segments) take.
    fn bytes_of(inputs: usize) -> usize;
    type At<V: Simd, const NV: usize>: Source<V, NV>;
    /// Of rows `row..row + 16 NV` the weights from the `done`th of these inputs on, a multiple of SEGMENT.
    /// # Safety
    /// There is one.
    unsafe fn at<V: Simd, const NV: usize>(
        weights: Weights,
        done: usize,
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
    const STEP: usize = 1;
    const PAIRED: bool = false;
    const AHEAD: usize = E::BYTES;
    const WIDE: bool = E::BYTES == 4;
    const CHEAP: bool = true;
    const SLICE: usize = if E::BYTES == 4 {
        usize::MAX
    } else {
        HALVES_SLICE
    };
    type At<V: Simd, const NV: usize> = Plain<E>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        inputs * PANEL_ROWS * E::BYTES
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(weights: Weights, done: usize, row: usize) -> Plain<E> {
        let first = (weights.first_input + done) * PANEL_ROWS + row;
        // SAFETY: inside the panel by the caller.
        let from = unsafe { weights.panel.add(first * E::BYTES) };
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
    const STEP: usize = 1;
    const PAIRED: bool = true;
    const AHEAD: usize = 2 * E::AHEAD;
    const WIDE: bool = false;
    const SLICE: usize = E::SLICE;
    type At<V: Simd, const NV: usize> = Plain<E>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        E::bytes_of(inputs)
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(weights: Weights, done: usize, row: usize) -> Plain<E> {
        // SAFETY: the caller's.
        unsafe { E::at::<V, NV>(weights, done, row) }
    }
}

/// Weights that were widened before, or need not be, for many tiles.
pub(super) struct Widened;

impl Panel for Widened {
    const SEGMENT: usize = usize::MAX;
    const STEP: usize = 1;
    const PAIRED: bool = false;
    const AHEAD: usize = 1;
    const WIDE: bool = true;
    type At<V: Simd, const NV: usize> = Plain<F32>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        F32::bytes_of(inputs)
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(
        weights: Weights,
        done: usize,
        row: usize,
    ) -> Plain<F32> {
        // SAFETY: the caller's.
        unsafe { <F32 as Panel>::at::<V, NV>(weights, done, row) }
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
    const STEP: usize = 1;
    const PAIRED: bool = true;
    const AHEAD: usize = 1;
    const WIDE: bool = false;
    type At<V: Simd, const NV: usize> = PairsAt;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        inputs / 2 * PANEL_ROWS * 4
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(weights: Weights, done: usize, row: usize) -> PairsAt {
        let pair = (weights.first_input + done) / 2;
        // SAFETY: inside the panel by the caller.
        PairsAt(unsafe { weights.panel.add((pair * PANEL_ROWS + row) * 4) })
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
    const AHEAD: usize = 1;
    const WIDE: bool = false;
    const SLICE: usize = Q4_GROUP;
    type At<V: Simd, const NV: usize> = Group<V, NV>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        inputs / Q4_GROUP * GROUP_BYTES
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(
        weights: Weights,
        done: usize,
        row: usize,
    ) -> Group<V, NV> {
        let k = weights.first_input + done;
        let mut group = Group {
            units: std::ptr::null(),
            scales: [V::splat(0.0); NV],
            minima: [V::splat(0.0); NV],
        };
        // SAFETY: whole groups are stored, so scales, minima and units of k's group are there.
        unsafe {
            let base = weights.panel.add(k / Q4_GROUP * GROUP_BYTES);
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

/// Weights that the first of many tiles brings into the registers' format and keeps for the others:
/// `[input][64 rows]` of f32, or of pairs. Its products hide the conversion.
pub(super) struct Kept<P>(std::marker::PhantomData<P>);

/// A source, and where its vectors are kept.
pub(super) struct KeptAt<S> {
    source: S,
    keep: *mut f32,
}

impl<V: Simd, S: Source<V, NV>, const NV: usize> Source<V, NV> for KeptAt<S> {
    #[inline(always)]
    unsafe fn load(&self, k: usize, phase: usize) -> [V::F; NV] {
        // SAFETY: the caller's; as many are kept as there are inputs.
        unsafe {
            let vectors = self.source.load(k, phase);
            for (j, &vector) in vectors.iter().enumerate() {
                V::store(self.keep.add(k * PANEL_ROWS + j * LANES), vector);
            }
            vectors
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(&self, pair: usize, both: bool) -> [V::I; NV] {
        // SAFETY: as above.
        unsafe {
            let words = self.source.load_pairs(pair, both);
            for (j, &words) in words.iter().enumerate() {
                let at = self.keep.add(pair * PANEL_ROWS + j * LANES);
                V::store_words(at.cast(), words);
            }
            words
        }
    }
}

impl<P: Panel> Panel for Kept<P> {
    const SEGMENT: usize = P::SEGMENT;
    const STEP: usize = P::STEP;
    const PAIRED: bool = P::PAIRED;
    const AHEAD: usize = 1;
    const WIDE: bool = false;
    const KEEPS: bool = true;
    type At<V: Simd, const NV: usize> = KeptAt<P::At<V, NV>>;
    #[inline(always)]
    fn bytes_of(inputs: usize) -> usize {
        P::bytes_of(inputs)
    }
    #[inline(always)]
    unsafe fn at<V: Simd, const NV: usize>(
        weights: Weights,
        done: usize,
        row: usize,
    ) -> Self::At<V, NV> {
        let first = if P::PAIRED { done / 2 } else { done } * PANEL_ROWS + row;
        KeptAt {
            // SAFETY: the caller's.
            source: unsafe { P::at::<V, NV>(weights, done, row) },
            keep: weights.keep.wrapping_add(first),
        }
    }
}
