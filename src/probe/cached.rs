//! What the processor's last cache does for weights that another batch has just met: how much of them it still has,
//! and what a product takes that finds them there. Other products are measured elsewhere (compute.rs).

use super::ProbeError;
use super::bench::Bench;
use super::compute::products;
use super::products::{Meeting, matrix_bytes, meeting_s, near_product_s, product_s};
use super::samples::{Series, tidy};
use super::scale::Extent;
use crate::dtype::{Arithmetic, Dtype};
use crate::machine::os;
use std::collections::BTreeMap;

/// Bytes that pass from one meeting to the next ÷ the cache.
const PASSED: [f64; 9] = [0.25, 0.5, 0.75, 0.875, 1.0, 1.25, 1.5, 3.0, 6.0];
/// What is met again and again: bound by memory wherever it is measured, and small, so that any number of them makes
/// nearly any number of bytes.
const MET: (Dtype, Arithmetic, usize) = (Dtype::F16, Arithmetic::Fp32, 1);
/// The cache must bring it so much sooner than DRAM, or nothing can be said of how much is there.
const SOONER: f64 = 0.8;

/// A product whose weights are still in the cache, beside the same one from DRAM.
struct NearPoint {
    product: (Dtype, Arithmetic, usize),
    part: Series,
}

/// What is still there after so many bytes.
struct KeepPoint {
    passed: f64,
    kept: Series,
}

/// The cache's measurements.
pub struct CacheArea {
    cache_bytes: u64,
    near: Vec<NearPoint>,
    keeps: Vec<KeepPoint>,
}

impl CacheArea {
    pub fn new(extent: &Extent) -> CacheArea {
        let cache_bytes = os::last_level_cache_bytes().unwrap_or(0);
        CacheArea {
            cache_bytes,
            near: near_points(extent, cache_bytes),
            keeps: PASSED.map(keep_point).into(),
        }
    }

    /// One sample of everything.
    pub fn round(&mut self, bench: &mut Bench) -> Result<(), ProbeError> {
        for point in &mut self.near {
            let shape = bench.extent.near_shape;
            let far_s = product_s(bench, point.product, shape)?;
            let near_s = near_product_s(bench, point.product, shape)?;
            point.part.push(near_s / far_s);
        }
        self.keep(bench)
    }

    /// Between the seconds of a product from DRAM and from the cache lie those of one that finds a part there.
    fn keep(&mut self, bench: &mut Bench) -> Result<(), ProbeError> {
        let shape = bench.extent.gemm_shapes[0];
        let each_bytes = matrix_bytes(MET.0, shape);
        let far_s = product_s(bench, MET, shape)?;
        let near_s = near_product_s(bench, MET, shape)?;
        if near_s > SOONER * far_s {
            return Ok(());
        }
        for point in &mut self.keeps {
            let passed_bytes = point.passed * self.cache_bytes as f64;
            let matrices = (passed_bytes / each_bytes as f64).round() as usize;
            if matrices == 0 || 2 * matrices * each_bytes > bench.arena.len() {
                continue;
            }
            let begin = bench.rotate(matrices * each_bytes);
            let again = Meeting { matrices, times: 1 };
            // The first time brings them.
            meeting_s(bench, (MET, shape), again, Some(begin))?;
            let met_s = meeting_s(bench, (MET, shape), again, Some(begin))? / matrices as f64;
            point
                .kept
                .push(((far_s - met_s) / (far_s - near_s)).clamp(0.0, 1.0));
        }
        Ok(())
    }

    pub fn cache_bytes(&self) -> u64 {
        self.cache_bytes
    }

    /// (rows, part of its seconds) by table.
    pub fn near_parts(&self) -> BTreeMap<String, Vec<(usize, f64)>> {
        let mut parts = BTreeMap::<String, Vec<(usize, f64)>>::new();
        for point in &self.near {
            let (format, arithmetic, rows) = point.product;
            if let Some(part) = point.part.median() {
                let table = parts.entry(arithmetic.table_name(format)).or_default();
                table.push((rows, tidy(part.min(1.0))));
            }
        }
        parts
    }

    /// (bytes that pass ÷ the cache, part that is still there).
    pub fn keeps(&self) -> Vec<(f64, f64)> {
        let median = |point: &KeepPoint| Some((point.passed, tidy(point.kept.median()?)));
        self.keeps.iter().filter_map(median).collect()
    }

    /// Every figure's samples, always in the same order.
    pub fn series(&mut self) -> impl Iterator<Item = &mut Series> {
        let near = self.near.iter_mut().map(|point| &mut point.part);
        near.chain(self.keeps.iter_mut().map(|point| &mut point.kept))
    }
}

fn keep_point(passed: f64) -> KeepPoint {
    KeepPoint {
        passed,
        kept: Series::default(),
    }
}

/// Of formats of which half the cache holds the matrix.
fn near_points(extent: &Extent, cache_bytes: u64) -> Vec<NearPoint> {
    let fits = |format| 2 * matrix_bytes(format, extent.near_shape) as u64 <= cache_bytes;
    let of = |(format, arithmetic)| {
        extent.near_rows.iter().map(move |&rows| NearPoint {
            product: (format, arithmetic, rows),
            part: Series::default(),
        })
    };
    products().filter(|p| fits(p.0)).flat_map(of).collect()
}
