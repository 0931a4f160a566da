//! What bounds every kernel, to be measured beside it: reading memory, copying it, multiplying in
//! registers. No clock: who calls, measures.

use super::isa::Isa;
use super::matrix_unit::Unit;
use super::shared::Shared;
use super::simd::{Body, CODES_TOGETHER, LANES, Simd, lanes};
use crate::dtype::Arithmetic;
use crate::machine::cpu::pool::Pool;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of one part: long enough for the hardware's streams, short enough to balance.
const PART_BYTES: usize = 1 << 20;
/// Bytes read per step of the loop.
const STEP_BYTES: usize = 256;
const AHEAD_BYTES: usize = 2048;

/// Reads every byte once; the result (a wrapping sum of words, a rest of under 256 bytes left out)
/// exists so that the reading cannot be left out.
pub fn memory_read_sum(pool: &Pool, isa: Isa, bytes: &[u8]) -> u64 {
    let total = AtomicU64::new(0);
    pool.run(bytes.len().div_ceil(PART_BYTES), &|part| {
        let from = part * PART_BYTES;
        let piece = &bytes[from..(from + PART_BYTES).min(bytes.len())];
        total.fetch_add(isa.call(Sum(piece)), Ordering::Relaxed);
    });
    total.into_inner()
}

struct Sum<'a>(&'a [u8]);

impl Body for Sum<'_> {
    type Out = u64;
    #[inline(always)]
    fn run<V: Simd>(self) -> u64 {
        let mut sums = [0u64; STEP_BYTES / 8];
        for step in self.0.chunks_exact(STEP_BYTES) {
            for line in 0..STEP_BYTES / 64 {
                V::prefetch(step.as_ptr().wrapping_add(AHEAD_BYTES + 64 * line));
            }
            // SAFETY: the chunk has these bytes; they are read without alignment.
            let words = unsafe {
                step.as_ptr()
                    .cast::<[u64; STEP_BYTES / 8]>()
                    .read_unaligned()
            };
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(word);
            }
        }
        sums.into_iter().fold(0, u64::wrapping_add)
    }
}

/// Copies bytes with all threads.
/// # Panics
/// When the lengths differ.
pub fn copy_bytes(pool: &Pool, from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len(), "copy: the lengths differ");
    let to = Shared::new(to);
    pool.run(from.len().div_ceil(PART_BYTES), &|part| {
        let at = part * PART_BYTES;
        let from = &from[at..(at + PART_BYTES).min(from.len())];
        // SAFETY: parts do not overlap.
        unsafe { to.piece(at, from.len()) }.copy_from_slice(from);
    });
}

/// Multiplies in registers only, `steps` times on every thread; returns the operations that took
/// (additions and multiplications of fp32, bf16 pairs or bytes).
pub fn multiply_peak(pool: &Pool, isa: Isa, arithmetic: Arithmetic, steps: usize) -> f64 {
    let operations = AtomicU64::new(0);
    pool.run(pool.threads(), &|_| {
        let done = isa.call(Multiply {
            arithmetic,
            steps,
            unit: isa.has_unit() && arithmetic != Arithmetic::Fp32,
        });
        operations.fetch_add(done, Ordering::Relaxed);
    });
    operations.into_inner() as f64
}

struct Multiply {
    arithmetic: Arithmetic,
    steps: usize,
    unit: bool,
}

impl Body for Multiply {
    type Out = u64;
    #[inline(always)]
    fn run<V: Simd>(self) -> u64 {
        if self.unit
            && let Some(done) = V::Unit::peak(self.arithmetic, self.steps)
        {
            return done;
        }
        match (self.arithmetic, V::WIDE) {
            (Arithmetic::Fp32, true) => floats::<V, 16>(self.steps),
            (Arithmetic::Fp32, false) => floats::<V, 5>(self.steps),
            (Arithmetic::Bf16, true) => pairs::<V, 16>(self.steps),
            (Arithmetic::Bf16, false) => pairs::<V, 5>(self.steps),
            (Arithmetic::Int8, true) => bytes::<V, 16>(self.steps),
            (Arithmetic::Int8, false) => bytes::<V, 5>(self.steps),
        }
    }
}

/// N independent chains: enough to hide the latency of one product, few enough for the registers.
#[inline(always)]
fn floats<V: Simd, const N: usize>(steps: usize) -> u64 {
    let (a, b) = (V::splat(black_box(0.999_99)), V::splat(black_box(1e-6)));
    let mut sums = [b; N];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = V::fma(*sum, a, b);
        }
    }
    sums.into_iter().for_each(|sum| {
        black_box(lanes::<V>(sum));
    });
    (2 * LANES * N * steps) as u64
}

#[inline(always)]
fn pairs<V: Simd, const N: usize>(steps: usize) -> u64 {
    let one = V::splat(black_box(0.5));
    let (x, w) = (
        V::pairs(one, one),
        V::pairs(one, V::splat(black_box(-0.25))),
    );
    let mut sums = [V::splat(1.0); N];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = V::dot_pairs(*sum, x, w);
        }
    }
    sums.into_iter().for_each(|sum| {
        black_box(lanes::<V>(sum));
    });
    (4 * LANES * N * steps) as u64
}

#[inline(always)]
fn bytes<V: Simd, const N: usize>(steps: usize) -> u64 {
    let codes = V::splat_word(black_box(0x0102_0304));
    let mut sums = [V::splat_word(black_box(0x01ff_01ff)); N];
    let rounds = steps.div_ceil(CODES_TOGETHER);
    for _ in 0..rounds {
        let mut some = sums;
        for _ in 0..CODES_TOGETHER {
            for some in &mut some {
                // By itself: where a product takes several instructions, one of the same bytes would be taken once.
                *some = V::dot_codes(*some, codes, *some);
            }
        }
        for (sum, some) in sums.iter_mut().zip(some) {
            *sum = V::code_sums(*sum, some);
        }
    }
    sums.into_iter().for_each(|sum| {
        black_box(lanes::<V>(V::from_ints(sum)));
    });
    (8 * LANES * N * CODES_TOGETHER * rounds) as u64
}
