//! Sixteen f32 lanes under one set of words, chosen at run time; every kernel is written once over
//! `Simd`, so that all instruction sets round alike. No arithmetic of a model in here.

use super::matrix_unit::{Twin, Unit};
use half::{bf16, f16};

/// Lanes of a vector on every path, whatever the register width.
pub const LANES: usize = 16;
/// Products of two codes of at most 15 and bytes of at least -128 that are added up in 16 bits.
pub(super) const CODES_TOGETHER: usize = 8;

/// Work that is compiled once per instruction set. `run` and all it calls are `inline(always)`:
/// what is not inlined into x86.rs's `call_…` would be compiled without their features. So no
/// vector words in closures, which cannot be marked, except tiny ones that inline by themselves.
pub(super) trait Body {
    type Out;
    fn run<V: Simd>(self) -> Self::Out;
}

/// Sixteen lanes. Implementors are used only inside `Isa::call`, which proves their features;
/// loads and stores need no alignment beyond the element's.
pub(super) trait Simd: Copy + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen 32-bit words.
    type I: Copy;
    /// What the sixteen codes of a 4-bit group mean.
    type Meanings: Copy;
    /// The matrix unit beside these vectors; the twin where `Isa` has none.
    type Unit: Unit;
    /// Vectors that one row of a register tile spans: 4 with thirty-two wide registers, else 1.
    const WIDE: bool;
    /// Products of codes have no instruction of their own: their sums are kept in halves of words for a while.
    const HALVES: bool;

    /// Runs the body as a function of its own: its code exists once, however many call it.
    fn apart<B: Body>(body: B) -> B::Out;
    fn splat(value: f32) -> Self::F;
    /// The fp16 number with these bits in every lane.
    fn splat_f16(bits: u16) -> Self::F;
    /// a * b + c, rounded once.
    fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn add(a: Self::F, b: Self::F) -> Self::F;
    fn sub(a: Self::F, b: Self::F) -> Self::F;
    fn mul(a: Self::F, b: Self::F) -> Self::F;
    fn div(a: Self::F, b: Self::F) -> Self::F;
    /// a > b ? a : b, so b where one is not a number.
    fn max(a: Self::F, b: Self::F) -> Self::F;
    /// a < b ? a : b, so b where one is not a number.
    fn min(a: Self::F, b: Self::F) -> Self::F;
    /// The largest lane, of numbers only.
    #[inline(always)]
    fn largest(a: Self::F) -> f32 {
        lanes::<Self>(a)
            .into_iter()
            .fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
    /// The fixed tree: lanes i + 8, then + 4, + 2, + 1.
    fn sum(a: Self::F) -> f32;
    /// `sum` of each.
    #[inline(always)]
    fn sums(a: [Self::F; 4]) -> [f32; 4] {
        [
            Self::sum(a[0]),
            Self::sum(a[1]),
            Self::sum(a[2]),
            Self::sum(a[3]),
        ]
    }
    /// bits(a) + (bits(b) << 23): a times two to the integer in b's low mantissa bits.
    fn add_exponent(a: Self::F, b: Self::F) -> Self::F;
    /// (word >> shift) & 15 of each lane, as f32.
    fn nibbles(words: Self::I, shift: u32) -> Self::F;
    /// Code × scale + minimum, both alike in all lanes.
    fn meanings(scale: Self::F, minimum: Self::F) -> Self::Meanings;
    /// What (word >> shift) & 15 of each lane means.
    fn meant(meanings: Self::Meanings, words: Self::I, shift: u32) -> Self::F;
    /// The word in every lane.
    fn splat_word(word: u32) -> Self::I;
    /// Each lane's two numbers as bf16, the even one in the low half. Rounds to nearest even;
    /// subnormal numbers become zero.
    fn pairs(even: Self::F, odd: Self::F) -> Self::I;
    /// fma(x even, w even, fma(x odd, w odd, sum)) of bf16 pairs, with every subnormal operand and
    /// result taken as zero: what the hardware's instruction does.
    fn dot_pairs(sum: Self::F, x: Self::I, w: Self::I) -> Self::F;
    /// Subnormal numbers as zeros of their sign.
    fn flush(a: Self::F) -> Self::F;
    /// Words of four bytes: the low, and the high nibble of each.
    fn low_nibbles(words: Self::I) -> Self::I;
    fn high_nibbles(words: Self::I) -> Self::I;
    /// Where up to `CODES_TOGETHER` products of codes in a row begin, in a form of the path's own: with `HALVES` at
    /// nothing, in halves of words, else at `total` itself.
    fn begin_codes(total: Self::I) -> Self::I;
    /// sum + the four products of unsigned bytes (at most 15) and signed bytes in each word.
    fn dot_codes(sum: Self::I, codes: Self::I, x: Self::I) -> Self::I;
    /// `total`, at which they began, and their sum.
    fn code_sums(total: Self::I, sum: Self::I) -> Self::I;
    /// Signed words as f32.
    fn from_ints(a: Self::I) -> Self::F;
    /// To the nearest integer, halves to even; for numbers of at most eight bits.
    fn to_ints(a: Self::F) -> Self::I;

    /// # Safety
    /// Sixteen f32 readable at `from`.
    unsafe fn load(from: *const f32) -> Self::F;
    /// # Safety
    /// Sixteen f32 writable at `to`.
    unsafe fn store(to: *mut f32, a: Self::F);
    /// # Safety
    /// Sixteen fp16 readable at `from`.
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// # Safety
    /// Sixteen bf16 readable at `from`.
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    /// Rounds to nearest even.
    /// # Safety
    /// Sixteen fp16 writable at `to`.
    unsafe fn store_f16(to: *mut u16, a: Self::F);
    /// Rounds as `pairs` does.
    /// # Safety
    /// Sixteen bf16 writable at `to`.
    unsafe fn store_bf16(to: *mut u16, a: Self::F);
    /// Keeps the low byte of each word.
    /// # Safety
    /// Sixteen bytes writable at `to`.
    unsafe fn store_bytes(to: *mut i8, a: Self::I);
    /// # Safety
    /// Sixteen words writable at `to`.
    unsafe fn store_words(to: *mut u32, a: Self::I);
    /// # Safety
    /// Sixteen 32-bit words readable at `from`, of any alignment.
    unsafe fn load_words(from: *const u8) -> Self::I;
    /// # Safety
    /// Sixteen 16-bit words readable at `from`, of any alignment; they are zero-extended.
    unsafe fn load_half_words(from: *const u8) -> Self::I;
    /// Four words, little-endian, from each place.
    /// # Safety
    /// Sixteen bytes readable at each of `from`.
    unsafe fn load_quarters(from: [*const u8; 4]) -> Self::I;
    /// The same four words four times.
    /// # Safety
    /// Sixteen bytes readable at `from`.
    unsafe fn splat_quarter(from: *const u8) -> Self::I;
    /// 256 × high + low, added up over the four words of each quarter; wraps.
    fn sum_quarters(high: Self::I, low: Self::I) -> [i32; 4];
    /// The first fp16 of each place, then the second of each, as f32.
    /// # Safety
    /// Two fp16 readable at each of `from`, eight f32 writable at `to`.
    unsafe fn store_half_pairs(to: *mut f32, from: [*const u8; 4]);
    /// Asks for a cache line that will be read soon; any address is allowed.
    fn prefetch(at: *const u8);
    /// Asks for a cache line that will be written soon, any address: another core may still hold it, and
    /// stores, which wait in order, would each wait for that.
    fn prefetch_to_write(at: *mut f32);
}

