//! Matrix products with packed weights: how the work is cut and blocked. The inner loop is tile.rs.

use super::panel::{self, Bf16, F16, F32, Panel, Q4};
use super::shared::Shared;
use super::simd::{Body, Isa, Simd};
use super::tile::{Finish, TILE_ROWS, Tile, Weights, multiply};
use crate::dtype::{Dtype, PANEL_ROWS, panels};
use crate::machine::cpu::pool::Pool;
use std::ops::Range;

pub use super::tile::Activation;

/// Inputs of one block: 64 rows of it in f32 are 64 KiB, at home in L2. A multiple of the 4-bit group.
const BLOCK_INPUTS: usize = 256;
/// Rows of x of one block: 240 KiB beside the weights in L2.
const BLOCK_ROWS: usize = 240;
/// Up to here every tile converts the weights itself: cheaper than writing them out once.
const DIRECT_ROWS: usize = 2 * TILE_ROWS;
/// From here on x is copied block by block, because rows a power of two apart share cache sets.
const COPY_ROWS: usize = 24;
/// Panels that one part multiplies with one copy of x, at most.
const PART_PANELS: usize = 16;
/// How far ahead of the products a stream of weights is asked for.
const AHEAD_BYTES: usize = 2048;

/// out[i, n] = activation(sum over k of x[i, k] * w[n, k] + bias[n]); strides count f32.
pub struct GemmArgs<'a> {
    pub x: &'a [f32],
    pub ldx: usize,
    pub m: usize,
    pub inputs: usize,
    /// ceil(rows / 64) panels.
    pub weights: &'a [u8],
    pub format: Dtype,
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
    let cut = Cut::new(args.m, panels(args.rows), pool.threads());
    let out = Shared::new(args.out);
    let problem = Problem {
        x: args.x,
        ldx: args.ldx,
        inputs: args.inputs,
        weights: args.weights,
        format: args.format,
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

/// How rows of x and panels are cut into parts. It decides speed only.
struct Cut {
    m: usize,
    part_rows: usize,
    panels: usize,
    part_panels: usize,
}

impl Cut {
    fn new(m: usize, panels: usize, threads: usize) -> Cut {
        if m <= COPY_ROWS {
            return Cut {
                m,
                part_rows: m,
                panels,
                part_panels: 1,
            };
        }
        let wanted = (2 * threads)
            .div_ceil(panels)
            .min(m / COPY_ROWS)
            .max(m.div_ceil(BLOCK_ROWS));
        let part_rows = m.div_ceil(wanted).next_multiple_of(TILE_ROWS);
        let row_parts = m.div_ceil(part_rows);
        let part_panels = (panels * row_parts / (3 * threads)).clamp(1, PART_PANELS);
        Cut {
            m,
            part_rows,
            panels,
            part_panels,
        }
    }

    fn parts(&self) -> usize {
        self.m.div_ceil(self.part_rows) * self.panels.div_ceil(self.part_panels)
    }

    fn part(&self, part: usize) -> (Range<usize>, Range<usize>) {
        let across = self.panels.div_ceil(self.part_panels);
        let (row, panel) = (
            part / across * self.part_rows,
            part % across * self.part_panels,
        );
        (
            row..(row + self.part_rows).min(self.m),
            panel..(panel + self.part_panels).min(self.panels),
        )
    }
}

struct Problem<'a> {
    x: &'a [f32],
    ldx: usize,
    inputs: usize,
    weights: &'a [u8],
    format: Dtype,
    rows: usize,
    bias: Option<&'a [f32]>,
    activation: Activation,
    out: &'a Shared<'a, f32>,
    ldo: usize,
}

/// What one part computes.
struct Part<'a> {
    problem: &'a Problem<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    scratch: &'a mut [f32],
}

impl Body for Part<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        match self.problem.format {
            Dtype::F32 => self.run_format::<V, F32>(),
            Dtype::F16 => self.run_format::<V, F16>(),
            Dtype::Bf16 => self.run_format::<V, Bf16>(),
            Dtype::Q4 => self.run_format::<V, Q4>(),
        }
    }
}

