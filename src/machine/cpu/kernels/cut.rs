//! How a matrix product is cut into parts for the threads: rows of x and panels of weights. It decides
//! speed only, never a result.

use super::matrix_products;
use super::tile::TILE_ROWS;
use std::ops::Range;

/// Rows of x of one block: 240 KiB beside the weights in L2.
pub(super) const BLOCK_ROWS: usize = 240;
/// Panels that one part multiplies with one copy of x, at most.
const PART_PANELS: usize = 16;
/// Panels are cut alone, up to so many rows.
const UNCUT_ROWS: usize = 24;
/// How much of one part the threads end apart, on average: neighbours and interrupts hold single ones up.
const UNEVEN_END: f64 = 0.125;

/// What a part may be and what it costs, by who multiplies.
#[derive(Clone, Copy)]
pub(super) struct Grain {
    most_rows: usize,
    tile_rows: usize,
    /// Fewer rows are not cut off.
    least_rows: usize,
    /// What copying its rows of x costs a part, in panels.
    copy_panels: f64,
    /// What converting the weights of a panel costs a part, in rows.
    widen_rows: f64,
}

impl Grain {
    pub(super) const REGISTERS: Grain = Grain {
        most_rows: BLOCK_ROWS,
        tile_rows: TILE_ROWS,
        least_rows: UNCUT_ROWS,
        copy_panels: 0.7,
        widen_rows: 3.0,
    };
    pub(super) const MATRIX_UNIT: Grain = Grain {
        most_rows: matrix_products::MOST_ROWS,
        tile_rows: 32,
        least_rows: 64,
        copy_panels: 1.5,
        widen_rows: 80.0,
    };
}

/// How rows of x and panels are cut into parts. It decides speed only.
pub(super) struct Cut {
    m: usize,
    part_rows: usize,
    panels: usize,
    part_panels: usize,
    grain: Grain,
}

impl Cut {
    /// `copies`: a part brings its rows of x into another shape, which should serve several panels.
    pub(super) fn new(
        m: usize,
        panels: usize,
        threads: usize,
        (copies, grain): (bool, Grain),
    ) -> Cut {
        if m <= UNCUT_ROWS {
            let some = (panels / (4 * threads)).clamp(1, PART_PANELS);
            return Cut {
                m,
                part_rows: m,
                panels,
                part_panels: if copies { some } else { 1 },
                grain,
            };
        }
        Cut::quickest(m, panels, threads, grain)
    }

    /// Of the ways to cut both rows and panels, the one whose busiest thread has least to do.
    fn quickest(m: usize, panels: usize, threads: usize, grain: Grain) -> Cut {
        let (least_down, least_across) =
            (m.div_ceil(grain.most_rows), panels.div_ceil(PART_PANELS));
        let most_down = (least_down + 2 * threads)
            .min(m / grain.least_rows)
            .max(least_down);
        let most_across = (least_across + 2 * threads).min(panels);
        let ways = (least_down..=most_down)
            .flat_map(|down| (least_across..=most_across).map(move |across| (down, across)));
        let cut = |(down, across): (usize, usize)| Cut {
            m,
            part_rows: m.div_ceil(down).next_multiple_of(grain.tile_rows),
            panels,
            part_panels: panels.div_ceil(across),
            grain,
        };
        ways.map(cut)
            .min_by(|a, b| a.span(threads).total_cmp(&b.span(threads)))
            .expect("there is one way at least")
    }

    /// What the busiest thread has to do, in rows times panels.
    fn span(&self, threads: usize) -> f64 {
        let (rows, panels) = (self.part_rows as f64, self.part_panels as f64);
        let part = rows * (panels + self.grain.copy_panels) + self.grain.widen_rows * panels;
        part * (self.parts().div_ceil(threads) as f64 + UNEVEN_END)
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

#[cfg(test)]
mod tests {
    use super::*;

    const GRAINS: [Grain; 2] = [Grain::REGISTERS, Grain::MATRIX_UNIT];

    #[test]
    fn parts_cover_everything_once() {
        for (m, panels, threads) in [
            (25, 1, 1),
            (171, 12, 2),
            (512, 16, 2),
            (512, 48, 16),
            (1000, 785, 3),
        ] {
            for grain in GRAINS {
                let cut = Cut::new(m, panels, threads, (true, grain));
                let mut seen = vec![0; m * panels];
                for (rows, across) in (0..cut.parts()).map(|part| cut.part(part)) {
                    assert!(rows.len() <= grain.most_rows && across.len() <= PART_PANELS);
                    rows.for_each(|r| across.clone().for_each(|p| seen[r * panels + p] += 1));
                }
                let once = seen.iter().all(|&times| times == 1);
                assert!(once, "{m} {panels} {threads}");
            }
        }
    }

    #[test]
    fn threads_have_nearly_the_same_to_do() {
        for (m, panels, threads) in [
            (512, 16, 2),
            (512, 12, 2),
            (512, 48, 2),
            (442, 16, 2),
            (512, 64, 8),
        ] {
            for grain in GRAINS {
                let cut = Cut::new(m, panels, threads, (true, grain));
                let even = (m * panels) as f64 / threads as f64;
                let part = (cut.part_rows * cut.part_panels) as f64;
                let busiest = part * cut.parts().div_ceil(threads) as f64;
                assert!(busiest < 1.1 * even, "{m} {panels}: {busiest} of {even}");
            }
        }
    }
}
