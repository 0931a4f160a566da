//! Products by a matrix unit: weights brought into its tiles' shape a chunk at a time, then sums of 32 × 32 or
//! 16 × 64 outputs over a chunk. The unit's words and its order of sums are matrix_unit.rs's; how a product
//! is cut among threads is gemm.rs's and cut.rs's.

use super::codes::Quantised;
use super::copies::{PAD, Rows};
use super::gemm::Part;
use super::matrix_unit::{CODES_TILE_BYTES, Pairs, STEP_INPUTS, STEP_WORDS, TILE, Unit};
use super::panel::{
    Bf16, CODES_AT, Element, F16, F32, GROUP_BYTES, Narrowed, Panel, Source, UNIT_BYTES,
    UNIT_INPUTS, UNITS_ACROSS, Weights,
};
use super::simd::{LANES, Simd, load_first, store_first};
use super::tile::Finish;
use crate::dtype::{Arithmetic, Dtype, PANEL_ROWS, Q4_GROUP};
use crate::machine::cpu::pool::SCRATCH_FLOATS;
use std::ops::Range;

/// Inputs of weights that are laid out at a time: 64 rows of them are 64 KiB, beside few rows of x 32, so that
/// they are read back from the first cache.
const CHUNK_INPUTS: usize = 512;
const FEW_CHUNK_INPUTS: usize = 256;
/// Rows of x of one part at most: what laying out the weights costs is shared by them.
pub(super) const MOST_ROWS: usize = 512;
/// From here on the unit is worth its tiles' shape where others give the same result.
pub(super) const CODES_ROWS: usize = 12;
/// How far ahead of their layout weights are asked for.
const AHEAD_BYTES: usize = 8192;

/// The scratch: a chunk of weights, sums of an unfinished region, x.
const WEIGHT_WORDS: usize = PANEL_ROWS * CHUNK_INPUTS / 2;
const SUM_WORDS: usize = 4 * TILE * TILE;
pub(super) const X_AT: usize = WEIGHT_WORDS + SUM_WORDS;
pub(super) const X_WORDS: usize = MOST_ROWS * (CHUNK_INPUTS / 2 + PAD);
const _: () = assert!(X_AT + X_WORDS <= SCRATCH_FLOATS);

/// Outputs of one job: where they are, how many of them exist, and what is applied to them.
#[derive(Clone, Copy)]
pub(super) struct Region<'a> {
    out: *mut f32,
    out_stride: usize,
    rows: usize,
    columns: usize,
    finish: Finish<'a>,
}

impl Region<'_> {
    /// Applies what is left to sums that lie `stride` words apart, and writes those that exist.
    /// # Safety
    /// The sums and the region's outputs are there.
    #[inline(always)]
    pub(super) unsafe fn write<V: Simd>(&self, sums: *const f32, stride: usize) {
        for i in 0..self.rows {
            for column in (0..self.columns).step_by(LANES) {
                let count = (self.columns - column).min(LANES);
                // SAFETY: only outputs that exist are touched; sums are whole vectors.
                unsafe {
                    let sum = load_first::<V>(sums.add(i * stride + column), count);
                    let value = self.finish.apply::<V>(sum, column, count);
                    store_first::<V>(self.out.add(i * self.out_stride + column), value, count);
                }
            }
        }
    }

    /// # Safety
    /// As above.
    #[inline(always)]
    pub(super) unsafe fn read<V: Simd>(&self, sums: *mut f32, stride: usize) {
        for i in 0..self.rows {
            for column in (0..self.columns).step_by(LANES) {
                // SAFETY: as above.
                unsafe {
                    let from = self.out.add(i * self.out_stride + column);
                    let sum = load_first::<V>(from, self.columns - column);
                    V::store(sums.add(i * stride + column), sum);
                }
            }
        }
    }

    /// Brings lines here that will be written.
    #[inline(always)]
    fn own<V: Simd>(&self) {
        for i in 0..self.rows {
            for column in (0..self.columns).step_by(LANES) {
                V::prefetch_to_write(self.out.wrapping_add(i * self.out_stride + column));
            }
        }
    }
}

/// So many inputs at a time.
#[inline(always)]
pub(super) fn pieces(inputs: Range<usize>, each: usize) -> impl Iterator<Item = Range<usize>> {
    let end = inputs.end;
    inputs
        .step_by(each)
        .map(move |from| from..(from + each).min(end))
}

/// Inputs of x that fit for so many rows (filled up to whole tiles), in words each: whole chunks.
#[inline(always)]
pub(super) fn depth(rows: usize, (words, inputs): (usize, usize)) -> usize {
    let room = X_WORDS / rows.next_multiple_of(TILE) - PAD;
    (room * inputs / words / CHUNK_INPUTS * CHUNK_INPUTS).max(CHUNK_INPUTS)
}

