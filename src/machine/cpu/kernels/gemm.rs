//! Matrix products with packed weights: how the work is cut and blocked. The inner loop is tile.rs.

use super::codes::{Scale, multiply_codes, tile_rows};
use super::copies::{BlockOfX, PAD, Rows};
use super::cut::{BLOCK_ROWS, Cut, Grain};
use super::isa::Isa;
use super::matrix_products::CODES_ROWS;
use super::panel::{Bf16, Element, F16, F32, Kept, Narrowed, Pairs, Panel, Q4, Weights, Widened};
use super::shared::Shared;
use super::simd::{Body, Simd};
use super::tile::{Ahead, Finish, Sums, TALL_ROWS, TILE_ROWS, Tile, multiply};
use crate::dtype::{Arithmetic, Dtype, PANEL_ROWS, Q4_GROUP, panels};
use crate::machine::cpu::pool::Pool;
use std::ops::Range;

pub use super::tile::Activation;

/// Inputs of one block in f32: 64 rows of weights of it are 128 KiB, 240 of x 480 KiB, at home in an L2 of
/// 1 MiB. Half of that costs 2 %: sums are put down and taken up twice as often. A multiple of the 4-bit group.
const BLOCK_INPUTS: usize = 512;
/// With narrow registers, whose tiles walk over a block four times: what lies in an L2 of 512 KiB beside neighbours.
const NARROW_INPUTS: usize = BLOCK_INPUTS / 2;
/// Inputs of one block in bf16, for which the same holds.
const PAIR_INPUTS: usize = 2 * BLOCK_INPUTS;
/// Words of a block of weights at the beginning of the scratch; behind it lies x.
const BLOCK_WORDS: usize = PANEL_ROWS * BLOCK_INPUTS;
/// Bytes of x of one block.
const X_BYTES: usize = 4 * BLOCK_ROWS * (BLOCK_INPUTS + PAD);
/// Bytes of x as codes of one block.
const CODES_BYTES: usize = X_BYTES / 2;
/// Up to here every tile converts the weights itself: cheaper than writing them out once. With narrow registers,
/// whose tiles are low and walk over a panel four times, up to two tiles, where conversion is cheap.
const DIRECT_ROWS: usize = 2 * TALL_ROWS;
const NARROW_DIRECT_ROWS: usize = 2 * TILE_ROWS;
/// How far ahead of the products a stream of weights is asked for, and one of 4-bit weights, whose products
/// take less time for as many bytes.
const AHEAD_BYTES: usize = 4096;
const CODES_AHEAD_BYTES: usize = 6 * 1024;
/// With narrow registers, which ask for it at the pace of several walks.
const NARROW_AHEAD_BYTES: usize = 2 * AHEAD_BYTES;

const _: () = assert!(
    4 * BLOCK_WORDS + X_BYTES <= 4 * crate::machine::cpu::pool::SCRATCH_FLOATS
        && CODES_BYTES / Q4_GROUP * size_of::<Scale>() <= 4 * BLOCK_WORDS
);

/// out[i, n] = activation(sum over k of x[i, k] * w[n, k] + bias[n]); strides count f32.
pub struct GemmArgs<'a> {
    pub x: &'a [f32],
    pub ldx: usize,
    pub m: usize,
    pub inputs: usize,
    /// ceil(rows / 64) panels.
    pub weights: &'a [u8],
    pub format: Dtype,
    /// Int8 is for Q4 alone, and Bf16 for all others.
    pub arithmetic: Arithmetic,
    pub rows: usize,
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
    pub out: &'a mut [f32],
    pub ldo: usize,
}

