//! The vector words that take four places in memory at once, a quarter of a vector each. Nothing but the
//! mapping, as in x86.rs; the twins are `Scalar`'s in simd.rs.

use std::arch::x86_64::*;

#[inline(always)]
unsafe fn four_words(from: *const u8) -> __m128i {
    // SAFETY: sixteen readable bytes, by the caller.
    unsafe { _mm_loadu_si128(from.cast()) }
}

/// # Safety
/// AVX2, and what `Simd::load_quarters` asks for.
#[inline(always)]
pub(super) unsafe fn load8(low: *const u8, high: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_set_m128i(four_words(high), four_words(low)) }
}

/// # Safety
/// AVX-512, and what `Simd::load_quarters` asks for.
#[inline(always)]
pub(super) unsafe fn load16(from: [*const u8; 4]) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let low = _mm512_castsi256_si512(load8(from[0], from[1]));
        let third = _mm512_inserti32x4::<2>(low, four_words(from[2]));
        _mm512_inserti32x4::<3>(third, four_words(from[3]))
    }
}

/// # Safety
/// AVX2 and sixteen readable bytes.
#[inline(always)]
pub(super) unsafe fn splat8(from: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_broadcastsi128_si256(four_words(from)) }
}

/// # Safety
/// AVX-512 and sixteen readable bytes.
#[inline(always)]
pub(super) unsafe fn splat16(from: *const u8) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_broadcast_i32x4(four_words(from)) }
}

/// 256 × high + low, added up within the quarters; the sum is in each of a quarter's words.
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn sums8(high: __m256i, low: __m256i) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        let one = _mm256_add_epi32(_mm256_slli_epi32::<8>(high), low);
        let two = _mm256_add_epi32(one, _mm256_shuffle_epi32::<0x4e>(one));
        _mm256_add_epi32(two, _mm256_shuffle_epi32::<0xb1>(two))
    }
}

/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn sum_quarters_8(high: (__m256i, __m256i), low: (__m256i, __m256i)) -> [i32; 4] {
    // SAFETY: the caller's.
    unsafe {
        let (first, second) = (sums8(high.0, low.0), sums8(high.1, low.1));
        let pick = |sums| {
            (
                _mm256_extract_epi32::<0>(sums),
                _mm256_extract_epi32::<4>(sums),
            )
        };
        let ((a, b), (c, d)) = (pick(first), pick(second));
        [a, b, c, d]
    }
}

/// # Safety
/// AVX-512.
#[inline(always)]
pub(super) unsafe fn sum_quarters_16(high: __m512i, low: __m512i) -> [i32; 4] {
    // SAFETY: the caller's; the array has sixteen bytes.
    unsafe {
        let one = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
        let two = _mm512_add_epi32(one, _mm512_shuffle_epi32::<0x4e>(one));
        let four = _mm512_add_epi32(two, _mm512_shuffle_epi32::<0xb1>(two));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        let mut sums = [0; 4];
        let quarters = _mm512_castsi512_si128(_mm512_permutexvar_epi32(order, four));
        _mm_storeu_si128(sums.as_mut_ptr().cast(), quarters);
        sums
    }
}

/// # Safety
/// AVX2 and F16C, and what `Simd::store_half_pairs` asks for.
#[inline(always)]
pub(super) unsafe fn store_half_pairs(to: *mut f32, from: [*const u8; 4]) {
    // SAFETY: the caller's.
    unsafe {
        let pair = |at: *const u8| at.cast::<i32>().read_unaligned();
        let pairs = _mm_setr_epi32(pair(from[0]), pair(from[1]), pair(from[2]), pair(from[3]));
        let order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_shuffle_epi8(pairs, order)));
    }
}