/// Lays out `inputs` inputs of a panel from the given one on as tiles of pairs.
/// # Safety
/// They are there, and so is room for whole steps of them.
#[inline(always)]
unsafe fn lay_pairs<V: Simd, E: Element>(weights: Weights, inputs: usize, to: *mut f32) {
    let pairs = inputs.div_ceil(2);
    let steps = inputs.div_ceil(STEP_INPUTS);
    // SAFETY: the caller's.
    unsafe {
        let stored = <Narrowed<E> as Panel>::at::<V, UNITS_ACROSS>(weights, 0, 0);
        let ahead = weights
            .panel
            .wrapping_add(E::bytes_of(weights.first_input) + AHEAD_BYTES);
        for pair in 0..pairs {
            for line in 0..2 * E::AHEAD {
                V::prefetch(ahead.wrapping_add(E::bytes_of(2 * pair) + 64 * line));
            }
            let words: [V::I; UNITS_ACROSS] =
                Source::<V, UNITS_ACROSS>::load_pairs(&stored, pair, 2 * pair + 1 < inputs);
            for (j, &words) in words.iter().enumerate() {
                V::store_words(to.add(j * steps * STEP_WORDS + pair * TILE).cast(), words);
            }
        }
        for pair in pairs..steps * STEP_INPUTS / 2 {
            for j in 0..UNITS_ACROSS {
                V::store(to.add(j * steps * STEP_WORDS + pair * TILE), V::splat(0.0));
            }
        }
    }
}

/// Lays out so many groups of codes as tiles: for each 16 columns beside each other one a group.
/// # Safety
/// As above.
#[inline(always)]
unsafe fn lay_codes<V: Simd>(from: *const u8, groups: usize, to: *mut u8) {
    const LINES: usize = GROUP_BYTES / 64 / (Q4_GROUP / UNIT_INPUTS) + 1;
    for g in 0..groups {
        for octet in 0..Q4_GROUP / UNIT_INPUTS {
            for line in 0..LINES {
                let at = g * GROUP_BYTES + (octet * LINES + line) * 64;
                V::prefetch(from.wrapping_add(AHEAD_BYTES + at));
            }
            for j in 0..UNITS_ACROSS {
                let unit = CODES_AT + (octet * UNITS_ACROSS + j) * UNIT_BYTES;
                // SAFETY: the caller's: 32 units a group, and a tile for each group and 16 columns.
                unsafe {
                    let words = V::load_words(from.add(g * GROUP_BYTES + unit));
                    let tile = to.add((j * groups + g) * CODES_TILE_BYTES + 2 * octet * 64);
                    V::store_words(tile.cast(), V::low_nibbles(words));
                    V::store_words(tile.add(64).cast(), V::high_nibbles(words));
                }
            }
        }
    }
}

