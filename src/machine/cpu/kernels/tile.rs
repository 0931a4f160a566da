//! The register tile: up to six rows of x times 64 rows of a panel, or up to twelve times 32, sums kept
//! in registers over all inputs given. The only inner loop of products in GEMM and prefill attention.

use super::math::gelu;
use super::panel::{Panel, Source, Weights};
use super::simd::{Body, LANES, Simd, load_first, store_first};
use crate::dtype::PANEL_ROWS;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of x in a full tile: 6 × 4 sums leave registers for four weights and one broadcast.
pub(super) const TILE_ROWS: usize = 6;

/// Rows of x in a tall tile, which takes 32 rows of a panel at a time: each weight is brought into the
/// registers' format once for all of them.
pub(super) const TALL_ROWS: usize = 12;

/// What is applied to a finished sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    None,
    Relu,
    /// The exact form with erf.
    Gelu,
}

/// Where a tile reads x and keeps its sums. Strides count f32.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub x: *const f32,
    /// From one row of x to the next, and from one input (or pair of them) to the next.
    pub x_stride: usize,
    pub x_step: usize,
    pub out: *mut f32,
    pub out_stride: usize,
    /// Output columns that exist, at most 64.
    pub columns: usize,
    pub inputs: usize,
    pub sums: Sums,
    /// What to ask for meanwhile.
    pub ahead: Ahead,
}

/// Where a tile's sums begin.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sums {
    /// At zero.
    Fresh,
    /// At what `out` has held for a while: it has left the first caches.
    Away,
    /// At what `out` was given just now.
    AtHand,
}

impl Sums {
    /// Of the block of inputs that begins there.
    pub(super) fn of(first_input: usize) -> Sums {
        match first_input {
            0 => Sums::Fresh,
            _ => Sums::Away,
        }
    }

    /// Of a slice of that block, so many steps behind its beginning.
    #[inline(always)]
    pub(super) fn at(self, step: usize) -> Sums {
        match step {
            0 => self,
            _ => Sums::AtHand,
        }
    }
}

/// Memory to ask for while multiplying: at each step (one input, or a pair) the panel's AHEAD lines, `step`
/// bytes further on than at the one before. With a step of 0 the same lines again and again, which is
/// cheaper than a branch in the innermost loop: for one the compiler puts the sums aside.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub from: *const u8,
    pub step: usize,
}

impl Tile {
    /// The product of some of its inputs, those before it done just now.
    #[inline(always)]
    fn slice<P: Panel>(self, inputs: &Range<usize>) -> Tile {
        let steps = inputs.start / if P::PAIRED { 2 } else { 1 };
        let from = self.ahead.from.wrapping_add(steps * self.ahead.step);
        Tile {
            x: self.x.wrapping_add(steps * self.x_step),
            inputs: inputs.len(),
            sums: self.sums.at(steps),
            ahead: Ahead { from, ..self.ahead },
            ..self
        }
    }
}

impl Ahead {
    /// Nothing but a line that is at hand.
    #[inline(always)]
    pub(super) fn nothing(at_hand: *const f32) -> Ahead {
        Ahead {
            from: at_hand.cast(),
            step: 0,
        }
    }

    /// The share of one of several walks over the panel: memory is asked at an even pace.
    #[inline(always)]
    fn share(self, (walk, walks): (usize, usize), steps: usize) -> Ahead {
        let step = self.step / walks;
        Ahead {
            from: self.from.wrapping_add(walk * steps * step),
            step,
        }
    }

    /// Of as many walks as take so many vectors of columns each.
    #[inline(always)]
    fn ask<V: Simd, P: Panel, const NV: usize>(&self, step: usize) {
        for line in 0..P::AHEAD.div_ceil(PANEL_ROWS / (NV * LANES)) {
            V::prefetch(self.from.wrapping_add(step * self.step + line * 64));
        }
    }
}

/// The last step of an output: bias (of the tile's columns, may be absent) and activation.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
}

