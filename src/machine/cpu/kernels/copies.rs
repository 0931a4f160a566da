//! Rows of x brought into the shapes that products want: as they are, as bf16 pairs, as codes. No products.

use super::codes::{Quantised, Scale, quantise_row};
use super::simd::{LANES, Simd, load_first};
use crate::dtype::Q4_GROUP;

/// Copied rows of x lie an odd multiple of a cache line apart: a power of two apart they share banks and
/// sets of the cache, and products of 8 rows take up to twice as long.
pub(super) const PAD: usize = 16;
/// How many rows ahead of the one in use a block of x is asked for.
const ROWS_AHEAD: usize = 3;

/// Where the tiles of a part find x: row i at `start + i × stride`.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub start: *const f32,
    pub stride: usize,
}

/// How far apart copied rows of so many words lie.
#[inline(always)]
fn apart(words: usize) -> usize {
    words.next_multiple_of(2 * PAD) + PAD
}

/// Some inputs of some rows of x; both as (first, count).
#[derive(Clone, Copy)]
pub(super) struct BlockOfX<'a> {
    pub x: &'a [f32],
    pub ldx: usize,
    pub rows: (usize, usize),
    pub inputs: (usize, usize),
}

impl<'a> BlockOfX<'a> {
    /// A row's inputs. One further down is asked for: rows are far apart, too far for the hardware to
    /// guess the next.
    #[inline(always)]
    fn row<V: Simd>(&self, row: usize) -> &'a [f32] {
        let at = (self.rows.0 + row) * self.ldx + self.inputs.0;
        let later = self.x.as_ptr().wrapping_add(at + ROWS_AHEAD * self.ldx);
        for k in (0..self.inputs.1).step_by(LANES) {
            V::prefetch(later.wrapping_add(k).cast());
        }
        &self.x[at..at + self.inputs.1]
    }

    /// Copies them.
    #[inline(always)]
    pub(super) fn copy<V: Simd>(&self, to: &mut [f32]) -> Rows {
        let stride = apart(self.inputs.1);
        let to = &mut to[..self.rows.1 * stride];
        for (i, to) in to.chunks_exact_mut(stride).enumerate() {
            to[..self.inputs.1].copy_from_slice(self.row::<V>(i));
        }
        Rows {
            start: to.as_ptr(),
            stride,
        }
    }

    /// Rounds them to bf16, a pair a word, filled up with zeros.
    #[inline(always)]
    pub(super) fn pairs<V: Simd>(&self, to: &mut [f32]) -> Rows {
        let stride = apart(self.inputs.1.div_ceil(2));
        let to = &mut to[..self.rows.1 * stride];
        for (i, to) in to.chunks_exact_mut(stride).enumerate() {
            let from = self.row::<V>(i).chunks(LANES);
            for (from, to) in from.zip(to.chunks_exact_mut(LANES / 2)) {
                // SAFETY: `from` has its length, `to` has room for sixteen bf16.
                unsafe {
                    let x = load_first::<V>(from.as_ptr(), from.len());
                    V::store_bf16(to.as_mut_ptr().cast(), x);
                }
            }
            // A matrix unit reads whole vectors of pairs.
            let done = self.inputs.1.div_ceil(LANES) * LANES / 2;
            to[done..done.next_multiple_of(LANES)].fill(0.0);
        }
        Rows {
            start: to.as_ptr(),
            stride,
        }
    }

    /// Quantises them to 8 bits in groups of 64.
    #[inline(always)]
    pub(super) fn codes<V: Simd>(&self, scales: &mut [f32], codes: &mut [f32]) -> Quantised {
        let groups = self.inputs.1.div_ceil(Q4_GROUP);
        let words = apart(groups * Q4_GROUP / 4);
        let codes = &mut codes[..self.rows.1 * words];
        let scales = &mut scales[..self.rows.1 * groups * size_of::<Scale>() / 4];
        let (to, to_scales) = (codes.as_mut_ptr(), scales.as_mut_ptr().cast::<Scale>());
        for i in 0..self.rows.1 {
            let x = self.row::<V>(i);
            // SAFETY: both slices have room for all rows.
            unsafe {
                quantise_row::<V>(x, to.add(i * words).cast(), to_scales.add(i * groups));
            }
        }
        Quantised {
            codes: to.cast(),
            stride: 4 * words,
            scales: to_scales,
            groups,
        }
    }
}
