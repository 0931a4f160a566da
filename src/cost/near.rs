//! Products whose weights are still in the processor's last cache, because another batch met them a moment ago.
//! Which product that is, is known where operations follow each other (machine/price.rs, cost/layer.rs).

use crate::cost::curves::rate_at;
use crate::dtype::{Arithmetic, Dtype};
use crate::profile::CpuFacts;

/// Part of some bytes that is still in the cache when they are read again and again, by all that passes from one
/// time to the next ÷ the cache, where a profile does not say: seen of a cache of 32 MiB (docs/measurements.md,
/// "What a cache keeps").
const KEPT: [(f64, f64); 9] = [
    (0.5, 1.0),
    (0.625, 0.94),
    (0.75, 0.86),
    (0.875, 0.76),
    (1.0, 0.70),
    (1.25, 0.59),
    (1.5, 0.47),
    (3.0, 0.18),
    (6.0, 0.0),
];
/// From so many rows on arithmetic binds, and it matters no more where weights are.
const MANY_ROWS: f64 = 64.0;

/// What the cache holds, and what it brings.
#[derive(Clone, Debug)]
pub struct Near {
    bytes: f64,
    /// (what passes ÷ the cache, part that is kept), rising.
    keeps: Vec<(f64, f64)>,
    /// By arithmetic and format: (rows, part of the seconds that a product from DRAM takes), rising rows.
    parts: [[Vec<(f64, f64)>; 4]; 3],
}

impl Near {
    pub fn new(cpu: &CpuFacts) -> Near {
        let points = |arithmetic: Arithmetic, format: Dtype| {
            let table = cpu.gemm_cached.get(&arithmetic.table_name(format));
            let mut points: Vec<(f64, f64)> = table
                .into_iter()
                .flatten()
                .map(|&(rows, part)| (rows.max(1) as f64, part.min(1.0)))
                .filter(|point| point.0 < MANY_ROWS)
                .chain([(MANY_ROWS, 1.0)])
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        let ways = [Arithmetic::Fp32, Arithmetic::Bf16, Arithmetic::Int8];
        let mut keeps = match cpu.cache_keeps.as_slice() {
            [] => KEPT.to_vec(),
            measured => measured.to_vec(),
        };
        keeps.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Twice the most that was measured leaves nothing.
        keeps.extend(keeps.last().copied().map(|(passed, _)| (2.0 * passed, 0.0)));
        Near {
            bytes: cpu.cache_bytes as f64,
            keeps,
            parts: ways.map(|way| Dtype::ALL.map(|format| points(way, format))),
        }
    }

    /// The part of weights that is still there after so many bytes, their own among them.
    pub fn kept(&self, passed_bytes: f64) -> f64 {
        match self.bytes > 0.0 {
            true => rate_at(
                &self.keeps,
                (passed_bytes / self.bytes).max(self.keeps[0].0),
            ),
            false => 0.0,
        }
    }

    /// Part of its seconds that a product of `rows` rows takes: between measured rows linear in their logarithm, all
    /// of them from `MANY_ROWS` on and where nothing was measured.
    pub fn part(&self, (format, arithmetic): (Dtype, Arithmetic), rows: f64) -> f64 {
        let points = &self.parts[arithmetic as usize][format as usize];
        rate_at(points, rows.max(points[0].0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{HardwareProfile, compiled_in};

    #[test]
    fn a_part_is_taken_where_it_was_measured_and_all_of_it_elsewhere() {
        let text = compiled_in("t4-gcp").expect("a profile");
        let mut cpu = HardwareProfile::from_toml(text).expect("valid").cpu;
        let stored = (Dtype::Q4, Arithmetic::Int8);
        assert_eq!(Near::new(&cpu).part(stored, 1.0), 1.0, "not measured");
        assert_eq!(Near::new(&cpu).kept(1.0), 0.0, "no cache known");
        cpu.cache_bytes = 32 << 20;
        cpu.gemm_cached
            .insert("q4-int8".into(), vec![(4, 0.5), (1, 0.4), (16, 0.8)]);
        let near = Near::new(&cpu);
        for (passed_mib, kept) in [
            (0, 1.0),
            (16, 1.0),
            (24, 0.86),
            (32, 0.70),
            (192, 0.0),
            (999, 0.0),
        ] {
            let passed_bytes = (passed_mib << 20) as f64;
            assert!(
                (near.kept(passed_bytes) - kept).abs() < 1e-12,
                "{passed_mib}"
            );
        }
        cpu.cache_keeps = vec![(2.0, 0.1), (1.0, 0.5), (0.5, 0.9)];
        let measured = Near::new(&cpu);
        for (passed_mib, kept) in [(1, 0.9), (32, 0.5), (64, 0.1), (128, 0.0), (999, 0.0)] {
            assert!((measured.kept((passed_mib << 20) as f64) - kept).abs() < 1e-12);
        }
        for (rows, part) in [
            (1.0, 0.4),
            (4.0, 0.5),
            (8.0, 0.65),
            (16.0, 0.8),
            (32.0, 0.9),
        ] {
            assert!((near.part(stored, rows) - part).abs() < 1e-12, "{rows}");
        }
        assert_eq!(near.part(stored, 64.0), 1.0);
        assert_eq!(near.part((Dtype::F16, Arithmetic::Fp32), 1.0), 1.0);
    }
}