/// The twin in plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

type Lanes = [f32; LANES];

/// Subnormal numbers as zeros of their sign.
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

/// The bits of the nearest bf16, halves to even.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    bf16::from_f32(flush(x)).to_bits()
}

#[inline(always)]
fn zip(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type F = Lanes;
    type I = [u32; LANES];
    type Meanings = (Lanes, Lanes);
    type Unit = Twin;
    const WIDE: bool = false;
    const HALVES: bool = false;

    #[inline(never)]
    fn apart<B: Body>(body: B) -> B::Out {
        body.run::<Scalar>()
    }
    fn splat(value: f32) -> Lanes {
        [value; LANES]
    }
    fn splat_f16(bits: u16) -> Lanes {
        [f16::from_bits(bits).to_f32(); LANES]
    }
    fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    fn add(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a + b)
    }
    fn sub(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a - b)
    }
    fn mul(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a * b)
    }
    fn div(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a / b)
    }
    fn max(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    fn min(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    fn sum(a: Lanes) -> f32 {
        let mut lanes = a;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }
    fn add_exponent(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| {
            f32::from_bits(a.to_bits().wrapping_add(b.to_bits() << 23))
        })
    }
    fn nibbles(words: [u32; LANES], shift: u32) -> Lanes {
        words.map(|word| (word >> shift & 15) as f32)
    }
    fn meanings(scale: Lanes, minimum: Lanes) -> (Lanes, Lanes) {
        (scale, minimum)
    }
    fn meant((scale, minimum): (Lanes, Lanes), words: [u32; LANES], shift: u32) -> Lanes {
        Self::fma(Self::nibbles(words, shift), scale, minimum)
    }
    fn splat_word(word: u32) -> [u32; LANES] {
        [word; LANES]
    }
    fn pairs(even: Lanes, odd: Lanes) -> [u32; LANES] {
        std::array::from_fn(|i| to_bf16(even[i]) as u32 | (to_bf16(odd[i]) as u32) << 16)
    }
    fn dot_pairs(sum: Lanes, x: [u32; LANES], w: [u32; LANES]) -> Lanes {
        let low = |word: u32| flush(f32::from_bits(word << 16));
        let high = |word: u32| flush(f32::from_bits(word & 0xffff_0000));
        std::array::from_fn(|i| {
            let odd = flush(high(x[i]).mul_add(high(w[i]), flush(sum[i])));
            flush(low(x[i]).mul_add(low(w[i]), odd))
        })
    }
    fn flush(a: Lanes) -> Lanes {
        a.map(flush)
    }
    fn low_nibbles(words: [u32; LANES]) -> [u32; LANES] {
        words.map(|word| word & 0x0f0f_0f0f)
    }
    fn high_nibbles(words: [u32; LANES]) -> [u32; LANES] {
        words.map(|word| word >> 4 & 0x0f0f_0f0f)
    }
    fn begin_codes(total: [u32; LANES]) -> [u32; LANES] {
        total
    }
    fn dot_codes(sum: [u32; LANES], codes: [u32; LANES], x: [u32; LANES]) -> [u32; LANES] {
        std::array::from_fn(|i| {
            let bytes = codes[i].to_le_bytes().into_iter().zip(x[i].to_le_bytes());
            let dot: i32 = bytes.map(|(c, x)| c as i32 * (x as i8) as i32).sum();
            sum[i].wrapping_add(dot as u32)
        })
    }
    fn code_sums(_total: [u32; LANES], sum: [u32; LANES]) -> [u32; LANES] {
        sum
    }
    fn from_ints(a: [u32; LANES]) -> Lanes {
        a.map(|word| word as i32 as f32)
    }
    fn to_ints(a: Lanes) -> [u32; LANES] {
        a.map(|x| x.round_ties_even() as i32 as u32)
    }
    unsafe fn load(from: *const f32) -> Lanes {
        // SAFETY: the caller's.
        unsafe { from.cast::<Lanes>().read_unaligned() }
    }
    unsafe fn store(to: *mut f32, a: Lanes) {
        // SAFETY: the caller's.
        unsafe { to.cast::<Lanes>().write_unaligned(a) }
    }
    unsafe fn load_f16(from: *const u16) -> Lanes {
        // SAFETY: the caller's.
        let words = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        words.map(|word| f16::from_bits(word).to_f32())
    }
    unsafe fn load_bf16(from: *const u16) -> Lanes {
        // SAFETY: the caller's.
        let words = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        words.map(|word| bf16::from_bits(word).to_f32())
    }
    unsafe fn store_f16(to: *mut u16, a: Lanes) {
        // SAFETY: the caller's.
        unsafe {
            to.cast::<[u16; LANES]>()
                .write_unaligned(a.map(|x| f16::from_f32(x).to_bits()))
        }
    }
    unsafe fn store_bf16(to: *mut u16, a: Lanes) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(a.map(to_bf16)) }
    }
    unsafe fn store_bytes(to: *mut i8, a: [u32; LANES]) {
        // SAFETY: the caller's.
        unsafe {
            to.cast::<[i8; LANES]>()
                .write_unaligned(a.map(|word| word as i8))
        }
    }
    unsafe fn store_words(to: *mut u32, a: [u32; LANES]) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[u32; LANES]>().write_unaligned(a) }
    }
    unsafe fn load_words(from: *const u8) -> [u32; LANES] {
        // SAFETY: the caller's.
        let words = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        words.map(u32::from_le)
    }
    unsafe fn load_half_words(from: *const u8) -> [u32; LANES] {
        // SAFETY: the caller's.
        let words = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        words.map(|word| u16::from_le(word) as u32)
    }
    unsafe fn load_quarters(from: [*const u8; 4]) -> [u32; LANES] {
        // SAFETY: the caller's.
        let quarters = from.map(|from| unsafe { from.cast::<[u32; 4]>().read_unaligned() });
        std::array::from_fn(|i| u32::from_le(quarters[i / 4][i % 4]))
    }
    unsafe fn splat_quarter(from: *const u8) -> [u32; LANES] {
        // SAFETY: the caller's.
        unsafe { Self::load_quarters([from; 4]) }
    }
    fn sum_quarters(high: [u32; LANES], low: [u32; LANES]) -> [i32; 4] {
        std::array::from_fn(|quarter| {
            let words = 4 * quarter..4 * quarter + 4;
            words.fold(0, |sum: i32, i| {
                let word = (high[i] << 8).wrapping_add(low[i]);
                sum.wrapping_add(word as i32)
            })
        })
    }
    unsafe fn store_half_pairs(to: *mut f32, from: [*const u8; 4]) {
        // SAFETY: the caller's.
        let pairs = from.map(|from| unsafe { from.cast::<[u16; 2]>().read_unaligned() });
        let value = |bits: u16| f16::from_bits(u16::from_le(bits)).to_f32();
        let values: [f32; 8] = std::array::from_fn(|i| value(pairs[i % 4][i / 4]));
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(values) }
    }
    fn prefetch(_at: *const u8) {}
    fn prefetch_to_write(_at: *mut f32) {}
}

