//! Quantising one group of up to 64 values to 4 bits, and one row of groups back to f32.
//! A KV row's group is 36 bytes: sixteen little-endian words of 16 bits (nibble j of word i is the
//! code of element 16 j + i), then fp16 scale, fp16 minimum. Panels have their own order (panel.rs).

use super::simd::{LANES, Simd, lanes};
use crate::dtype::{Q4_GROUP, Q4_GROUP_BYTES};

/// Vectors of one group.
const VECTORS: usize = Q4_GROUP / LANES;
/// Bytes of the codes of one group.
pub(super) const CODE_BYTES: usize = Q4_GROUP / 2;
/// fp16's range.
pub(super) const LARGEST: f32 = 65504.0;
/// Adding it leaves a small whole number in the low bits.
pub(super) const ROUNDER: f32 = 12_582_912.0;

/// A group: value = code × scale + minimum, scale and minimum as fp16 bits.
pub(super) struct Group {
    pub codes: [u32; Q4_GROUP],
    pub scale: u16,
    pub minimum: u16,
}

/// Quantises 64 values (a short group is filled up by its caller). fp16's range bounds what is kept,
/// so finite values never become infinite; codes are taken against the rounded scale and minimum.
#[inline(always)]
pub(super) fn quantise<V: Simd>(values: &[f32; Q4_GROUP]) -> Group {
    let (low, high) = bounds::<V>(values);
    let (scale, minimum) = (to_half::<V>((high - low) / 15.0), to_half::<V>(low));
    // One division for sixteen lanes that are all alike; a zero scale leaves every code zero.
    let (scale_value, minimum_value) = (V::splat_f16(scale), V::splat_f16(minimum));
    let steps_per_unit = match scale {
        0 => V::splat(0.0),
        _ => V::div(V::splat(1.0), scale_value),
    };
    let mut codes = [0; Q4_GROUP];
    for (values, codes) in values
        .chunks_exact(LANES)
        .zip(codes.chunks_exact_mut(LANES))
    {
        // SAFETY: chunks of sixteen.
        let x = unsafe { V::load(values.as_ptr()) };
        let steps = V::mul(V::sub(x, minimum_value), steps_per_unit);
        // In this order what is not a number has code 0, whatever its bits.
        let steps = V::min(V::splat(15.0), V::max(steps, V::splat(0.0)));
        let rounded = lanes::<V>(V::add(steps, V::splat(ROUNDER)));
        for (code, rounded) in codes.iter_mut().zip(rounded) {
            *code = rounded.to_bits() & 15;
        }
    }
    Group {
        codes,
        scale,
        minimum,
    }
}

/// The nearest fp16.
#[inline(always)]
fn to_half<V: Simd>(value: f32) -> u16 {
    let mut halves = [0u16; LANES];
    // SAFETY: sixteen fp16.
    unsafe { V::store_f16(halves.as_mut_ptr(), V::splat(value)) };
    halves[0]
}

#[inline(always)]
fn bounds<V: Simd>(values: &[f32; Q4_GROUP]) -> (f32, f32) {
    let (mut low, mut high) = (V::splat(LARGEST), V::splat(-LARGEST));
    for values in values.chunks_exact(LANES) {
        // SAFETY: chunks of sixteen.
        let x = unsafe { V::load(values.as_ptr()) };
        (low, high) = (V::min(x, low), V::max(x, high));
    }
    let low = lanes::<V>(low)
        .into_iter()
        .fold(LARGEST, |a, b| if b < a { b } else { a });
    let high = lanes::<V>(high)
        .into_iter()
        .fold(-LARGEST, |a, b| if b > a { b } else { a });
    (low.clamp(-LARGEST, LARGEST), high.clamp(-LARGEST, LARGEST))
}

/// Writes a KV row: `values` in groups of 64, the last filled up with its last value.
#[inline(always)]
pub(super) fn write_row<V: Simd>(values: &[f32], row: &mut [u8]) {
    for (values, bytes) in values
        .chunks(Q4_GROUP)
        .zip(row.chunks_exact_mut(Q4_GROUP_BYTES))
    {
        let mut full = [values[values.len() - 1]; Q4_GROUP];
        full[..values.len()].copy_from_slice(values);
        let group = quantise::<V>(&full);
        let (words, ends) = bytes.split_at_mut(CODE_BYTES);
        for (i, word) in words.chunks_exact_mut(2).enumerate() {
            let code = |j: usize| group.codes[LANES * j + i] << (4 * j);
            let packed = code(0) | code(1) | code(2) | code(3);
            word.copy_from_slice(&(packed as u16).to_le_bytes());
        }
        ends[..2].copy_from_slice(&group.scale.to_le_bytes());
        ends[2..].copy_from_slice(&group.minimum.to_le_bytes());
    }
}

/// A KV row's group, its codes decoded sixteen at a time.
#[derive(Clone, Copy)]
pub(super) struct Reader<V: Simd> {
    words: V::I,
    meanings: V::Meanings,
}

impl<V: Simd> Reader<V> {
    /// # Safety
    /// 36 readable bytes at `group`.
    #[inline(always)]
    pub(super) unsafe fn new(group: *const u8) -> Reader<V> {
        // SAFETY: the caller's.
        unsafe {
            let ends = group.add(CODE_BYTES).cast::<u16>();
            let scale = V::splat_f16(u16::from_le(ends.read_unaligned()));
            let minimum = V::splat_f16(u16::from_le(ends.add(1).read_unaligned()));
            Reader::of(group, scale, minimum)
        }
    }

    /// Of a group whose scale and minimum have been read before.
    /// # Safety
    /// 32 readable bytes at `group`.
    #[inline(always)]
    pub(super) unsafe fn of(group: *const u8, scale: V::F, minimum: V::F) -> Reader<V> {
        Reader {
            // SAFETY: the caller's.
            words: unsafe { V::load_half_words(group) },
            meanings: V::meanings(scale, minimum),
        }
    }

    /// Elements 16 j..16 j + 16, j under 4.
    #[inline(always)]
    pub(super) fn vector(&self, j: usize) -> V::F {
        V::meant(self.meanings, self.words, 4 * j as u32)
    }
}

/// Widens the group at `group` to 64 f32 at `to`.
/// # Safety
/// 36 readable bytes and 64 writable f32.
#[inline(always)]
pub(super) unsafe fn read_group<V: Simd>(group: *const u8, to: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        let reader = Reader::<V>::new(group);
        for j in 0..VECTORS {
            V::store(to.add(j * LANES), reader.vector(j));
        }
    }
}
