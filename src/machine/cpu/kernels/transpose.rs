//! Transposing small squares with SSE2, for packing. Nothing but the moves.

use std::arch::x86_64::*;

/// Transposes 16 / N rows of 16 bytes of N-byte elements (N = 2 or 4), strides in bytes.
/// # Safety
/// All rows readable and writable.
#[inline(always)]
pub(super) unsafe fn transpose16<const N: usize>(from: (*const u8, usize), to: (*mut u8, usize)) {
    // SAFETY: the caller's; SSE2 belongs to x86-64.
    unsafe {
        if N == 2 {
            transpose_8x8(from, to)
        } else {
            transpose_4x4(from, to)
        }
    }
}

/// # Safety
/// Eight rows of 16 bytes on both sides.
#[inline(always)]
unsafe fn transpose_8x8(from: (*const u8, usize), to: (*mut u8, usize)) {
    // SAFETY: the caller's; SSE2 belongs to x86-64.
    unsafe {
        let mut a = [_mm_setzero_si128(); 8];
        for (i, row) in a.iter_mut().enumerate() {
            *row = _mm_loadu_si128(from.0.add(i * from.1).cast());
        }
        let mut b = a;
        for i in 0..4 {
            b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
            b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
        }
        for i in 0..4 {
            a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
            a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
        }
        for i in 0..4 {
            _mm_storeu_si128(
                to.0.add(2 * i * to.1).cast(),
                _mm_unpacklo_epi16(a[i], a[i + 4]),
            );
            _mm_storeu_si128(
                to.0.add((2 * i + 1) * to.1).cast(),
                _mm_unpackhi_epi16(a[i], a[i + 4]),
            );
        }
    }
}

/// # Safety
/// Four rows of 16 bytes on both sides.
#[inline(always)]
unsafe fn transpose_4x4(from: (*const u8, usize), to: (*mut u8, usize)) {
    // SAFETY: the caller's; SSE2 belongs to x86-64.
    unsafe {
        let row = |i: usize| _mm_loadu_si128(from.0.add(i * from.1).cast());
        let (even_low, even_high) = (
            _mm_unpacklo_epi32(row(0), row(2)),
            _mm_unpackhi_epi32(row(0), row(2)),
        );
        let (odd_low, odd_high) = (
            _mm_unpacklo_epi32(row(1), row(3)),
            _mm_unpackhi_epi32(row(1), row(3)),
        );
        let store = |i: usize, a: __m128i| _mm_storeu_si128(to.0.add(i * to.1).cast(), a);
        store(0, _mm_unpacklo_epi32(even_low, odd_low));
        store(1, _mm_unpackhi_epi32(even_low, odd_low));
        store(2, _mm_unpacklo_epi32(even_high, odd_high));
        store(3, _mm_unpackhi_epi32(even_high, odd_high));
    }
}