/// The first `n` of sixteen f32, zeros behind.
/// # Safety
/// `min(n, 16)` f32 readable at `from`.
#[inline(always)]
pub(super) unsafe fn load_first<V: Simd>(from: *const f32, n: usize) -> V::F {
    let mut lanes = [0f32; LANES];
    // SAFETY: the caller's; the array holds what is copied.
    unsafe {
        if n >= LANES {
            return V::load(from);
        }
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
        V::load(lanes.as_ptr())
    }
}

/// Writes the first `n` of sixteen f32.
/// # Safety
/// `min(n, 16)` f32 writable at `to`.
#[inline(always)]
pub(super) unsafe fn store_first<V: Simd>(to: *mut f32, a: V::F, n: usize) {
    let mut lanes = [0f32; LANES];
    // SAFETY: the caller's; the array holds what is copied.
    unsafe {
        if n >= LANES {
            return V::store(to, a);
        }
        V::store(lanes.as_mut_ptr(), a);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
    }
}

/// The lanes as an array.
#[inline(always)]
pub(super) fn lanes<V: Simd>(a: V::F) -> Lanes {
    let mut lanes = [0f32; LANES];
    // SAFETY: the array holds sixteen.
    unsafe { V::store(lanes.as_mut_ptr(), a) };
    lanes
}

/// Asks for the cache line of `at`, outside of any instruction set's body.
#[inline(always)]
pub(super) fn prefetch<T>(at: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint on a valid address; SSE belongs to x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>((at as *const T).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
