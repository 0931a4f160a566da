//! The vector words of AVX-512. Nothing but the mapping; the twin of every word is `Scalar`'s in simd.rs.
//! (Those of AVX2 are x86_avx2.rs's.)

use super::amx::Amx;
use super::simd::{Body, Simd};
use super::x86_quarters as quarters;
use std::arch::x86_64::*;

/// One 512-bit register per vector; with `BYTES` the instruction for products of bytes (VNNI), with `PAIRS` those
/// for bf16.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BYTES: bool, const PAIRS: bool>;

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn call_avx512<B: Body>(body: B) -> B::Out {
    body.run::<Avx512<false, false>>()
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn call_avx512_vnni<B: Body>(body: B) -> B::Out {
    body.run::<Avx512<true, false>>()
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")]
pub(super) fn call_avx512_dot<B: Body>(body: B) -> B::Out {
    body.run::<Avx512<true, true>>()
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

pub(super) use {moves, words};

pub(super) const HALF_RNE: i32 = _MM_FROUND_TO_NEAREST_INT;

/// Brings a line into this core for writing. A hint on any address; a core that lacks the instruction
/// takes it as none (all of x86-64 decode it).
#[inline(always)]
pub(super) unsafe fn own_line(at: *mut f32) {
    // SAFETY: touches neither memory nor flags.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
}

/// Lanes i + 4, then + 2, + 1, of eight lanes already folded from sixteen.
#[inline(always)]
pub(super) unsafe fn sum8(a: __m256) -> f32 {
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

/// The nearest bf16 of each lane in the upper half of its word, halves to even.
#[inline(always)]
unsafe fn upper_bf16_16(a: __m512) -> __m512i {
    // SAFETY: AVX-512, by the caller.
    unsafe {
        let bits = _mm512_castps_si512(flush16(a));
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
        let rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
        _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000u32 as i32))
    }
}

/// Subnormal lanes as zeros of their sign.
#[inline(always)]
unsafe fn flush16(a: __m512) -> __m512 {
    // SAFETY: AVX-512, by the caller.
    unsafe {
        let small =
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(a), _mm512_set1_ps(f32::MIN_POSITIVE));
        let sign = _mm512_and_ps(a, _mm512_set1_ps(-0.0));
        _mm512_mask_mov_ps(a, small, sign)
    }
}

/// `Simd::dot_pairs` where the machine has no instruction for it.
#[inline(always)]
unsafe fn dot_pairs16(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
    // SAFETY: AVX-512, by the caller.
    unsafe {
        let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
        let high = |a| flush16(_mm512_castsi512_ps(_mm512_and_si512(a, upper)));
        let low = |a| flush16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)));
        let odd = flush16(_mm512_fmadd_ps(high(x), high(w), flush16(sum)));
        flush16(_mm512_fmadd_ps(low(x), low(w), odd))
    }
}

/// Even and odd numbers, sixteen each, as interleaved bf16 by the machine's own conversion.
#[inline(always)]
unsafe fn pairs_by_instruction(even: __m512, odd: __m512) -> __m512i {
    // SAFETY: AVX-512 BF16, by the caller; both types are 64 bytes.
    unsafe {
        let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
        let order = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
            4, 19, 3, 18, 2, 17, 1, 16, 0,
        );
        _mm512_permutexvar_epi16(order, both)
    }
}

