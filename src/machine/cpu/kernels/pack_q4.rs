//! One panel of weights to 4 bits: a group of 64 inputs by 64 rows at a time, rows beside each other in
//! the lanes, so that bounds, codes and words are whole vectors. One row's rule is q4.rs's.

use super::pack::{PackSource, square};
use super::panel::{
    Bf16, CODES_AT, Element, F16, F32, GROUP_BYTES, UNIT_BYTES, UNIT_INPUTS, UNITS_ACROSS,
};
use super::q4::{LARGEST, ROUNDER};
use super::simd::{Body, LANES, Simd, lanes};
use crate::dtype::{Dtype, PANEL_ROWS, Q4_GROUP};

/// Vectors of the rows of a panel.
const VECTORS: usize = PANEL_ROWS / LANES;
/// Bytes of one group's elements, input after input, in the widest format.
const SCRATCH_BYTES: usize = 4 * PANEL_ROWS * Q4_GROUP;

/// One panel; rows that the matrix has no more of are zeros.
pub(super) struct Quantise<'a> {
    pub source: PackSource<'a>,
    pub to: &'a mut [u8],
}

impl Body for Quantise<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        match self.source.dtype {
            Dtype::F32 => self.groups::<V, F32, 4>(),
            Dtype::F16 => self.groups::<V, F16, 2>(),
            _ => self.groups::<V, Bf16, 2>(),
        }
    }
}

impl Quantise<'_> {
    #[inline(always)]
    fn groups<V: Simd, E: Element, const N: usize>(self) {
        let mut scratch = Aligned([0; SCRATCH_BYTES]);
        let inputs = self.source.inputs;
        for (g, to) in self.to.chunks_exact_mut(GROUP_BYTES).enumerate() {
            let from = g * Q4_GROUP;
            let count = (inputs - from).min(Q4_GROUP);
            gather::<N>(&self.source, from..from + count, &mut scratch.0);
            let (ends, units) = to.split_at_mut(CODES_AT);
            let steps = scales::<V, E, N>(&scratch.0[..count * PANEL_ROWS * N], ends);
            codes::<V, E, N>(&scratch.0, &steps, units);
            if self.source.rows < PANEL_ROWS {
                clear_rows(self.source.rows, to);
            }
        }
    }
}

/// Whole cache lines.
#[repr(align(64))]
struct Aligned([u8; SCRATCH_BYTES]);

/// `[input][64 rows]` of a group's elements; a short group is filled up with its last input.
#[inline(always)]
fn gather<const N: usize>(
    source: &PackSource,
    inputs: std::ops::Range<usize>,
    to: &mut [u8; SCRATCH_BYTES],
) {
    let (row_bytes, tall, count) = (source.inputs * N, 16 / N, inputs.len());
    ask_ahead::<N>(source, inputs.end);
    for row in (0..source.rows).step_by(tall) {
        let whole = match row + tall <= source.rows {
            true => count / tall * tall,
            false => 0,
        };
        for k in (0..whole).step_by(tall) {
            let (at, there) = (
                row * row_bytes + (inputs.start + k) * N,
                (k * PANEL_ROWS + row) * N,
            );
            square::<N>(
                (&source.bytes[at..], row_bytes),
                (&mut to[there..], PANEL_ROWS * N),
            );
        }
        for row in row..(row + tall).min(source.rows) {
            for k in whole..count {
                let (at, there) = (
                    row * row_bytes + (inputs.start + k) * N,
                    (k * PANEL_ROWS + row) * N,
                );
                to[there..there + N].copy_from_slice(&source.bytes[at..at + N]);
            }
        }
    }
    let line = PANEL_ROWS * N;
    for k in count..Q4_GROUP {
        to.copy_within((count - 1) * line..count * line, k * line);
    }
}

/// Asks for the rows' next group: 64 short streams are too many for the hardware.
#[inline(always)]
fn ask_ahead<const N: usize>(source: &PackSource, from: usize) {
    let until = (from + Q4_GROUP).min(source.inputs);
    for row in 0..source.rows {
        for byte in (from * N..until * N).step_by(64) {
            super::simd::prefetch(&source.bytes[row * source.inputs * N + byte]);
        }
    }
}

