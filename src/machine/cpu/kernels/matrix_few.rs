//! Products of one or two rows in a matrix unit's order of sums, by vectors: the unit would hold up the weights,
//! which are all that such products wait for. Of more rows matrix_products.rs makes them.

use super::copies::Rows;
use super::gemm::Part;
use super::matrix_products::{X_AT, X_WORDS, depth, pieces};
use super::matrix_unit::{STEP_INPUTS, TILE};
use super::panel::{Element, Narrowed, Panel, Source, UNITS_ACROSS, Weights};
use super::simd::{LANES, Simd};
use crate::dtype::PANEL_ROWS;

/// How far ahead of the products weights are asked for.
const AHEAD_BYTES: usize = 4096;

impl Part<'_> {
    /// One or two rows, by vectors: the products of even inputs are those of pairs whose odd input is zero.
    #[inline(always)]
    pub(super) fn few_pairs<V: Simd, E: Element, const MR: usize>(&mut self) {
        let most = depth(MR, (1, 2));
        for block in pieces(0..self.problem.inputs, most) {
            let x = self.block_of_x(&block);
            let x = x.pairs::<V>(&mut self.scratch[X_AT..X_AT + X_WORDS]);
            for panel in self.panels.clone() {
                let stored = self.stored(panel, block.start);
                let last = block.end == self.problem.inputs;
                let region = self.region(panel, 0, (0, MR), last);
                let sums = stored.keep;
                // SAFETY: as for many rows; the scratch has room for the sums of a panel.
                unsafe {
                    if block.start > 0 {
                        region.read::<V>(sums, PANEL_ROWS);
                    } else {
                        (0..MR * UNITS_ACROSS)
                            .for_each(|j| sums.add(j * LANES).write_bytes(0, LANES));
                    }
                    add_pairs::<V, E, MR>(stored, x, block.len(), sums);
                    region.write::<V>(sums, PANEL_ROWS);
                }
            }
        }
    }
}

/// Adds the products of MR rows of x and `inputs` inputs of a panel to `sums`, rows of 64, as the unit does.
/// # Safety
/// All of it is there; x is filled up to whole steps.
#[allow(clippy::needless_range_loop)] // plain indices keep every sum in its register
#[inline(always)]
unsafe fn add_pairs<V: Simd, E: Element, const MR: usize>(
    weights: Weights,
    x: Rows,
    inputs: usize,
    sums: *mut f32,
) {
    const LOW: u32 = 0xffff;
    // SAFETY: the caller's.
    unsafe {
        let stored = <Narrowed<E> as Panel>::at::<V, UNITS_ACROSS>(weights, 0, 0);
        let first = E::bytes_of(weights.first_input);
        let ahead = weights.panel.wrapping_add(first + AHEAD_BYTES);
        for step in 0..inputs.div_ceil(STEP_INPUTS) {
            let mut even = [[V::splat(0.0); UNITS_ACROSS]; MR];
            let mut odd = even;
            for pair in step * TILE..((step + 1) * TILE).min(inputs.div_ceil(2)) {
                for line in 0..2 * E::AHEAD {
                    V::prefetch(ahead.wrapping_add(E::bytes_of(2 * pair) + 64 * line));
                }
                let words: [V::I; UNITS_ACROSS] =
                    Source::<V, UNITS_ACROSS>::load_pairs(&stored, pair, 2 * pair + 1 < inputs);
                for i in 0..MR {
                    let both = *x.start.add(i * x.stride + pair).cast::<u32>();
                    let (low, high) = (V::splat_word(both & LOW), V::splat_word(both & !LOW));
                    for j in 0..UNITS_ACROSS {
                        even[i][j] = V::dot_pairs(even[i][j], low, words[j]);
                        odd[i][j] = V::dot_pairs(odd[i][j], high, words[j]);
                    }
                }
            }
            for i in 0..MR {
                for j in 0..UNITS_ACROSS {
                    let at = sums.add(i * PANEL_ROWS + j * LANES);
                    let step = V::flush(V::add(even[i][j], odd[i][j]));
                    V::store(at, V::flush(V::add(V::load(at), step)));
                }
            }
        }
    }
}