impl<const BYTES: bool, const PAIRS: bool> Simd for Avx512<BYTES, PAIRS> {
    #[inline(always)]
    fn apart<B: Body>(body: B) -> B::Out {
        // SAFETY: this type is used under `Isa::call` only, which detected the features.
        unsafe {
            match (BYTES, PAIRS) {
                (_, true) => call_avx512_dot(body),
                (true, false) => call_avx512_vnni(body),
                (false, false) => call_avx512(body),
            }
        }
    }
    type F = __m512;
    type I = __m512i;
    /// All sixteen, to be picked by a permute.
    type Meanings = __m512;
    type Unit = Amx;
    const WIDE: bool = true;
    const HALVES: bool = !BYTES;

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
        fn largest(a: __m512) -> f32 = _mm512_reduce_max_ps(a);
        fn add_exponent(a: __m512, b: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_castps_si512(a),
            _mm512_slli_epi32::<23>(_mm512_castps_si512(b)),
        ));
        // A permute looks at the low four bits only, so it masks and converts in one step.
        fn nibbles(words: __m512i, shift: u32) -> __m512 = _mm512_permutexvar_ps(
            _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32)),
            _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.),
        );
        fn meanings(scale: __m512, minimum: __m512) -> __m512 = _mm512_fmadd_ps(
            _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.),
            scale,
            minimum,
        );
        fn meant(meanings: __m512, words: __m512i, shift: u32) -> __m512 = _mm512_permutexvar_ps(
            _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32)),
            meanings,
        );
        fn splat_word(word: u32) -> __m512i = _mm512_set1_epi32(word as i32);
        fn pairs(even: __m512, odd: __m512) -> __m512i = if PAIRS {
            pairs_by_instruction(even, odd)
        } else {
            _mm512_or_si512(_mm512_srli_epi32::<16>(upper_bf16_16(even)), upper_bf16_16(odd))
        };
        fn dot_pairs(sum: __m512, x: __m512i, w: __m512i) -> __m512 = if PAIRS {
            {
            let pairs = |words| std::mem::transmute::<__m512i, __m512bh>(words);
            _mm512_dpbf16_ps(sum, pairs(w), pairs(x))
        }
        } else {
            dot_pairs16(sum, x, w)
        };
        fn flush(a: __m512) -> __m512 = flush16(a);
        fn low_nibbles(words: __m512i) -> __m512i =
            _mm512_and_si512(words, _mm512_set1_epi32(0x0f0f_0f0f));
        fn high_nibbles(words: __m512i) -> __m512i =
            _mm512_and_si512(_mm512_srli_epi32::<4>(words), _mm512_set1_epi32(0x0f0f_0f0f));
        fn begin_codes(total: __m512i) -> __m512i =
            if BYTES { total } else { _mm512_setzero_si512() };
        fn dot_codes(sum: __m512i, codes: __m512i, x: __m512i) -> __m512i = if BYTES {
            _mm512_dpbusd_epi32(sum, codes, x)
        } else {
            _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, x))
        };
        fn code_sums(total: __m512i, sum: __m512i) -> __m512i = if BYTES {
            sum
        } else {
            _mm512_add_epi32(total, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)))
        };
        fn from_ints(a: __m512i) -> __m512 = _mm512_cvtepi32_ps(a);
        fn to_ints(a: __m512) -> __m512i = _mm512_cvtps_epi32(a);
        fn prefetch(at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
        fn prefetch_to_write(at: *mut f32) = own_line(at);
        fn sum_quarters(high: __m512i, low: __m512i) -> [i32; 4] =
            quarters::sum_quarters_16(high, low);
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
        fn store_bf16(to: *mut u16, a: __m512) = if PAIRS {
            let halves: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(a));
            _mm256_storeu_si256(to.cast(), halves)
        } else {
            let upper = _mm512_srli_epi32::<16>(upper_bf16_16(a));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(upper))
        };
        fn store_bytes(to: *mut i8, a: __m512i) =
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(a));
        fn store_words(to: *mut u32, a: __m512i) = _mm512_storeu_si512(to.cast(), a);
        fn load_words(from: *const u8) -> __m512i = _mm512_loadu_si512(from.cast());
        fn load_half_words(from: *const u8) -> __m512i =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        fn load_quarters(from: [*const u8; 4]) -> __m512i = quarters::load16(from);
        fn splat_quarter(from: *const u8) -> __m512i = quarters::splat16(from);
        fn store_half_pairs(to: *mut f32, from: [*const u8; 4]) =
            quarters::store_half_pairs(to, from);
    }
}