impl Part<'_> {
    #[inline(always)]
    fn run_format<V: Simd, P: Panel>(mut self) {
        let fused_rows = if V::WIDE { TILE_ROWS } else { 1 };
        if self.rows.len() <= fused_rows {
            for panel in self.panels.clone() {
                self.fused::<V, P>(panel);
            }
            return;
        }
        let inputs = self.problem.inputs;
        for from in (0..inputs).step_by(BLOCK_INPUTS) {
            self.block::<V, P>(from..(from + BLOCK_INPUTS).min(inputs));
        }
    }

    /// One tile straight from the panel as stored: every weight is used once per pass.
    #[inline(always)]
    fn fused<V: Simd, P: Panel>(&self, panel: usize) {
        let at = self.panel_at(panel, 0);
        let tile = Tile {
            ahead: at.wrapping_add(AHEAD_BYTES),
            ahead_lines: P::LINES,
            ..self.tile(
                panel,
                self.rows.start,
                self.rows.len(),
                0..self.problem.inputs,
            )
        };
        let weights = Weights {
            panel: at,
            first_input: 0,
        };
        // SAFETY: `check` compared every slice with the shape; the tile is inside it.
        unsafe { multiply::<V, P>(tile, self.rows.len(), weights, self.finish(panel)) };
    }

    /// One block of inputs for all panels and tiles of the part.
    #[inline(always)]
    fn block<V: Simd, P: Panel>(&mut self, inputs: Range<usize>) {
        let copied = self.rows.len() > COPY_ROWS;
        if copied {
            self.copy_x(&inputs);
        }
        for panel in self.panels.clone() {
            let at = self.panel_at(panel, 0);
            if P::WIDE || (P::SEGMENT > BLOCK_INPUTS && self.rows.len() <= DIRECT_ROWS) {
                let weights = Weights {
                    panel: at,
                    first_input: inputs.start,
                };
                self.tiles::<V, P>(panel, &inputs, weights, P::LINES);
                continue;
            }
            // Many tiles use these weights: widen them once.
            // SAFETY: the panel has these inputs; scratch begins with 64 × BLOCK_INPUTS.
            unsafe {
                panel::widen::<V, P>(at, inputs.start, inputs.len(), self.scratch.as_mut_ptr());
            }
            let weights = Weights {
                panel: self.scratch.as_ptr().cast(),
                first_input: 0,
            };
            self.tiles::<V, F32>(panel, &inputs, weights, P::LINES);
        }
    }

    /// All tiles of one block, which between them ask for the next block's `lines` per two inputs.
    #[inline(always)]
    fn tiles<V: Simd, P: Panel>(
        &self,
        panel: usize,
        inputs: &Range<usize>,
        weights: Weights,
        lines: usize,
    ) {
        let copied = self.rows.len() > COPY_ROWS;
        let last = inputs.end == self.problem.inputs;
        let finish = if last {
            self.finish(panel)
        } else {
            Finish::NOTHING
        };
        let count = self.rows.len().div_ceil(TILE_ROWS);
        let share = lines.div_ceil(count);
        for t in 0..count {
            let from = self.rows.len() * t / count;
            let rows = self.rows.len() * (t + 1) / count - from;
            let mut tile = self.tile(panel, self.rows.start + from, rows, inputs.clone());
            if copied {
                tile.x = self.scratch[PANEL_ROWS * BLOCK_INPUTS + from * BLOCK_INPUTS..].as_ptr();
                tile.x_stride = BLOCK_INPUTS;
            }
            let asked = t * share;
            tile.ahead_lines = share.min(lines.saturating_sub(asked));
            tile.ahead = self
                .next_block(panel, inputs)
                .wrapping_add(asked * inputs.len() / 2 * 64);
            // SAFETY: `check` compared every slice with the shape; the tile is inside it, and the
            // weights are the panel's or this block of it in scratch.
            unsafe { multiply::<V, P>(tile, rows, weights, finish) };
        }
    }

    /// The weights that this part needs next.
    #[inline(always)]
    fn next_block(&self, panel: usize, inputs: &Range<usize>) -> *const u8 {
        if panel + 1 < self.panels.end {
            self.panel_at(panel + 1, inputs.start)
        } else {
            self.panel_at(self.panels.start, inputs.end)
        }
    }

    /// Where panel `panel` keeps input `k` (for 4-bit: its group). Past the end it is only a hint.
    #[inline(always)]
    fn panel_at(&self, panel: usize, k: usize) -> *const u8 {
        let format = self.problem.format;
        let bytes = panel as u64 * format.panel_bytes(self.problem.inputs) + format.panel_bytes(k);
        self.problem.weights.as_ptr().wrapping_add(bytes as usize)
    }

    #[inline(always)]
    fn copy_x(&mut self, inputs: &Range<usize>) {
        let to = &mut self.scratch[PANEL_ROWS * BLOCK_INPUTS..];
        for (i, to) in self.rows.clone().zip(to.chunks_exact_mut(BLOCK_INPUTS)) {
            let from = i * self.problem.ldx + inputs.start;
            to[..inputs.len()].copy_from_slice(&self.problem.x[from..from + inputs.len()]);
        }
    }

    #[inline(always)]
    fn tile(&self, panel: usize, row: usize, rows: usize, inputs: Range<usize>) -> Tile {
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
            fresh: inputs.start == 0,
            ahead: std::ptr::null(),
            ahead_lines: 0,
        }
    }

    #[inline(always)]
    fn finish(&self, panel: usize) -> Finish<'_> {
        let from = panel * PANEL_ROWS;
        Finish {
            bias: self.problem.bias.map(|bias| &bias[from..]),
            activation: self.problem.activation,
        }
    }
}