/// Per row: the minimum, and steps per unit (0 where all values are one).
struct Steps<V: Simd> {
    minimum: [V::F; VECTORS],
    per_unit: [V::F; VECTORS],
}

/// Bounds of every row to fp16 scales and minima; codes are taken against the rounded ones.
#[inline(always)]
fn scales<V: Simd, E: Element, const N: usize>(elements: &[u8], ends: &mut [u8]) -> Steps<V> {
    let mut low = [V::splat(LARGEST); VECTORS];
    let mut high = [V::splat(-LARGEST); VECTORS];
    for line in elements.chunks_exact(PANEL_ROWS * N) {
        for j in 0..VECTORS {
            // SAFETY: a line holds 64 elements.
            let x = unsafe { E::load::<V>(line.as_ptr().add(j * LANES * N)) };
            (low[j], high[j]) = (V::min(x, low[j]), V::max(x, high[j]));
        }
    }
    let mut steps = Steps {
        minimum: low,
        per_unit: high,
    };
    let (scale_bytes, minimum_bytes) = ends.split_at_mut(2 * PANEL_ROWS);
    for j in 0..VECTORS {
        let low = V::max(V::splat(-LARGEST), low[j]);
        let high = V::min(V::splat(LARGEST), high[j]);
        let scale = V::div(V::sub(high, low), V::splat(15.0));
        let (scale, minimum) = (halves::<V>(scale), halves::<V>(low));
        put(&scale, &mut scale_bytes[2 * j * LANES..]);
        put(&minimum, &mut minimum_bytes[2 * j * LANES..]);
        // SAFETY: sixteen fp16 each, and sixteen f32.
        unsafe {
            steps.minimum[j] = V::load_f16(minimum.as_ptr());
            let per_unit = lanes::<V>(V::load_f16(scale.as_ptr())).map(steps_per_unit);
            steps.per_unit[j] = V::load(per_unit.as_ptr());
        }
    }
    steps
}