impl Finish<'_> {
    pub(super) const NOTHING: Finish<'static> = Finish {
        bias: None,
        activation: Activation::None,
    };

    #[inline(always)]
    pub(super) fn is_nothing(&self) -> bool {
        self.bias.is_none() && self.activation == Activation::None
    }

    #[inline(always)]
    pub(super) fn apply<V: Simd>(&self, sum: V::F, column: usize, count: usize) -> V::F {
        let mut value = sum;
        if let Some(bias) = self.bias {
            let bias = &bias[column..column + count];
            // SAFETY: the slice has `count` elements.
            value = V::add(value, unsafe { load_first::<V>(bias.as_ptr(), count) });
        }
        match self.activation {
            Activation::None => value,
            // In this order not a number stays so.
            Activation::Relu => V::max(V::splat(0.0), value),
            Activation::Gelu => gelu::<V>(value),
        }
    }
}

/// Multiplies `rows` (1 to 6, with wide registers to 12) rows of x.
/// # Safety
/// `tile` and `weights` point to what they describe; `first_input` is a multiple of P::SEGMENT or 0.
#[inline(always)]
pub(super) unsafe fn multiply<V: Simd, P: Panel>(
    tile: Tile,
    rows: usize,
    weights: Weights,
    finish: Finish,
) {
    V::apart(Product::<P> {
        tile,
        rows,
        weights,
        finish,
        format: PhantomData,
    });
}

/// A tile's product as a function of its own: there are many variants, and many who call them.
struct Product<'a, P> {
    tile: Tile,
    rows: usize,
    weights: Weights,
    finish: Finish<'a>,
    format: PhantomData<P>,
}

impl<P: Panel> Body for Product<'_, P> {
    type Out = ();
    /// Narrow register files take 16 columns at a time, wide ones 64 or what there is of them.
    #[inline(always)]
    fn run<V: Simd>(self) {
        let Product {
            tile,
            rows,
            weights,
            finish,
            ..
        } = self;
        // SAFETY: only `multiply` makes a Product, under the same contract.
        unsafe {
            if V::WIDE && rows > TILE_ROWS {
                let steps = tile.inputs / if P::PAIRED { 2 } else { 1 };
                for walk in 0..tile.columns.div_ceil(2 * LANES) {
                    let ahead = tile.ahead.share((walk, 2), steps);
                    tall::<V, P>(
                        Tile { ahead, ..tile },
                        rows,
                        weights,
                        walk * 2 * LANES,
                        finish,
                    );
                }
                return;
            }
            if V::WIDE {
                if P::WIDE && tile.columns <= LANES {
                    return by_rows::<V, P, 1>(tile, rows, weights, 0, finish);
                }
                if P::WIDE && tile.columns <= 2 * LANES {
                    return by_rows::<V, P, 2>(tile, rows, weights, 0, finish);
                }
                return by_rows::<V, P, 4>(tile, rows, weights, 0, finish);
            }
            if rows == 1 {
                return fixed::<V, P, 1, 4>(tile, weights, 0, finish);
            }
            narrow::<V, P>(tile, rows, weights, finish);
        }
    }
}

