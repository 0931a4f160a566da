//! The vector words of AVX2 + FMA + F16C. Nothing but the mapping; the twin of every word is `Scalar`'s in
//! simd.rs.

use super::matrix_unit::Twin;
use super::simd::{Body, Simd};
use super::x86::{HALF_RNE, moves, own_line, sum8, words};
use super::x86_quarters as quarters;
use std::arch::x86_64::*;

/// Two 256-bit registers per vector: lanes 0..8 and 8..16; with `BYTES` the instruction for products of bytes
/// (AVX-VNNI).
#[derive(Clone, Copy)]
pub(super) struct Avx2<const BYTES: bool>;

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn call_avx2<B: Body>(body: B) -> B::Out {
    body.run::<Avx2<false>>()
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) fn call_avx2_vnni<B: Body>(body: B) -> B::Out {
    body.run::<Avx2<true>>()
}

type Pair = (__m256, __m256);
type Words = (__m256i, __m256i);

#[inline(always)]
unsafe fn exponent8(a: __m256, b: __m256) -> __m256 {
    // SAFETY: AVX2, by the caller.
    unsafe {
        let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(b));
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shifted))
    }
}

#[inline(always)]
unsafe fn nibbles8(words: __m256i, shift: u32) -> __m256 {
    // SAFETY: AVX2, by the caller.
    unsafe {
        let shifted = _mm256_srl_epi32(words, _mm_cvtsi32_si128(shift as i32));
        _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)))
    }
}

/// Eight zero-extended 16-bit words.
#[inline(always)]
unsafe fn half_words8(from: *const u8) -> __m256i {
    // SAFETY: AVX2 and sixteen readable bytes, by the caller.
    unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())) }
}

#[inline(always)]
unsafe fn flush8(a: __m256) -> __m256 {
    // SAFETY: AVX2, by the caller.
    unsafe {
        let sign = _mm256_and_ps(a, _mm256_set1_ps(-0.0));
        let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
        let small = _mm256_cmp_ps::<_CMP_LT_OQ>(size, _mm256_set1_ps(f32::MIN_POSITIVE));
        _mm256_blendv_ps(a, sign, small)
    }
}

#[inline(always)]
unsafe fn upper_bf16_8(a: __m256) -> __m256i {
    // SAFETY: AVX2, by the caller.
    unsafe {
        let bits = _mm256_castps_si256(flush8(a));
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
        let rounded = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan);
        _mm256_and_si256(rounded, _mm256_set1_epi32(0xffff_0000u32 as i32))
    }
}

#[inline(always)]
unsafe fn pairs8(even: __m256, odd: __m256) -> __m256i {
    // SAFETY: AVX2, by the caller.
    unsafe {
        _mm256_or_si256(
            _mm256_srli_epi32::<16>(upper_bf16_8(even)),
            upper_bf16_8(odd),
        )
    }
}

#[inline(always)]
unsafe fn dot_pairs8(sum: __m256, x: __m256i, w: __m256i) -> __m256 {
    // SAFETY: AVX2, by the caller.
    unsafe {
        let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
        let high = |a| flush8(_mm256_castsi256_ps(_mm256_and_si256(a, upper)));
        let low = |a| flush8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)));
        let odd = flush8(_mm256_fmadd_ps(high(x), high(w), flush8(sum)));
        flush8(_mm256_fmadd_ps(low(x), low(w), odd))
    }
}

/// Two products in each half of a word, of at most 15 × 128 each.
#[inline(always)]
unsafe fn dot_codes8(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    // SAFETY: AVX2, by the caller.
    unsafe { _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)) }
}

/// Both halves of each word, added to it.
#[inline(always)]
unsafe fn code_sums8(total: __m256i, sum: __m256i) -> __m256i {
    // SAFETY: AVX2, by the caller.
    unsafe { _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1))) }
}

/// The low halves of sixteen words.
#[inline(always)]
unsafe fn low_halves(a: Words) -> __m256i {
    // SAFETY: AVX2, by the caller. Packing works within 128-bit lanes, so quarters change places.
    unsafe {
        let mask = _mm256_set1_epi32(0xffff);
        let low = |a| _mm256_and_si256(a, mask);
        _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packus_epi32(low(a.0), low(a.1)))
    }
}

impl<const BYTES: bool> Simd for Avx2<BYTES> {
    #[inline(always)]
    fn apart<B: Body>(body: B) -> B::Out {
        // SAFETY: this type is used under `Isa::call` only, which detected the features.
        unsafe {
            match BYTES {
                true => call_avx2_vnni(body),
                false => call_avx2(body),
            }
        }
    }
    type F = Pair;
    type I = Words;
    type Meanings = (Pair, Pair);
    type Unit = Twin;
    const WIDE: bool = false;
    const HALVES: bool = !BYTES;

    #[inline(always)]
    fn meanings(scale: Pair, minimum: Pair) -> (Pair, Pair) {
        (scale, minimum)
    }
    #[inline(always)]
    fn meant((scale, minimum): (Pair, Pair), words: Words, shift: u32) -> Pair {
        Self::fma(Self::nibbles(words, shift), scale, minimum)
    }