#[inline(always)]
fn steps_per_unit(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The nearest fp16 of each lane.
#[inline(always)]
fn halves<V: Simd>(values: V::F) -> [u16; LANES] {
    let mut halves = [0u16; LANES];
    // SAFETY: sixteen fp16.
    unsafe { V::store_f16(halves.as_mut_ptr(), values) };
    halves
}

#[inline(always)]
fn put(halves: &[u16; LANES], to: &mut [u8]) {
    for (half, bytes) in halves.iter().zip(to.chunks_exact_mut(2)) {
        bytes.copy_from_slice(&half.to_le_bytes());
    }
}

/// The inputs of a unit whose codes are the nibbles of a word, lowest first (panel.rs): four of them
/// make its lower half, four its upper one.
const INPUTS_OF_NIBBLES: [[usize; 4]; 2] = [[0, 4, 1, 5], [2, 6, 3, 7]];

/// Every unit's sixteen words: four inputs' nibbles of a row are one number below 65536, which f32
/// holds exactly.
#[inline(always)]
fn codes<V: Simd, E: Element, const N: usize>(
    elements: &[u8; SCRATCH_BYTES],
    steps: &Steps<V>,
    units: &mut [u8],
) {
    let octets = elements.chunks_exact(UNIT_INPUTS * PANEL_ROWS * N);
    for (octet, units) in octets.zip(units.chunks_exact_mut(UNITS_ACROSS * UNIT_BYTES)) {
        for (j, unit) in units.chunks_exact_mut(UNIT_BYTES).enumerate() {
            let low = lanes::<V>(half_words::<V, E, N>(octet, steps, (j, 0)));
            let high = lanes::<V>(half_words::<V, E, N>(octet, steps, (j, 1)));
            for ((low, high), bytes) in low.iter().zip(&high).zip(unit.chunks_exact_mut(4)) {
                let word = low.to_bits() & 0xffff | high.to_bits() << 16;
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// One half of the words of sixteen rows, vector `j` of the panel's, in the low bits.
#[inline(always)]
fn half_words<V: Simd, E: Element, const N: usize>(
    octet: &[u8],
    steps: &Steps<V>,
    (j, half): (usize, usize),
) -> V::F {
    let rounder = V::splat(ROUNDER);
    let mut sum = rounder;
    for nibble in (0..4).rev() {
        let k = INPUTS_OF_NIBBLES[half][nibble];
        // SAFETY: an octet holds eight lines of 64 elements.
        let x = unsafe { E::load::<V>(octet.as_ptr().add((k * PANEL_ROWS + j * LANES) * N)) };
        let code = V::mul(V::sub(x, steps.minimum[j]), steps.per_unit[j]);
        let code = V::min(V::max(code, V::splat(0.0)), V::splat(15.0));
        let code = V::sub(V::add(code, rounder), rounder);
        sum = V::fma(code, V::splat((1u32 << (4 * nibble)) as f32), sum);
    }
    sum
}

/// Rows from `rows` on: no scale, no minimum, no codes.
fn clear_rows(rows: usize, group: &mut [u8]) {
    for row in rows..PANEL_ROWS {
        group[2 * row..2 * row + 2].fill(0);
        group[2 * (PANEL_ROWS + row)..2 * (PANEL_ROWS + row) + 2].fill(0);
        let units = group[CODES_AT..].chunks_exact_mut(UNIT_BYTES);
        for unit in units.skip(row / LANES).step_by(UNITS_ACROSS) {
            unit[row % LANES * 4..][..4].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::pack::{element, pack_panels};
    use super::super::q4::quantise;
    use super::super::simd::Scalar;
    use super::*;
    use crate::machine::cpu::pool::Pool;
    use half::{bf16, f16};

    /// Values with a row of equal ones, infinities and a row beyond fp16.
    fn value(row: usize, k: usize) -> f32 {
        match row {
            3 => 0.25,
            5 if k % 50 == 7 => f32::NEG_INFINITY,
            9 => 3e38 * (k as f32 - 20.0),
            _ => ((row * 31 + k * 17) % 101) as f32 * 0.013 - 0.5 - 1e-9 * k as f32,
        }
    }

    fn bytes(dtype: Dtype, value: f32) -> Vec<u8> {
        match dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            _ => bf16::from_f32(value).to_le_bytes().to_vec(),
        }
    }

    fn stored(dtype: Dtype, value: f32) -> f32 {
        match dtype {
            Dtype::F32 => value,
            Dtype::F16 => f16::from_f32(value).to_f32(),
            _ => bf16::from_f32(value).to_f32(),
        }
    }

    /// What q4.rs makes of each row alone, for shapes that end inside panels, squares and groups.
    #[test]
    fn every_group_is_what_its_row_alone_gives() {
        let pool = Pool::new(2);
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            for (rows, inputs) in [(64, 64), (70, 100), (13, 131), (3, 5), (128, 192)] {
                let from: Vec<u8> = (0..rows * inputs)
                    .flat_map(|i| bytes(dtype, value(i / inputs, i % inputs)))
                    .collect();
                let source = PackSource {
                    bytes: &from,
                    dtype,
                    rows,
                    inputs,
                };
                let panel_bytes = Dtype::Q4.panel_bytes(inputs) as usize;
                for isa in Isa::available() {
                    let mut out = vec![0xaa; crate::dtype::panels(rows) * panel_bytes];
                    pack_panels(&pool, isa, source, Dtype::Q4, &mut out);
                    for (p, panel) in out.chunks_exact(panel_bytes).enumerate() {
                        for row in 0..PANEL_ROWS {
                            check(panel, (p * PANEL_ROWS, row), &source);
                        }
                    }
                }
            }
        }
    }

    fn check(panel: &[u8], (first, row): (usize, usize), source: &PackSource) {
        for g in 0..source.inputs.div_ceil(Q4_GROUP) {
            let mut values = [0f32; Q4_GROUP];
            for (j, to) in values.iter_mut().enumerate() {
                let k = (g * Q4_GROUP + j).min(source.inputs - 1);
                *to = stored(source.dtype, value(first + row, k));
            }
            let group = quantise::<Scalar>(&values);
            let (scale, minimum) = (f16::from_bits(group.scale), f16::from_bits(group.minimum));
            for (j, &code) in group.codes.iter().enumerate() {
                let expected = match first + row < source.rows {
                    true => (code as f32).mul_add(scale.to_f32(), minimum.to_f32()),
                    false => 0.0,
                };
                let found = element(Dtype::Q4, panel, row, g * Q4_GROUP + j);
                assert_eq!(found.to_bits(), expected.to_bits(), "row {row} input {j}");
            }
        }
    }
}
