//! Products of 4-bit weights with activations of 8 bits: rows of x are quantised in groups of 64, the
//! products of a group are summed as integers, and the groups' sums are added in f32, one after the
//! other. So an output depends on its own row of x and of the weights only, whatever the split.

use super::panel::{CODES_AT, GROUP_BYTES, UNIT_BYTES, UNIT_INPUTS, UNITS_ACROSS};
use super::simd::{Body, CODES_TOGETHER, LANES, Simd, load_first};
use super::tile::{Finish, TILE_ROWS, Tile, begin, save};
use crate::dtype::{PANEL_ROWS, Q4_GROUP};
use std::ops::Range;

/// The largest code of an activation.
const LARGEST: f32 = 127.0;
/// A group with nothing larger counts as zeros: its scale could not be inverted.
const NOTHING: f32 = 1e-30;
/// Groups in one slice for narrow registers: 9 KiB, which stay in the first cache while they are walked over.
const SLICE_GROUPS: usize = 2;

/// A group's scale, and its scale times the sum of its codes.
pub(super) type Scale = [f32; 2];

/// Whether a tile of so many rows and vectors of columns goes over a panel in several walks that compute longer
/// than memory takes.
const fn in_slices(rows: usize, vectors: usize) -> bool {
    rows > 1 && vectors == 1
}

/// Quantises one row: value = code × scale. A group with an infinity or not-a-number gets a scale that
/// is not a number.
/// # Safety
/// `codes` has 64 bytes and `scales` one entry for each started group.
#[inline(always)]
pub(super) unsafe fn quantise_row<V: Simd>(x: &[f32], codes: *mut i8, scales: *mut Scale) {
    for (g, group) in x.chunks(Q4_GROUP).enumerate() {
        // SAFETY: the caller's.
        unsafe { *scales.add(g) = quantise_group::<V>(group, codes.add(g * Q4_GROUP)) };
    }
}

#[inline(always)]
unsafe fn quantise_group<V: Simd>(x: &[f32], codes: *mut i8) -> Scale {
    let mut vectors = [V::splat(0.0); Q4_GROUP / LANES];
    let (mut high, mut odd) = (V::splat(0.0), V::splat(0.0));
    for (j, vector) in vectors.iter_mut().enumerate() {
        let from = (j * LANES).min(x.len());
        // SAFETY: the rest of the slice, which may be empty.
        *vector = unsafe { load_first::<V>(x.as_ptr().add(from), x.len() - from) };
        high = V::max(V::max(*vector, V::sub(V::splat(0.0), *vector)), high);
        odd = V::add(odd, V::sub(*vector, *vector));
    }
    let largest = V::largest(high);
    let (scale, per_unit) = match largest > NOTHING {
        true => (largest / LARGEST, LARGEST / largest),
        false => (0.0, 0.0),
    };
    let mut total = V::splat(0.0);
    for (j, vector) in vectors.iter().enumerate() {
        let ints = V::to_ints(V::mul(*vector, V::splat(per_unit)));
        total = V::add(total, V::from_ints(ints));
        // SAFETY: 64 bytes by the caller.
        unsafe { V::store_bytes(codes.add(j * LANES), ints) };
    }
    // `odd` is zero for finite numbers, else not a number.
    let total = V::sum(V::add(total, odd));
    let scale = if total.is_nan() { total } else { scale };
    [scale, scale * total]
}

/// Rows of x as codes: of row i, group g, the codes are at `codes + i × stride + 64 g` and the scale at
/// `scales[i × groups + g]`.
#[derive(Clone, Copy)]
pub(super) struct Quantised {
    pub codes: *const i8,
    pub stride: usize,
    pub scales: *const Scale,
    pub groups: usize,
}

impl Quantised {
    /// The same past so many groups.
    #[inline(always)]
    pub(super) fn past_groups(self, groups: usize) -> Quantised {
        Quantised {
            codes: self.codes.wrapping_add(groups * Q4_GROUP),
            scales: self.scales.wrapping_add(groups),
            ..self
        }
    }

    /// The same from row `row` on.
    #[inline(always)]
    pub(super) fn beyond(self, row: usize) -> Quantised {
        Quantised {
            codes: self.codes.wrapping_add(row * self.stride),
            scales: self.scales.wrapping_add(row * self.groups),
            ..self
        }
    }
}

/// Rows of x in a tile: sums in halves of words take a register for their product besides.
#[inline(always)]
pub(super) const fn tile_rows<V: Simd>() -> usize {
    match V::HALVES && !V::WIDE {
        true => 4,
        false => TILE_ROWS,
    }
}