/// Sixteen registers hold the sums of 16 columns, of two rows those of 32: a panel is walked over several
/// times, a slice of inputs at a time that stays in the first cache meanwhile.
#[inline(always)]
unsafe fn narrow<V: Simd, P: Panel>(tile: Tile, rows: usize, weights: Weights, finish: Finish) {
    let across = if rows == 2 { 2 * LANES } else { LANES };
    for from in (0..tile.inputs).step_by(P::SLICE) {
        let some = from..(from.saturating_add(P::SLICE)).min(tile.inputs);
        let (slice, weights) = (tile.slice::<P>(&some), weights.beyond(from));
        let steps = some.len() / if P::PAIRED { 2 } else { 1 };
        let finish = match some.end == tile.inputs {
            true => finish,
            false => Finish::NOTHING,
        };
        for column in (0..tile.columns).step_by(across) {
            let walk = (column / across, PANEL_ROWS / across);
            let ahead = slice.ahead.share(walk, steps);
            let slice = Tile { ahead, ..slice };
            // SAFETY: the caller's; a slice is inside its tile.
            unsafe {
                match rows {
                    2 => fixed::<V, P, 2, 2>(slice, weights, column, finish),
                    _ => by_rows::<V, P, 1>(slice, rows, weights, column, finish),
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn by_rows<V: Simd, P: Panel, const NV: usize>(
    tile: Tile,
    rows: usize,
    weights: Weights,
    column: usize,
    finish: Finish,
) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            1 => fixed::<V, P, 1, NV>(tile, weights, column, finish),
            2 => fixed::<V, P, 2, NV>(tile, weights, column, finish),
            3 => fixed::<V, P, 3, NV>(tile, weights, column, finish),
            4 => fixed::<V, P, 4, NV>(tile, weights, column, finish),
            5 => fixed::<V, P, 5, NV>(tile, weights, column, finish),
            _ => fixed::<V, P, 6, NV>(tile, weights, column, finish),
        }
    }
}

#[inline(always)]
unsafe fn tall<V: Simd, P: Panel>(
    tile: Tile,
    rows: usize,
    weights: Weights,
    column: usize,
    finish: Finish,
) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            7 => fixed::<V, P, 7, 2>(tile, weights, column, finish),
            8 => fixed::<V, P, 8, 2>(tile, weights, column, finish),
            9 => fixed::<V, P, 9, 2>(tile, weights, column, finish),
            10 => fixed::<V, P, 10, 2>(tile, weights, column, finish),
            11 => fixed::<V, P, 11, 2>(tile, weights, column, finish),
            _ => fixed::<V, P, 12, 2>(tile, weights, column, finish),
        }
    }
}

#[inline(always)]
unsafe fn fixed<V: Simd, P: Panel, const MR: usize, const NV: usize>(
    tile: Tile,
    weights: Weights,
    column: usize,
    finish: Finish,
) {
    let mut sums = [[V::splat(0.0); NV]; MR];
    // SAFETY: the caller's.
    unsafe {
        begin::<V, MR, NV>(&tile, column, &mut sums);
        let mut done = 0;
        while done < tile.inputs {
            let some = P::SEGMENT.min(tile.inputs - done);
            let source = P::at::<V, NV>(weights, done, column);
            let rest = tile.slice::<P>(&(done..done + some));
            products::<V, P, MR, NV>(&mut sums, rest, &source);
            done += some;
        }
        save::<V, MR, NV>(&tile, column, &sums, finish);
    }
}

/// As many inputs at a time as the panel keeps together, and what is left one by one.
#[inline(always)]
unsafe fn products<V: Simd, P: Panel, const MR: usize, const NV: usize>(
    sums: &mut [[V::F; NV]; MR],
    tile: Tile,
    source: &P::At<V, NV>,
) {
    // SAFETY: k stays below the tile's inputs.
    unsafe {
        if P::PAIRED {
            for k in 0..tile.inputs / 2 {
                tile.ahead.ask::<V, P, NV>(k);
                pair::<V, _, MR, NV>(sums, &tile, source, (k, true));
            }
            if tile.inputs % 2 == 1 {
                pair::<V, _, MR, NV>(sums, &tile, source, (tile.inputs / 2, false));
            }
            return;
        }
        let whole = tile.inputs / P::STEP * P::STEP;
        for k in (0..whole).step_by(P::STEP) {
            for phase in 0..P::STEP {
                tile.ahead.ask::<V, P, NV>(k + phase);
                step::<V, _, MR, NV>(sums, &tile, source, (k + phase, phase));
            }
        }
        for k in whole..tile.inputs {
            step::<V, _, MR, NV>(sums, &tile, source, (k, k - whole));
        }
    }
}

/// Two inputs as bf16: x holds a pair in each word.
#[allow(clippy::needless_range_loop)] // plain indices keep every sum in its register
#[inline(always)]
unsafe fn pair<V: Simd, S: Source<V, NV>, const MR: usize, const NV: usize>(
    sums: &mut [[V::F; NV]; MR],
    tile: &Tile,
    source: &S,
    (pair, both): (usize, bool),
) {
    // SAFETY: the pair is inside by the caller.
    unsafe {
        let weights = source.load_pairs(pair, both);
        for i in 0..MR {
            let x = tile.x.add(i * tile.x_stride + pair * tile.x_step);
            let x = V::splat_word(x.cast::<u32>().read());
            for j in 0..NV {
                sums[i][j] = V::dot_pairs(sums[i][j], x, weights[j]);
            }
        }
    }
}

