//! The words of a matrix unit, which multiplies tiles of 16 rows of 64 bytes, and their twin in plain Rust. The
//! machine's own are amx.rs's; what is made of them is matrix_products.rs's.
//!
//! A step takes 32 inputs: the products of even and of odd inputs are summed apart, both from zero, and their
//! sum is added to the output. This is the unit's own order, the same for any batch and split, but not that of
//! products of bf16 without a unit. Of bytes all orders give the same.

use super::simd::flush;
use crate::dtype::{Arithmetic, Q4_GROUP};

/// Rows of x and columns of a tile of sums.
pub(super) const TILE: usize = 16;
/// Inputs of one step, and the words of a tile of weights for them.
pub(super) const STEP_INPUTS: usize = 32;
pub(super) const STEP_WORDS: usize = TILE * STEP_INPUTS / 2;
/// Bytes of a tile of codes: a group's inputs for 16 columns.
pub(super) const CODES_TILE_BYTES: usize = TILE * Q4_GROUP;

/// Rows of x times weights over some steps. Strides count words.
#[derive(Clone, Copy)]
pub(super) struct Pairs {
    /// Row i, step s at `x + i × x_stride + 16 s`: 16 pairs of bf16.
    pub x: *const f32,
    pub x_stride: usize,
    /// For each 16 columns beside each other `steps` tiles: `[16 pairs of inputs][16 columns]`.
    pub weights: *const f32,
    /// At least one.
    pub steps: usize,
    /// 32 or 16, or as many as the unit was opened for.
    pub rows: usize,
    pub out: *mut f32,
    pub out_stride: usize,
    /// Sums start at zero, else at what `out` holds.
    pub fresh: bool,
}

/// A matrix unit; used only where `Isa` says that there is one.
pub(super) trait Unit {
    /// Readies it on this thread for jobs of 16 rows, or of so many where there are fewer, and lets it go.
    fn open(rows: usize);
    fn close();
    /// 32 rows × 32 columns; opened for 16.
    /// # Safety
    /// All that the job points to is there; the unit is open.
    unsafe fn two_by_two(job: Pairs);
    /// 16 rows, or as many as it was opened for, × 64 columns.
    /// # Safety
    /// As above.
    unsafe fn one_by_four(job: Pairs);
    /// ints[i, n] = sum over 64 inputs of x[i, k] × code[k / 4][n][k % 4], 16 × 16 of them; x's rows lie
    /// so many bytes apart. Opened for 16 rows.
    /// # Safety
    /// As above.
    unsafe fn codes(x: (*const i8, usize), codes: *const u8, ints: *mut u32);
    /// `codes` of four groups beside each other.
    /// # Safety
    /// As above.
    #[inline(always)]
    unsafe fn four_codes((x, stride): (*const i8, usize), codes: *const u8, ints: *mut u32) {
        for g in 0..4 {
            // SAFETY: the caller's.
            unsafe {
                let x = (x.add(g * Q4_GROUP), stride);
                let codes = codes.add(g * CODES_TILE_BYTES);
                Self::codes(x, codes, ints.add(g * TILE * TILE));
            }
        }
    }
    /// Multiplies without memory, bf16 or bytes; the operations that it took. None where it is no quicker than
    /// the vectors.
    fn peak(arithmetic: Arithmetic, steps: usize) -> Option<u64>;
}

/// What the words mean, in plain Rust.
pub(super) struct Twin;

impl Twin {
    unsafe fn pairs(job: Pairs, across: usize) {
        let low = |word: u32| flush(f32::from_bits(word << 16));
        let high = |word: u32| flush(f32::from_bits(word & 0xffff_0000));
        for (i, n) in (0..job.rows).flat_map(|i| (0..across * TILE).map(move |n| (i, n))) {
            // SAFETY: the caller's.
            unsafe {
                let x = job.x.add(i * job.x_stride).cast::<u32>();
                let block = (n / TILE) * job.steps * STEP_WORDS;
                let weights = job.weights.add(block + n % TILE).cast::<u32>();
                let out = job.out.add(i * job.out_stride + n);
                let mut sum = if job.fresh { 0.0 } else { flush(*out) };
                for step in 0..job.steps {
                    let (mut even, mut odd) = (0f32, 0f32);
                    for k in step * TILE..(step + 1) * TILE {
                        let (x, weight) = (*x.add(k), *weights.add(k * TILE));
                        even = flush(low(x).mul_add(low(weight), even));
                        odd = flush(high(x).mul_add(high(weight), odd));
                    }
                    sum = flush(sum + flush(even + odd));
                }
                *out = sum;
            }
        }
    }
}

impl Unit for Twin {
    fn open(_rows: usize) {}
    fn close() {}

    unsafe fn two_by_two(job: Pairs) {
        // SAFETY: the caller's.
        unsafe { Twin::pairs(job, 2) }
    }

    unsafe fn one_by_four(job: Pairs) {
        // SAFETY: the caller's.
        unsafe { Twin::pairs(job, 4) }
    }

    unsafe fn codes((x, stride): (*const i8, usize), codes: *const u8, ints: *mut u32) {
        for (i, n) in (0..TILE).flat_map(|i| (0..TILE).map(move |n| (i, n))) {
            // SAFETY: the caller's.
            let product = |k: usize| unsafe {
                let code = *codes.add(k / 4 * 64 + 4 * n + k % 4);
                *x.add(i * stride + k) as i32 * code as i32
            };
            let sum: i32 = (0..Q4_GROUP).map(product).sum();
            // SAFETY: the caller's.
            unsafe { *ints.add(i * TILE + n) = sum as u32 };
        }
    }

    fn peak(_arithmetic: Arithmetic, _steps: usize) -> Option<u64> {
        None
    }
}