/// # Panics
/// When a slice is shorter than the shape says.
pub fn gemm(pool: &Pool, isa: Isa, args: GemmArgs) {
    if args.m == 0 || args.rows == 0 {
        return;
    }
    check(&args);
    let copies = args.m > 1 || args.arithmetic != Arithmetic::Fp32;
    let unit = isa.has_unit() && goes_to_unit(&args);
    let grain = if unit {
        Grain::MATRIX_UNIT
    } else {
        Grain::REGISTERS
    };
    let cut = Cut::new(args.m, panels(args.rows), pool.threads(), (copies, grain));
    let out = Shared::new(args.out);
    let problem = Problem {
        x: args.x,
        ldx: args.ldx,
        inputs: args.inputs,
        weights: args.weights,
        format: args.format,
        arithmetic: args.arithmetic,
        unit,
        rows: args.rows,
        bias: args.bias,
        activation: args.activation,
        out: &out,
        ldo: args.ldo,
    };
    pool.run_with_scratch(cut.parts(), &|part, scratch| {
        let (rows, panels) = cut.part(part);
        isa.call(Part {
            problem: &problem,
            rows,
            panels,
            scratch,
        });
    });
}

/// Whether a matrix unit multiplies, where there is one: bf16 in its own order for any number of rows, codes
/// where it is quicker.
fn goes_to_unit(args: &GemmArgs) -> bool {
    match args.arithmetic {
        Arithmetic::Fp32 => false,
        Arithmetic::Bf16 => true,
        Arithmetic::Int8 => args.m >= CODES_ROWS,
    }
}

fn check(args: &GemmArgs) {
    let last = args.m - 1;
    assert!(
        args.x.len() >= last * args.ldx + args.inputs,
        "gemm: x is too short"
    );
    assert!(
        args.out.len() >= last * args.ldo + args.rows,
        "gemm: out is too short"
    );
    assert!(
        args.m == 1 || args.ldo >= args.rows,
        "gemm: rows of out overlap"
    );
    let fits = match args.arithmetic {
        Arithmetic::Fp32 => true,
        Arithmetic::Bf16 => args.format != Dtype::Q4,
        Arithmetic::Int8 => args.format == Dtype::Q4,
    };
    assert!(fits, "gemm: this format has no such products");
    let needed_bytes = panels(args.rows) as u64 * args.format.panel_bytes(args.inputs);
    assert!(
        args.weights.len() as u64 >= needed_bytes,
        "gemm: weights are too short"
    );
    assert!(
        args.bias.is_none_or(|bias| bias.len() >= args.rows),
        "gemm: bias is too short"
    );
}

pub(super) struct Problem<'a> {
    x: &'a [f32],
    ldx: usize,
    pub(super) inputs: usize,
    weights: &'a [u8],
    pub(super) format: Dtype,
    pub(super) arithmetic: Arithmetic,
    unit: bool,
    rows: usize,
    bias: Option<&'a [f32]>,
    activation: Activation,
    out: &'a Shared<'a, f32>,
    ldo: usize,
}

/// What one part computes.
pub(super) struct Part<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
    pub(super) scratch: &'a mut [f32],
}

impl Body for Part<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        if self.problem.unit {
            return self.run_unit::<V>();
        }
        match (self.problem.arithmetic, self.problem.format) {
            (Arithmetic::Int8, _) => self.run_codes::<V>(),
            (Arithmetic::Bf16, Dtype::F32) => self.run_pairs::<V, F32>(),
            (Arithmetic::Bf16, Dtype::F16) => self.run_pairs::<V, F16>(),
            (Arithmetic::Bf16, _) => self.run_pairs::<V, Bf16>(),
            (_, Dtype::F32) => self.run_wide::<V, F32>(),
            (_, Dtype::F16) => self.run_wide::<V, F16>(),
            (_, Dtype::Bf16) => self.run_wide::<V, Bf16>(),
            (_, Dtype::Q4) => self.run_wide::<V, Q4>(),
        }
    }
}

/// Up to how many rows every tile converts weights of this format.
#[inline(always)]
fn direct_rows<V: Simd, P: Panel>() -> usize {
    match (V::WIDE, P::CHEAP) {
        (true, _) => DIRECT_ROWS,
        (false, true) => NARROW_DIRECT_ROWS,
        (false, false) => 0,
    }
}