    words! {
        fn splat(value: f32) -> Pair = (_mm256_set1_ps(value), _mm256_set1_ps(value));
        fn splat_f16(bits: u16) -> Pair = {
            let one = _mm256_cvtph_ps(_mm_set1_epi16(bits as i16));
            (one, one)
        };
        fn fma(a: Pair, b: Pair, c: Pair) -> Pair =
            (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1));
        fn add(a: Pair, b: Pair) -> Pair = (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1));
        fn sub(a: Pair, b: Pair) -> Pair = (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1));
        fn mul(a: Pair, b: Pair) -> Pair = (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1));
        fn div(a: Pair, b: Pair) -> Pair = (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1));
        fn max(a: Pair, b: Pair) -> Pair = (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1));
        fn min(a: Pair, b: Pair) -> Pair = (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1));
        fn sum(a: Pair) -> f32 = sum8(_mm256_add_ps(a.0, a.1));
        fn add_exponent(a: Pair, b: Pair) -> Pair = (exponent8(a.0, b.0), exponent8(a.1, b.1));
        fn nibbles(words: Words, shift: u32) -> Pair =
            (nibbles8(words.0, shift), nibbles8(words.1, shift));
        fn splat_word(word: u32) -> Words =
            (_mm256_set1_epi32(word as i32), _mm256_set1_epi32(word as i32));
        fn pairs(even: Pair, odd: Pair) -> Words = (pairs8(even.0, odd.0), pairs8(even.1, odd.1));
        fn dot_pairs(sum: Pair, x: Words, w: Words) -> Pair =
            (dot_pairs8(sum.0, x.0, w.0), dot_pairs8(sum.1, x.1, w.1));
        fn flush(a: Pair) -> Pair = (flush8(a.0), flush8(a.1));
        fn low_nibbles(words: Words) -> Words = {
            let mask = _mm256_set1_epi32(0x0f0f_0f0f);
            (_mm256_and_si256(words.0, mask), _mm256_and_si256(words.1, mask))
        };
        fn high_nibbles(words: Words) -> Words = Self::low_nibbles((
            _mm256_srli_epi32::<4>(words.0),
            _mm256_srli_epi32::<4>(words.1),
        ));
        fn begin_codes(total: Words) -> Words =
            if BYTES { total } else { (_mm256_setzero_si256(), _mm256_setzero_si256()) };
        fn dot_codes(sum: Words, codes: Words, x: Words) -> Words = if BYTES {
            (
                _mm256_dpbusd_avx_epi32(sum.0, codes.0, x.0),
                _mm256_dpbusd_avx_epi32(sum.1, codes.1, x.1),
            )
        } else {
            (dot_codes8(sum.0, codes.0, x.0), dot_codes8(sum.1, codes.1, x.1))
        };
        fn code_sums(total: Words, sum: Words) -> Words = if BYTES {
            sum
        } else {
            (code_sums8(total.0, sum.0), code_sums8(total.1, sum.1))
        };
        fn from_ints(a: Words) -> Pair = (_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1));
        fn to_ints(a: Pair) -> Words = (_mm256_cvtps_epi32(a.0), _mm256_cvtps_epi32(a.1));
        fn prefetch(at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
        fn prefetch_to_write(at: *mut f32) = own_line(at);
        fn sum_quarters(high: Words, low: Words) -> [i32; 4] = quarters::sum_quarters_8(high, low);
    }
    moves! {
        fn load(from: *const f32) -> Pair =
            (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)));
        fn store(to: *mut f32, a: Pair) = {
            _mm256_storeu_ps(to, a.0);
            _mm256_storeu_ps(to.add(8), a.1)
        };
        fn load_f16(from: *const u16) -> Pair = (
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
        );
        fn load_bf16(from: *const u16) -> Pair = (
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(half_words8(from.cast()))),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(half_words8(from.add(8).cast()))),
        );
        fn store_f16(to: *mut u16, a: Pair) = {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<HALF_RNE>(a.0));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<HALF_RNE>(a.1))
        };
        fn store_bf16(to: *mut u16, a: Pair) = {
            let upper = (upper_bf16_8(a.0), upper_bf16_8(a.1));
            let words = (_mm256_srli_epi32::<16>(upper.0), _mm256_srli_epi32::<16>(upper.1));
            _mm256_storeu_si256(to.cast(), low_halves(words))
        };
        fn store_bytes(to: *mut i8, a: Words) = {
            let halves = low_halves(a);
            let low = _mm256_and_si256(halves, _mm256_set1_epi16(0xff));
            let bytes = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packus_epi16(low, low));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(bytes))
        };
        fn store_words(to: *mut u32, a: Words) = {
            _mm256_storeu_si256(to.cast(), a.0);
            _mm256_storeu_si256(to.add(8).cast(), a.1)
        };
        fn load_words(from: *const u8) -> Words =
            (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()));
        fn load_half_words(from: *const u8) -> Words =
            (half_words8(from), half_words8(from.add(16)));
        fn load_quarters(from: [*const u8; 4]) -> Words =
            (quarters::load8(from[0], from[1]), quarters::load8(from[2], from[3]));
        fn splat_quarter(from: *const u8) -> Words =
            (quarters::splat8(from), quarters::splat8(from));
        fn store_half_pairs(to: *mut f32, from: [*const u8; 4]) =
            quarters::store_half_pairs(to, from);
    }
}