impl Part<'_> {
    #[inline(always)]
    pub(super) fn run_unit<V: Simd>(mut self) {
        match (self.problem.arithmetic, self.problem.format) {
            (Arithmetic::Int8, _) => self.unit_codes::<V>(),
            (_, Dtype::F32) => self.pairs::<V, F32>(),
            (_, Dtype::F16) => self.pairs::<V, F16>(),
            (_, _) => self.pairs::<V, Bf16>(),
        }
    }

    #[inline(always)]
    fn pairs<V: Simd, E: Element>(&mut self) {
        match self.rows.len() {
            1 => self.few_pairs::<V, E, 1>(),
            2 => self.few_pairs::<V, E, 2>(),
            _ => self.unit_pairs::<V, E>(),
        }
    }

    #[inline(always)]
    fn unit_pairs<V: Simd, E: Element>(&mut self) {
        let rows = self.rows.len();
        V::Unit::open(rows);
        let chunk = if rows <= TILE {
            FEW_CHUNK_INPUTS
        } else {
            CHUNK_INPUTS
        };
        for block in pieces(0..self.problem.inputs, depth(rows, (1, 2))) {
            let x = self.block_of_x(&block);
            let x = x.pairs::<V>(&mut self.scratch[X_AT..X_AT + X_WORDS]);
            for panel in self.panels.clone() {
                for some in pieces(block.clone(), chunk) {
                    let stored = self.stored(panel, some.start);
                    // SAFETY: the panel holds these inputs, and the scratch a chunk of them.
                    unsafe { lay_pairs::<V, E>(stored, some.len(), stored.keep) };
                    let next = match some.end < block.end {
                        true => self.panel_at(panel, some.end),
                        false => self.next_block(panel, &block),
                    };
                    let x = Rows {
                        start: x.start.wrapping_add((some.start - block.start) / 2),
                        ..x
                    };
                    // Few rows are done before anything asked for is here.
                    let lines = if rows > TILE {
                        some.len() * E::AHEAD
                    } else {
                        0
                    };
                    let ahead = (next, lines);
                    self.pairs_of_panel::<V>(panel, &some, (x, stored.keep), ahead);
                }
            }
        }
        V::Unit::close();
    }

    /// All rows of the part times one chunk of a panel; meanwhile so many lines are asked for.
    #[inline(always)]
    fn pairs_of_panel<V: Simd>(
        &self,
        panel: usize,
        inputs: &Range<usize>,
        (x, weights): (Rows, *mut f32),
        (next, lines): (*const u8, usize),
    ) {
        let job = Pairs {
            x: x.start,
            x_stride: x.stride,
            weights,
            steps: inputs.len().div_ceil(STEP_INPUTS),
            rows: self.rows.len().min(TILE),
            out: std::ptr::null_mut(),
            out_stride: 0,
            fresh: inputs.start == 0,
        };
        let last = inputs.end == self.problem.inputs;
        let sums = weights.wrapping_add(WEIGHT_WORDS);
        let count = self.rows.len().div_ceil(2 * TILE);
        for t in 0..count {
            let row = 2 * TILE * t;
            for line in lines * t / count..lines * (t + 1) / count {
                V::prefetch(next.wrapping_add(64 * line));
            }
            let rows = (self.rows.len() - row).min(2 * TILE);
            let job = Pairs {
                x: job.x.wrapping_add(row * job.x_stride),
                ..job
            };
            // SAFETY: `check` compared every slice with the shape; x and the weights were laid out in
            // whole tiles.
            unsafe {
                if rows <= TILE {
                    let region = self.region(panel, 0, (row, rows), last);
                    multiply::<V, 4>(job, region, sums);
                    continue;
                }
                for half in 0..2 {
                    let region = self.region(panel, half, (row, rows), last);
                    let job = Pairs {
                        weights: job.weights.add(half * 2 * job.steps * STEP_WORDS),
                        rows: 2 * TILE,
                        ..job
                    };
                    multiply::<V, 2>(job, region, sums);
                }
            }
        }
    }

    /// The outputs of some rows (first, count) of the part and of a panel's columns, or from the given half
    /// of them on, at most 32 beside more than 16 rows.
    #[inline(always)]
    pub(super) fn region(
        &self,
        panel: usize,
        half: usize,
        (row, rows): (usize, usize),
        last: bool,
    ) -> Region<'_> {
        let from = PANEL_ROWS / 2 * half;
        let tile = self.tile(panel, self.rows.start + row, rows, 0..0);
        let most = if rows <= TILE { PANEL_ROWS } else { 2 * TILE };
        let finish = match last {
            true => self.finish_from(panel, from.min(tile.columns)),
            false => Finish::NOTHING,
        };
        Region {
            out: tile.out.wrapping_add(from),
            out_stride: tile.out_stride,
            rows,
            columns: tile.columns.saturating_sub(from).min(most),
            finish,
        }
    }

    #[inline(always)]
    fn unit_codes<V: Simd>(&mut self) {
        V::Unit::open(TILE);
        // A byte and its share of a scale and a sum.
        let depth = depth(self.rows.len(), (Q4_GROUP / 4 + 2, Q4_GROUP));
        for block in pieces(0..self.problem.inputs, depth) {
            let x = self.block_of_x(&block);
            let tall = self.rows.len().next_multiple_of(TILE);
            let scale_words = (tall * 2 * block.len().div_ceil(Q4_GROUP)).next_multiple_of(TILE);
            let room = &mut self.scratch[X_AT..X_AT + X_WORDS];
            let (scales, codes) = room.split_at_mut(scale_words);
            let x = x.codes::<V>(scales, codes);
            for panel in self.panels.clone() {
                for some in pieces(block.clone(), CHUNK_INPUTS) {
                    let stored = self.stored(panel, some.start);
                    let from = self.panel_at(panel, some.start);
                    let groups = some.len().div_ceil(Q4_GROUP);
                    // SAFETY: whole groups are stored, and the scratch holds a chunk of them.
                    unsafe { lay_codes::<V>(from, groups, stored.keep.cast()) };
                    let x = x.past_groups((some.start - block.start) / Q4_GROUP);
                    self.codes_of_panel::<V>(panel, &some, x, (stored.keep, from));
                }
            }
        }
        V::Unit::close();
    }

    #[inline(always)]
    fn codes_of_panel<V: Simd>(
        &self,
        panel: usize,
        inputs: &Range<usize>,
        x: Quantised,
        (tiles, groups): (*mut f32, *const u8),
    ) {
        let last = inputs.end == self.problem.inputs;
        let count = inputs.len().div_ceil(Q4_GROUP);
        for row in (0..self.rows.len()).step_by(TILE) {
            let rows = (self.rows.len() - row).min(TILE);
            let region = self.region(panel, 0, (row, rows), last);
            region.own::<V>();
            for column in (0..region.columns).step_by(TILE) {
                let job = Codes {
                    x: x.beyond(row),
                    tiles: (tiles.cast::<u8>()).wrapping_add(column * count * Q4_GROUP),
                    groups,
                    count,
                    ints: tiles.wrapping_add(WEIGHT_WORDS).cast(),
                    fresh: inputs.start == 0,
                };
                // SAFETY: as for pairs; whole groups are stored.
                unsafe { multiply_codes::<V>(job, region, column) };
            }
        }
    }
}

