//! How a matrix product is cut into parts for the threads: rows of x and panels of weights. It decides
//! speed only, never a result.

use super::tile::TILE_ROWS;
use std::ops::Range;

/// Rows of x of one block: 240 KiB beside the weights in L2.
pub(super) const BLOCK_ROWS: usize = 240;
/// From here on parts are cut along the rows of x, too.
const CUT_ROWS: usize = 24;
/// Panels that one part multiplies with one copy of x, at most.
const PART_PANELS: usize = 16;

/// How rows of x and panels are cut into parts. It decides speed only.
pub(super) struct Cut {
    m: usize,
    part_rows: usize,
    panels: usize,
    part_panels: usize,
}

impl Cut {
    /// `copies`: a part brings its rows of x into another shape, which should serve several panels.
    pub(super) fn new(m: usize, panels: usize, threads: usize, copies: bool) -> Cut {
        if m <= CUT_ROWS {
            let some = (panels / (4 * threads)).clamp(1, PART_PANELS);
            return Cut {
                m,
                part_rows: m,
                panels,
                part_panels: if copies { some } else { 1 },
            };
        }
        let wanted = (2 * threads)
            .div_ceil(panels)
            .min(m / CUT_ROWS)
            .max(m.div_ceil(BLOCK_ROWS));
        let part_rows = m.div_ceil(wanted).next_multiple_of(TILE_ROWS);
        let row_parts = m.div_ceil(part_rows);
        let part_panels = (panels * row_parts / (2 * threads)).clamp(1, PART_PANELS);
        Cut {
            m,
            part_rows,
            panels,
            part_panels,
        }
    }

    pub(super) fn parts(&self) -> usize {
        self.m.div_ceil(self.part_rows) * self.panels.div_ceil(self.part_panels)
    }

    pub(super) fn part(&self, part: usize) -> (Range<usize>, Range<usize>) {
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