/// Multiplies `rows` (1 to `tile_rows`) rows of x with the groups at `group`; `tile` says where the sums are and
/// what to ask for meanwhile.
/// # Safety
/// All of them point to what they describe, for `tile.inputs` inputs.
#[inline(always)]
pub(super) unsafe fn multiply_codes<V: Simd>(
    tile: Tile,
    rows: usize,
    (x, group): (Quantised, *const u8),
    finish: Finish,
) {
    V::apart(Product {
        tile,
        rows,
        x,
        group,
        finish,
    });
}

struct Product<'a> {
    tile: Tile,
    rows: usize,
    x: Quantised,
    group: *const u8,
    finish: Finish<'a>,
}

impl Body for Product<'_> {
    type Out = ();
    /// A group's integers and the sums so far stay in registers together: up to three rows of x times
    /// 64 columns, or six times 32. The tile that brings the weights from memory takes 64
    /// nevertheless: a first walk over half of every unit would wait for all of them.
    #[inline(always)]
    fn run<V: Simd>(self) {
        const { assert!(TILE_ROWS == 6) };
        // SAFETY: only `multiply_codes` makes a Product, under the same contract.
        unsafe {
            match (V::WIDE, self.rows) {
                (true, 4..) if self.tile.ahead.step > 0 => self.streaming::<V>(),
                (true, 1) => self.across::<V, 1, 4>(),
                (true, 2) => self.across::<V, 2, 4>(),
                (true, 3) => self.across::<V, 3, 4>(),
                (true, 4) => self.across::<V, 4, 2>(),
                (true, 5) => self.across::<V, 5, 2>(),
                (true, _) => self.across::<V, 6, 2>(),
                (false, 1) => self.across::<V, 1, 1>(),
                (false, 2) => self.across::<V, 2, 1>(),
                (false, 3) => self.across::<V, 3, 1>(),
                (false, 4) => self.across::<V, 4, 1>(),
                (false, 5) => self.across::<V, 5, 1>(),
                (false, _) => self.across::<V, 6, 1>(),
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn streaming<V: Simd>(&self) {
        // SAFETY: the caller's.
        unsafe {
            match self.rows {
                4 => self.across::<V, 4, 4>(),
                5 => self.across::<V, 5, 4>(),
                _ => self.across::<V, 6, 4>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn across<V: Simd, const MR: usize, const NV: usize>(&self) {
        let all = 0..self.tile.inputs.div_ceil(Q4_GROUP);
        // Where several walks bring the weights from memory they do so at an even pace, a slice after the other.
        let slice = match in_slices(MR, NV) && self.tile.ahead.step > 0 {
            true => SLICE_GROUPS,
            false => all.end.max(1),
        };
        for first in all.clone().step_by(slice) {
            let groups = first..(first + slice).min(all.end);
            for column in (0..self.tile.columns).step_by(NV * LANES) {
                // SAFETY: the caller's.
                unsafe { self.fixed::<V, MR, NV>(&groups, column) };
            }
        }
    }

    /// Some groups, the first ones or those after what was added just now.
    #[inline(always)]
    unsafe fn fixed<V: Simd, const MR: usize, const NV: usize>(
        &self,
        groups: &Range<usize>,
        column: usize,
    ) {
        let mut sums = [[V::splat(0.0); NV]; MR];
        let tile = Tile {
            sums: self.tile.sums.at(groups.start),
            ..self.tile
        };
        let finish = match groups.end * Q4_GROUP >= tile.inputs {
            true => self.finish,
            false => Finish::NOTHING,
        };
        // SAFETY: the caller's.
        unsafe {
            begin::<V, MR, NV>(&tile, column, &mut sums);
            for g in groups.clone() {
                let ints = self.integers::<V, MR, NV>(g, column);
                self.add::<V, MR, NV>(&mut sums, &ints, (g, column));
            }
            save::<V, MR, NV>(&tile, column, &sums, finish);
        }
    }

    /// Asks for what lies ahead of an eighth of a group: the first walk for all of it, narrow ones for a
    /// quarter each.
    #[inline(always)]
    fn ask<V: Simd, const MR: usize, const NV: usize>(
        &self,
        (g, octet): (usize, usize),
        column: usize,
    ) {
        const EIGHTH_LINES: usize = GROUP_BYTES / 64 / (Q4_GROUP / UNIT_INPUTS) + 1;
        const SHARE_BYTES: usize = GROUP_BYTES / (Q4_GROUP / UNIT_INPUTS) / UNITS_ACROSS;
        let shared = in_slices(MR, NV);
        if self.tile.ahead.step == 0 || (column > 0 && !shared) {
            return;
        }
        let (at, lines) = match shared {
            true => {
                let share = column / LANES * (Q4_GROUP / UNIT_INPUTS) + octet;
                (share * SHARE_BYTES, SHARE_BYTES.div_ceil(64))
            }
            false => (octet * EIGHTH_LINES * 64, EIGHTH_LINES),
        };
        for line in 0..lines {
            let ahead = g * GROUP_BYTES + at + line * 64;
            V::prefetch(self.tile.ahead.from.wrapping_add(ahead));
        }
    }

    /// The integer sums of one group.
    #[allow(clippy::needless_range_loop)] // plain indices keep every sum in its register
    #[inline(always)]
    unsafe fn integers<V: Simd, const MR: usize, const NV: usize>(
        &self,
        g: usize,
        column: usize,
    ) -> [[V::I; NV]; MR] {
        const UNITS: usize = Q4_GROUP / UNIT_INPUTS;
        let together = match V::HALVES {
            true => CODES_TOGETHER * 4 / UNIT_INPUTS,
            false => UNITS,
        };
        let mut ints = [[V::splat_word(0); NV]; MR];
        for first in (0..UNITS).step_by(together) {
            let mut sums = ints;
            for i in 0..MR {
                for j in 0..NV {
                    sums[i][j] = V::begin_codes(ints[i][j]);
                }
            }
            for octet in first..first + together {
                self.ask::<V, MR, NV>((g, octet), column);
                // SAFETY: the caller's.
                unsafe { self.eight_inputs::<V, MR, NV>(&mut sums, (g, octet), column) };
            }
            for i in 0..MR {
                for j in 0..NV {
                    ints[i][j] = V::code_sums(ints[i][j], sums[i][j]);
                }
            }
        }
        ints
    }

    /// Those of one unit of each vector of rows.
    #[allow(clippy::needless_range_loop)] // plain indices keep every sum in its register
    #[inline(always)]
    unsafe fn eight_inputs<V: Simd, const MR: usize, const NV: usize>(
        &self,
        sums: &mut [[V::I; NV]; MR],
        (g, octet): (usize, usize),
        column: usize,
    ) {
        // SAFETY: whole groups are stored, and x is filled up to whole groups.
        unsafe {
            let units = self.group.add(g * GROUP_BYTES + CODES_AT);
            let x = self.x.codes.add(g * Q4_GROUP);
            let mut words = [V::splat_word(0); NV];
            for (j, words) in words.iter_mut().enumerate() {
                let unit = octet * UNITS_ACROSS + column / LANES + j;
                *words = V::load_words(units.add(unit * UNIT_BYTES));
            }
            for half in 0..2 {
                let mut codes = words;
                for codes in codes.iter_mut() {
                    *codes = match half {
                        0 => V::low_nibbles(*codes),
                        _ => V::high_nibbles(*codes),
                    };
                }
                for i in 0..MR {
                    let four = x.add(i * self.x.stride + octet * UNIT_INPUTS + 4 * half);
                    let four = V::splat_word(u32::from_le(four.cast::<u32>().read_unaligned()));
                    for j in 0..NV {
                        sums[i][j] = V::dot_codes(sums[i][j], codes[j], four);
                    }
                }
            }
        }
    }

    /// sums += integers × (scale of weights × scale of x) + minimum × sum of x.
    #[allow(clippy::needless_range_loop)] // plain indices keep every sum in its register
    #[inline(always)]
    unsafe fn add<V: Simd, const MR: usize, const NV: usize>(
        &self,
        sums: &mut [[V::F; NV]; MR],
        ints: &[[V::I; NV]; MR],
        (g, column): (usize, usize),
    ) {
        // SAFETY: whole groups are stored, and every row of x has a scale for each.
        unsafe {
            let scales: *const u16 = self.group.add(g * GROUP_BYTES).cast();
            for j in 0..NV {
                let scale = V::load_f16(scales.add(column + j * LANES));
                let minimum = V::load_f16(scales.add(PANEL_ROWS + column + j * LANES));
                for i in 0..MR {
                    let [x_scale, x_sum] = *self.x.scales.add(i * self.x.groups + g);
                    let product = V::mul(V::from_ints(ints[i][j]), scale);
                    let sum = V::fma(product, V::splat(x_scale), sums[i][j]);
                    sums[i][j] = V::fma(minimum, V::splat(x_sum), sum);
                }
            }
        }
    }
}