/// Inputs of a block that fits for so few rows, in words: a multiple of the 4-bit group.
#[inline(always)]
fn deepest(rows: usize) -> usize {
    (X_BYTES / 4 / rows - PAD) / Q4_GROUP * Q4_GROUP
}

impl<'a> Part<'a> {
    /// In fp32.
    #[inline(always)]
    fn run_wide<V: Simd, P: Panel>(mut self) {
        let (inputs, rows) = (self.problem.inputs, self.rows.len());
        if rows == 1 {
            for panel in self.panels.clone() {
                self.fused::<V, P>(panel, 0..inputs, self.rows_of_x());
            }
            return;
        }
        let fused = rows <= TILE_ROWS;
        let block = match (fused, V::WIDE) {
            (true, _) => deepest(rows),
            (false, true) => BLOCK_INPUTS,
            (false, false) => NARROW_INPUTS,
        };
        for from in (0..inputs).step_by(block) {
            let some = from..(from + block).min(inputs);
            let x = self
                .block_of_x(&some)
                .copy::<V>(&mut self.scratch[BLOCK_WORDS..]);
            match fused {
                true => (self.panels.clone()).for_each(|p| self.fused::<V, P>(p, some.clone(), x)),
                false => self.block::<V, P>(some, x),
            }
        }
    }

    /// In bf16: x as pairs, and the weights either as they are loaded or, for many tiles, once.
    #[inline(always)]
    fn run_pairs<V: Simd, E: Element>(mut self) {
        let (inputs, rows) = (self.problem.inputs, self.rows.len());
        let fused = rows <= TILE_ROWS;
        let block = if fused {
            2 * deepest(rows)
        } else {
            PAIR_INPUTS
        };
        for from in (0..inputs).step_by(block) {
            let some = from..(from + block).min(inputs);
            let x = self
                .block_of_x(&some)
                .pairs::<V>(&mut self.scratch[BLOCK_WORDS..]);
            for panel in self.panels.clone() {
                if fused {
                    self.fused::<V, Narrowed<E>>(panel, some.clone(), x);
                    continue;
                }
                let lines = 2 * E::AHEAD;
                let stored = self.stored(panel, some.start);
                if V::WIDE && rows <= DIRECT_ROWS {
                    let tiles = (stored, x, TALL_ROWS);
                    self.tiles::<V, Narrowed<E>, Narrowed<E>>(panel, &some, lines, tiles);
                    continue;
                }
                let tiles = (stored, x, TILE_ROWS);
                self.tiles::<V, Kept<Narrowed<E>>, Pairs>(panel, &some, lines, tiles);
            }
        }
    }

    /// 4-bit weights, x as 8-bit codes.
    #[inline(always)]
    fn run_codes<V: Simd>(self) {
        let inputs = self.problem.inputs;
        let block = (CODES_BYTES / self.rows.len() - 3 * Q4_GROUP) / Q4_GROUP * Q4_GROUP;
        for from in (0..inputs).step_by(block) {
            let some = from..(from + block).min(inputs);
            let x = self.block_of_x(&some);
            let (scales, codes) = self.scratch.split_at_mut(BLOCK_WORDS);
            let x = x.codes::<V>(scales, codes);
            for panel in self.panels.clone() {
                let group = self.panel_at(panel, from);
                let count = self.rows.len().div_ceil(tile_rows::<V>());
                for t in 0..count {
                    let first = self.rows.len() * t / count;
                    let rows = self.rows.len() * (t + 1) / count - first;
                    let mut tile = self.tile(panel, self.rows.start + first, rows, some.clone());
                    tile.ahead.from = group.wrapping_add(CODES_AHEAD_BYTES);
                    tile.ahead.step = (t == 0) as usize;
                    let x = x.beyond(first);
                    let last = some.end == inputs;
                    let finish = if last {
                        self.finish(panel)
                    } else {
                        Finish::NOTHING
                    };
                    // SAFETY: `check` compared every slice with the shape; blocks begin with a group.
                    unsafe { multiply_codes::<V>(tile, rows, (x, group), finish) };
                }
            }
        }
    }

