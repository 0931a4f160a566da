//! Random jobs and policies from a seed: what `accuracy` measures and `rivals` compares. The same seed
//! gives the same draws everywhere; whether a draw fits or takes too long is judged elsewhere.

use crate::engine::sampling::{Draw as Counter, unit_random};
use crate::planner::Fixed;

/// A stream of random numbers from (seed, what it is drawn for).
pub struct Draws {
    seed: u64,
    subject: u64,
    next: u64,
}

impl Draws {
    pub fn new(seed: u64, subject: u64) -> Draws {
        Draws {
            seed,
            subject,
            next: 0,
        }
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        self.next += 1;
        let counter = Counter {
            line: self.subject,
            position: self.next,
        };
        unit_random(self.seed, counter)
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.unit() * choices.len() as f64) as usize % choices.len()]
    }

    /// Whole numbers from `least` to `most`, their logarithms evenly spread.
    pub fn log_between(&mut self, least: u32, most: u32) -> u32 {
        let ratio = (f64::from(most) + 1.0) / f64::from(least);
        let drawn = f64::from(least) * ratio.powf(self.unit());
        (drawn as u32).clamp(least, most)
    }

    /// A percentage: all, nothing (with the given probabilities), or anything between in whole percent.
    fn percent(&mut self, all: f64, nothing: f64) -> f64 {
        let drawn = self.unit();
        let between = (self.unit() * 99.0).floor() + 1.0;
        match drawn {
            d if d < all => 100.0,
            d if d < all + nothing => 0.0,
            _ => between,
        }
    }
}

/// A job and the policy that it is to be run with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawnRow {
    pub prompts: usize,
    pub prompt_tokens: u32,
    pub gen_tokens: u32,
    pub fixed: Fixed,
}

/// Sequences of a batch and batches of a block that rows are drawn from.
const BATCH_SIZES: [usize; 9] = [1, 2, 4, 6, 8, 12, 16, 24, 32];
const BATCH_COUNTS: [usize; 6] = [1, 1, 1, 1, 2, 3];

/// One row: prompt 16–1024, generated 1–128, batch shape, shares over DRAM and disk, compression,
/// overlap.
pub fn drawn_row(draws: &mut Draws) -> DrawnRow {
    let (prompt_tokens, gen_tokens) = (draws.log_between(16, 1024), draws.log_between(1, 128));
    let (size, count) = (draws.one_of(&BATCH_SIZES), draws.one_of(&BATCH_COUNTS));
    let slots = size * count;
    // Sometimes more lines than slots: finished ones make room for others.
    let prompts = if draws.chance(0.2) {
        slots + slots.div_ceil(2)
    } else {
        slots
    };
    DrawnRow {
        prompts,
        prompt_tokens,
        gen_tokens,
        fixed: drawn_policy(draws, (size, count)),
    }
}

/// Shares, formats and overlap for a batch shape, without a GPU.
pub fn drawn_policy(draws: &mut Draws, (size, count): (usize, usize)) -> Fixed {
    let weights = draws.percent(0.35, 0.15);
    let cache = draws.percent(0.6, 0.15);
    let hidden = draws.percent(0.75, 0.1);
    Fixed {
        percent: Some([0.0, weights, 0.0, cache, 0.0, hidden]),
        gpu_batch_size: Some(size),
        num_gpu_batches: Some(count),
        compress_weight: Some(draws.chance(0.25)),
        compress_cache: Some(draws.chance(0.2)),
        overlap: Some(!draws.chance(0.2)),
        ..Fixed::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_and_another_another() {
        let rows = |seed| -> Vec<DrawnRow> {
            (0..20)
                .map(|n| drawn_row(&mut Draws::new(seed, n)))
                .collect()
        };
        assert_eq!(rows(7), rows(7));
        assert_ne!(rows(7), rows(8));
    }

    #[test]
    fn draws_cover_their_ranges() {
        let rows: Vec<DrawnRow> = (0..500).map(|n| drawn_row(&mut Draws::new(1, n))).collect();
        let percent = |r: &DrawnRow, at: usize| r.fixed.percent.map_or(0.0, |p| p[at]);
        for row in &rows {
            assert!((16..=1024).contains(&row.prompt_tokens), "{row:?}");
            assert!((1..=128).contains(&row.gen_tokens), "{row:?}");
            assert!((0.0..=100.0).contains(&percent(row, 1)), "{row:?}");
        }
        let some = |of: &dyn Fn(&DrawnRow) -> bool| {
            let count = rows.iter().filter(|r| of(r)).count();
            assert!(count > 20 && count < 480, "{count} of {}", rows.len());
        };
        some(&|r| r.prompt_tokens < 64);
        some(&|r| r.prompt_tokens > 512);
        some(&|r| r.gen_tokens < 4);
        some(&|r| percent(r, 1) == 100.0);
        some(&|r| percent(r, 1) == 0.0);
        some(&|r| percent(r, 3) < 100.0);
        some(&|r| percent(r, 5) < 100.0);
        some(&|r| r.fixed.overlap == Some(false));
        some(&|r| r.fixed.compress_weight == Some(true));
        some(&|r| r.fixed.num_gpu_batches != Some(1));
        some(&|r| {
            r.prompts > r.fixed.gpu_batch_size.unwrap_or(0) * r.fixed.num_gpu_batches.unwrap_or(0)
        });
    }
}
