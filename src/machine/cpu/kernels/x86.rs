//! The vector words of AVX-512 and of AVX2 + FMA + F16C. Nothing but the mapping; the twin of every
//! word is `Scalar`'s in simd.rs.

use super::simd::{Body, Simd};
use std::arch::x86_64::*;

/// One 512-bit register per vector.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// Two 256-bit registers per vector: lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn call_avx2<B: Body>(body: B) -> B::Out {
    body.run::<Avx2>()
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn call_avx512<B: Body>(body: B) -> B::Out {
    body.run::<Avx512>()
}

/// Words without pointers: safe to call because the type is used under `Isa::call` only.
macro_rules! words {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: `Isa::call` detected the features before any of this runs.
            unsafe { $body }
        }
    )*};
}

/// Words that follow a pointer; the contract is the trait's.
macro_rules! moves {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the caller's for the pointer; `Isa::call` detected the features.
            unsafe { $body }
        }
    )*};
}

type Pair = (__m256, __m256);
type Words = (__m256i, __m256i);

const HALF_RNE: i32 = _MM_FROUND_TO_NEAREST_INT;

/// Lanes i + 4, then + 2, + 1, of eight lanes already folded from sixteen.
#[inline(always)]
unsafe fn sum8(a: __m256) -> f32 {
    // SAFETY: AVX, by the caller.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// Two vectors' lower halves beside each other, plus their upper halves: lanes i + 8 of both.
#[inline(always)]
unsafe fn halves4(a: __m512, b: __m512) -> __m512 {
    // SAFETY: AVX-512, by the caller.
    unsafe {
        _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x44>(a, b),
            _mm512_shuffle_f32x4::<0xee>(a, b),
        )
    }
}

/// The tree of `sum` for four vectors at once: every addition adds lanes of all of them.
#[inline(always)]
unsafe fn sums4(a: [__m512; 4]) -> [f32; 4] {
    // SAFETY: AVX-512, by the caller.
    unsafe {
        let (ab, cd) = (halves4(a[0], a[1]), halves4(a[2], a[3]));
        // Even quarters plus odd quarters: lanes i + 4; a, b, c, d have a quarter each.
        let quarters = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x88>(ab, cd),
            _mm512_shuffle_f32x4::<0xdd>(ab, cd),
        );
        let pairs = _mm512_add_ps(quarters, _mm512_permute_ps::<0x4e>(quarters));
        let ones = _mm512_add_ps(pairs, _mm512_permute_ps::<0xb1>(pairs));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        let mut sums = [0f32; 4];
        let four = _mm512_castps512_ps128(_mm512_permutexvar_ps(order, ones));
        _mm_storeu_ps(sums.as_mut_ptr(), four);
        sums
    }
}

impl Simd for Avx512 {
    #[inline(always)]
    fn apart<B: Body>(body: B) -> B::Out {
        // SAFETY: this type is used under `Isa::call` only, which detected the features.
        unsafe { call_avx512(body) }
    }
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;

    #[inline(always)]
    fn nibble_height(index: u32) -> f32 {
        (1u32 << (4 * index)) as f32
    }

    words! {
        fn splat(value: f32) -> __m512 = _mm512_set1_ps(value);
        fn splat_f16(bits: u16) -> __m512 = _mm512_cvtph_ps(_mm256_set1_epi16(bits as i16));
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn sum(a: __m512) -> f32 =
            sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a)));
        fn sums(a: [__m512; 4]) -> [f32; 4] = sums4(a);
        fn add_exponent(a: __m512, b: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_castps_si512(a),
            _mm512_slli_epi32::<23>(_mm512_castps_si512(b)),
        ));
        // A permute looks at the low four bits only, so it masks and converts in one step.
        fn nibbles(words: __m512i, shift: u32) -> __m512 = _mm512_permutexvar_ps(
            _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32)),
            _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.),
        );
        fn raised_nibbles(words: __m512i, index: u32) -> __m512 = _mm512_cvtepu32_ps(
            _mm512_and_si512(words, _mm512_set1_epi32((15u32 << (4 * index)) as i32)),
        );
        fn prefetch(at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    moves! {
        fn load(from: *const f32) -> __m512 = _mm512_loadu_ps(from);
        fn store(to: *mut f32, a: __m512) = _mm512_storeu_ps(to, a);
        fn load_f16(from: *const u16) -> __m512 =
            _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
        fn load_bf16(from: *const u16) -> __m512 = _mm512_castsi512_ps(
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))),
        );
        fn store_f16(to: *mut u16, a: __m512) =
            _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<HALF_RNE>(a));
        fn load_words(from: *const u8) -> __m512i = _mm512_loadu_si512(from.cast());
        fn load_half_words(from: *const u8) -> __m512i =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
    }
}

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

impl Simd for Avx2 {
    #[inline(always)]
    fn apart<B: Body>(body: B) -> B::Out {
        // SAFETY: this type is used under `Isa::call` only, which detected the features.
        unsafe { call_avx2(body) }
    }
    type F = Pair;
    type I = Words;
    const WIDE: bool = false;

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
        fn prefetch(at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
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
        fn load_words(from: *const u8) -> Words =
            (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()));
        fn load_half_words(from: *const u8) -> Words =
            (half_words8(from), half_words8(from.add(16)));
    }
}

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