    /// One tile straight from the panel as stored: every weight is used once per pass.
    #[inline(always)]
    fn fused<V: Simd, P: Panel>(&self, panel: usize, inputs: Range<usize>, x: Rows) {
        let finish = match inputs.end == self.problem.inputs {
            true => self.finish(panel),
            false => Finish::NOTHING,
        };
        let at = self.panel_at(panel, 0);
        let weights = Weights {
            panel: at,
            first_input: inputs.start,
            keep: std::ptr::null_mut(),
        };
        let ahead = match V::WIDE || self.rows.len() == 1 {
            true => AHEAD_BYTES,
            false => NARROW_AHEAD_BYTES,
        };
        let tile = Tile {
            x: x.start,
            x_stride: x.stride,
            ahead: Ahead {
                from: at.wrapping_add(P::bytes_of(inputs.start) + ahead),
                step: P::bytes_of(Q4_GROUP) * if P::PAIRED { 2 } else { 1 } / Q4_GROUP,
            },
            ..self.tile(panel, self.rows.start, self.rows.len(), inputs)
        };
        // SAFETY: `check` compared every slice with the shape; the tile is inside it.
        unsafe { multiply::<V, P>(tile, self.rows.len(), weights, finish) };
    }

    /// One block of inputs for all panels and tiles of the part.
    #[inline(always)]
    fn block<V: Simd, P: Panel>(&mut self, inputs: Range<usize>, x: Rows) {
        for panel in self.panels.clone() {
            let stored = self.stored(panel, inputs.start);
            let tall = V::WIDE && (!P::WIDE || self.rows.len() <= TALL_ROWS);
            if self.rows.len() <= direct_rows::<V, P>() {
                let tiles = (stored, x, if tall { TALL_ROWS } else { TILE_ROWS });
                self.tiles::<V, P, P>(panel, &inputs, P::AHEAD, tiles);
            } else if P::WIDE {
                let tiles = (stored, x, TILE_ROWS);
                self.tiles::<V, Widened, Widened>(panel, &inputs, P::AHEAD, tiles);
            } else {
                let tiles = (stored, x, TILE_ROWS);
                self.tiles::<V, Kept<P>, Widened>(panel, &inputs, P::AHEAD, tiles);
            }
        }
    }

    /// All tiles of one block, of at most so many rows, which between them ask for the next block's
    /// `lines` per step. The first reads the weights as F, the others as P: where F keeps them.
    #[inline(always)]
    fn tiles<V: Simd, F: Panel, P: Panel>(
        &self,
        panel: usize,
        inputs: &Range<usize>,
        lines: usize,
        (stored, x, most_rows): (Weights, Rows, usize),
    ) {
        const { assert!(F::AHEAD == P::AHEAD) };
        let last = inputs.end == self.problem.inputs;
        let finish = if last {
            self.finish(panel)
        } else {
            Finish::NOTHING
        };
        let count = self.rows.len().div_ceil(most_rows);
        let steps = inputs.len() / if P::PAIRED { 2 } else { 1 };
        let kept = Weights {
            panel: stored.keep.cast(),
            first_input: 0,
            ..stored
        };
        for t in 0..count {
            let from = self.rows.len() * t / count;
            let rows = self.rows.len() * (t + 1) / count - from;
            let mut tile = self.tile(panel, self.rows.start + from, rows, inputs.clone());
            tile.x = x.start.wrapping_add(from * x.stride);
            tile.x_stride = x.stride;
            tile.ahead = if t * P::AHEAD < lines {
                let next = self.next_block(panel, inputs);
                Ahead {
                    from: next.wrapping_add(t * P::AHEAD * steps * 64),
                    step: P::AHEAD * 64,
                }
            } else {
                let visit = (panel - self.panels.start) * count + t;
                self.next_x(visit, inputs, 4 * inputs.len() / steps)
            };
            // SAFETY: `check` compared every slice with the shape; the tile is inside it, and the
            // weights are the panel's or this block of it in scratch, which has room for it.
            unsafe {
                match t {
                    0 => multiply::<V, F>(tile, rows, stored, finish),
                    _ => multiply::<V, P>(tile, rows, if F::KEEPS { kept } else { stored }, finish),
                }
            }
        }
    }