/// Multiplies into a region of 16 × ACROSS columns at most; what is not whole goes through `sums`.
/// # Safety
/// All that both point to is there, and 1024 sums.
#[inline(always)]
unsafe fn multiply<V: Simd, const ACROSS: usize>(job: Pairs, region: Region, sums: *mut f32) {
    if region.columns == 0 {
        return;
    }
    let wide = ACROSS * TILE;
    let whole = region.columns == wide && region.rows == job.rows;
    let (out, out_stride) = match whole {
        true => (region.out, region.out_stride),
        false => (sums, wide),
    };
    let job = Pairs {
        out,
        out_stride,
        ..job
    };
    // SAFETY: the caller's.
    unsafe {
        if !whole && !job.fresh {
            region.read::<V>(sums, wide);
        }
        region.own::<V>();
        match ACROSS {
            2 => V::Unit::two_by_two(job),
            _ => V::Unit::one_by_four(job),
        }
        if !whole || !region.finish.is_nothing() {
            region.write::<V>(out, out_stride);
        }
    }
}

/// 16 rows of codes times 16 columns over some groups.
struct Codes {
    x: Quantised,
    /// A tile a group.
    tiles: *const u8,
    /// The panel's groups, for their scales and minima.
    groups: *const u8,
    count: usize,
    /// Room for four tiles of sums.
    ints: *mut u32,
    fresh: bool,
}

/// The sums of groups are added in f32, one after the other, as codes.rs does.
/// # Safety
/// All of it is there; x has whole tiles of rows.
#[allow(clippy::needless_range_loop)] // plain indices keep every sum in its register
#[inline(always)]
unsafe fn multiply_codes<V: Simd>(job: Codes, region: Region, column: usize) {
    let columns = (region.columns - column).min(TILE);
    let out = region.out.wrapping_add(column);
    let mut sums = [V::splat(0.0); TILE];
    // SAFETY: the caller's; only outputs that exist are touched.
    unsafe {
        if !job.fresh {
            for i in 0..TILE {
                if i < region.rows {
                    sums[i] = load_first::<V>(out.add(i * region.out_stride), columns);
                }
            }
        }
        for g in 0..job.count {
            let x = (job.x.codes.add(g * Q4_GROUP), job.x.stride);
            let tile = job.tiles.add(g * CODES_TILE_BYTES);
            // A tile's way through memory takes long; four go it together.
            let mut ints = job.ints;
            if g < job.count / 4 * 4 {
                if g % 4 == 0 {
                    V::Unit::four_codes(x, tile, ints);
                }
                ints = ints.add(g % 4 * TILE * TILE);
            } else {
                V::Unit::codes(x, tile, ints);
            }
            let scales: *const u16 = job.groups.add(g * GROUP_BYTES).cast();
            let scale = V::load_f16(scales.add(column));
            let minimum = V::load_f16(scales.add(PANEL_ROWS + column));
            for i in 0..TILE {
                let [x_scale, x_sum] = *job.x.scales.add(i * job.x.groups + g);
                let products = V::from_ints(V::load_words(ints.add(i * TILE).cast()));
                let sum = V::fma(V::mul(products, scale), V::splat(x_scale), sums[i]);
                sums[i] = V::fma(minimum, V::splat(x_sum), sum);
            }
        }
        for i in 0..TILE {
            if i < region.rows {
                let value = region.finish.apply::<V>(sums[i], column, columns);
                store_first::<V>(out.add(i * region.out_stride), value, columns);
            }
        }
    }
}