#[allow(clippy::needless_range_loop)] // plain indices keep every sum in its register
#[inline(always)]
unsafe fn step<V: Simd, S: Source<V, NV>, const MR: usize, const NV: usize>(
    sums: &mut [[V::F; NV]; MR],
    tile: &Tile,
    source: &S,
    (k, phase): (usize, usize),
) {
    // SAFETY: k is inside by the caller.
    unsafe {
        let weights = source.load(k, phase);
        for i in 0..MR {
            let x = V::splat(*tile.x.add(i * tile.x_stride + k * tile.x_step));
            for j in 0..NV {
                sums[i][j] = V::fma(x, weights[j], sums[i][j]);
            }
        }
    }
}

/// Columns of vector `j` that exist.
#[inline(always)]
fn width(tile: &Tile, column: usize, j: usize) -> usize {
    tile.columns.saturating_sub(column + j * LANES).min(LANES)
}

/// Sums as the tile says, and their lines on the way.
#[inline(always)]
pub(super) unsafe fn begin<V: Simd, const MR: usize, const NV: usize>(
    tile: &Tile,
    column: usize,
    sums: &mut [[V::F; NV]; MR],
) {
    match tile.sums {
        Sums::Fresh => return own_sums::<V, MR, NV>(tile, column),
        Sums::Away => ask_for_sums::<V, MR, NV>(tile, column),
        Sums::AtHand => {}
    }
    // SAFETY: the caller's.
    unsafe { reload::<V, MR, NV>(tile, column, sums) }
}

/// Asks for the sums of the tile below, which come next.
#[inline(always)]
fn ask_for_sums<V: Simd, const MR: usize, const NV: usize>(tile: &Tile, column: usize) {
    for i in MR..2 * MR {
        for j in 0..NV {
            let at = i * tile.out_stride + column + j * LANES;
            V::prefetch(tile.out.wrapping_add(at).cast());
        }
    }
}

/// Brings the lines of the sums here while they are being computed.
#[inline(always)]
fn own_sums<V: Simd, const MR: usize, const NV: usize>(tile: &Tile, column: usize) {
    for i in 0..MR {
        for j in 0..NV {
            let at = i * tile.out_stride + column + j * LANES;
            V::prefetch_to_write(tile.out.wrapping_add(at));
        }
    }
}

#[inline(always)]
unsafe fn reload<V: Simd, const MR: usize, const NV: usize>(
    tile: &Tile,
    column: usize,
    sums: &mut [[V::F; NV]; MR],
) {
    let whole = tile.columns >= column + NV * LANES;
    for (i, sums) in sums.iter_mut().enumerate() {
        for (j, sum) in sums.iter_mut().enumerate() {
            let at = i * tile.out_stride + column + j * LANES;
            if whole {
                // SAFETY: all columns exist.
                *sum = unsafe { V::load(tile.out.wrapping_add(at)) };
                continue;
            }
            // SAFETY: only columns that exist are read.
            *sum = unsafe { load_first::<V>(tile.out.wrapping_add(at), width(tile, column, j)) };
        }
    }
}

#[inline(always)]
pub(super) unsafe fn save<V: Simd, const MR: usize, const NV: usize>(
    tile: &Tile,
    column: usize,
    sums: &[[V::F; NV]; MR],
    finish: Finish,
) {
    debug_assert!(tile.columns <= PANEL_ROWS);
    if tile.columns >= column + NV * LANES && finish.is_nothing() {
        for (i, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                let at = i * tile.out_stride + column + j * LANES;
                // SAFETY: all columns exist.
                unsafe { V::store(tile.out.wrapping_add(at), sum) };
            }
        }
        return;
    }
    for j in 0..NV {
        let count = width(tile, column, j);
        if count == 0 {
            break;
        }
        for (i, sums) in sums.iter().enumerate() {
            let value = finish.apply::<V>(sums[j], column + j * LANES, count);
            let at = i * tile.out_stride + column + j * LANES;
            // SAFETY: only columns that exist are written.
            unsafe { store_first::<V>(tile.out.wrapping_add(at), value, count) };
        }
    }
}