    /// The weights of a panel from an input on, with the scratch to keep a block of them.
    #[inline(always)]
    pub(super) fn stored(&mut self, panel: usize, first_input: usize) -> Weights {
        Weights {
            panel: self.panel_at(panel, 0),
            first_input,
            keep: self.scratch.as_mut_ptr(),
        }
    }

    /// The weights that this part needs next.
    #[inline(always)]
    pub(super) fn next_block(&self, panel: usize, inputs: &Range<usize>) -> *const u8 {
        if panel + 1 < self.panels.end {
            self.panel_at(panel + 1, inputs.start)
        } else {
            self.panel_at(self.panels.start, inputs.end)
        }
    }

    /// One of the rows of x of the next block, `step` bytes of it at a time.
    #[inline(always)]
    fn next_x(&self, visit: usize, inputs: &Range<usize>, step: usize) -> Ahead {
        let row = self.rows.start + visit % self.rows.len();
        let from = (self.problem.x.as_ptr()).wrapping_add(row * self.problem.ldx + inputs.end);
        Ahead {
            from: from.cast(),
            step: if inputs.end < self.problem.inputs {
                step
            } else {
                0
            },
        }
    }

    /// Where panel `panel` keeps input `k` (for 4-bit: its group). Past the end it is only a hint.
    #[inline(always)]
    pub(super) fn panel_at(&self, panel: usize, k: usize) -> *const u8 {
        let format = self.problem.format;
        let bytes = panel as u64 * format.panel_bytes(self.problem.inputs) + format.panel_bytes(k);
        self.problem.weights.as_ptr().wrapping_add(bytes as usize)
    }

    /// x as the caller has it.
    #[inline(always)]
    fn rows_of_x(&self) -> Rows {
        Rows {
            start: self.problem.x[self.rows.start * self.problem.ldx..].as_ptr(),
            stride: self.problem.ldx,
        }
    }

    #[inline(always)]
    pub(super) fn block_of_x(&self, inputs: &Range<usize>) -> BlockOfX<'a> {
        BlockOfX {
            x: self.problem.x,
            ldx: self.problem.ldx,
            rows: (self.rows.start, self.rows.len()),
            inputs: (inputs.start, inputs.len()),
        }
    }

    #[inline(always)]
    pub(super) fn tile(&self, panel: usize, row: usize, rows: usize, inputs: Range<usize>) -> Tile {
        let p = self.problem;
        let column = panel * PANEL_ROWS;
        let columns = (p.rows - column).min(PANEL_ROWS);
        let from = row * p.ldo + column;
        Tile {
            x: p.x[row * p.ldx + inputs.start..].as_ptr(),
            x_stride: p.ldx,
            x_step: 1,
            // SAFETY: parts differ in rows or panels, so no other part touches these columns.
            out: unsafe { p.out.start_of(from, (rows - 1) * p.ldo + columns) },
            out_stride: p.ldo,
            columns,
            inputs: inputs.len(),
            sums: Sums::of(inputs.start),
            ahead: Ahead::nothing(p.x.as_ptr()),
        }
    }

    #[inline(always)]
    fn finish(&self, panel: usize) -> Finish<'_> {
        self.finish_from(panel, 0)
    }

    /// Of a panel's columns from the given one on.
    #[inline(always)]
    pub(super) fn finish_from(&self, panel: usize, column: usize) -> Finish<'_> {
        let from = panel * PANEL_ROWS + column;
        Finish {
            bias: self.problem.bias.map(|bias| &bias[from..]),
            activation: self.problem.activation,
        }
    }
}
