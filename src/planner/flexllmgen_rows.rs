//! FlexLLMGen's published throughput on one T4 (paper, arXiv 2303.06865v2, and its repository; 32 generated
//! tokens, 208 GB DRAM, NVMe disk), and its own cost model with the constants fitted for that machine.

use crate::model::ModelSpec;
use crate::planner::flexllmgen::{Flags, Lengths};
use crate::units::GIB;

/// One published figure, by the command line that made it (benchmark/flexllmgen/bench_suite.py). The rows of
/// 30b and 175b were projected by its authors from ten timed layer steps.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    pub size: &'static str,
    pub prompt: usize,
    pub compress_weight: bool,
    pub compress_cache: bool,
    pub gpu_batch_size: usize,
    pub num_gpu_batches: usize,
    pub percent: [f64; 6],
    pub throughput_tok_s: f64,
}

pub const GENERATED: usize = 32;

type Row = (
    &'static str,
    usize,
    (bool, bool),
    (usize, usize),
    [f64; 6],
    f64,
);

/// 4-bit weights and cache. With 30b it compressed the cache alone.
const FP16: (bool, bool) = (false, false);
const CACHE: (bool, bool) = (false, true);
const BOTH: (bool, bool) = (true, true);

const ALL_GPU: [f64; 6] = [100.0, 0.0, 100.0, 0.0, 100.0, 0.0];
const DRAM: [f64; 6] = [0.0, 100.0, 0.0, 100.0, 0.0, 100.0];
const DISK: [f64; 6] = [0.0, 50.0, 0.0, 0.0, 0.0, 100.0];

const ROWS: [Row; 15] = [
    ("opt-6.7b", 256, FP16, (4, 1), ALL_GPU, 53.29),
    ("opt-6.7b", 256, BOTH, (128, 1), ALL_GPU, 56.72),
    ("opt-6.7b", 512, FP16, (2, 1), ALL_GPU, 25.26),
    ("opt-6.7b", 512, BOTH, (72, 1), ALL_GPU, 29.12),
    ("opt-6.7b", 1024, FP16, (1, 1), ALL_GPU, 13.72),
    (
        "opt-30b",
        256,
        FP16,
        (160, 2),
        [10.0, 90.0, 0.0, 100.0, 0.0, 100.0],
        16.01,
    ),
    ("opt-30b", 256, CACHE, (128, 8), DRAM, 16.86),
    (
        "opt-30b",
        512,
        FP16,
        (48, 3),
        [20.0, 80.0, 0.0, 100.0, 0.0, 100.0],
        7.32,
    ),
    ("opt-30b", 512, CACHE, (64, 8), DRAM, 8.38),
    (
        "opt-30b",
        1024,
        FP16,
        (20, 4),
        [4.0, 96.0, 0.0, 100.0, 0.0, 100.0],
        3.50,
    ),
    ("opt-175b", 256, FP16, (64, 8), DISK, 1.36),
    ("opt-175b", 256, BOTH, (96, 3), DRAM, 2.26),
    ("opt-175b", 512, FP16, (32, 8), DISK, 0.69),
    ("opt-175b", 512, BOTH, (48, 3), DRAM, 1.12),
    ("opt-175b", 1024, FP16, (12, 12), DISK, 0.35),
];

/// All rows.
pub fn published() -> impl Iterator<Item = Published> {
    ROWS.into_iter().map(|row| Published {
        size: row.0,
        prompt: row.1,
        compress_weight: row.2.0,
        compress_cache: row.2.1,
        gpu_batch_size: row.3.0,
        num_gpu_batches: row.3.1,
        percent: row.4,
        throughput_tok_s: row.5,
    })
}

impl Published {
    /// Its flags: the CPU attends wherever an uncompressed cache is not on the GPU, and the weights of 175b
    /// are not page-locked.
    pub fn flags(&self) -> Flags {
        Flags {
            percent: self.percent,
            gpu_batch_size: self.gpu_batch_size,
            num_gpu_batches: self.num_gpu_batches,
            pin_weight: self.size != "opt-175b",
            compress_weight: self.compress_weight,
            compress_cache: self.compress_cache,
            cpu_cache_compute: !self.compress_cache && self.percent[2] < 100.0,
        }
    }

    pub fn lengths(&self) -> Lengths {
        Lengths {
            prompt: self.prompt,
            generated: GENERATED,
            projected: self.size != "opt-6.7b",
        }
    }

    pub fn format(&self) -> &'static str {
        match (self.compress_weight, self.compress_cache) {
            (false, false) => "fp16",
            (false, true) => "4-bit cache",
            _ => "4-bit",
        }
    }

    /// Tokens per second by its own cost model as its code has it, with its fitted T4 constants and the
    /// shares of the flags. None with 4-bit formats, which that model does not price.
    pub fn its_model(&self, model: &ModelSpec) -> Option<f64> {
        if self.compress_cache {
            return None;
        }
        let gib = GIB as f64;
        let (ctog, gtoc_kv, gtoc_hidden, dtoc) = (12.89 * gib, 0.97 * gib, 4.82 * gib, 0.473 * gib);
        let (ctod_kv, ctod_hidden) = (0.746 * gib, 2.015 * gib);
        let (mm_prefill, mm_decode, bmm_prefill, bmm_decode, cpu) =
            (21.24e12, 4.3e12, 9.97e12, 0.079e12, 0.0123e12);
        let [wg, wc, cg, cc, hg, hc] = self.percent.map(|p| p / 100.0);
        let (wd, cd, hd) = (1.0 - wg - wc, 1.0 - cg - cc, 1.0 - hg - hc);
        let (h, ffn, s) = (model.hidden as f64, model.ffn as f64, self.prompt as f64);
        let n = GENERATED as f64;
        let bls = (self.gpu_batch_size * self.num_gpu_batches) as f64;
        let weights = 8.0 * h * h + 4.0 * h * ffn;
        let hidden = 2.0 * s * h * bls;
        let kv = 4.0 * bls * (s + 1.0) * h;
        let up = ((wc + wd) * weights + (hc + hd) * hidden) / ctog;
        let down = (cc + cd) * kv / gtoc_kv + (hc + hd) * hidden / gtoc_hidden;
        let read = (wd * weights + hd * hidden) / dtoc;
        let write = cd * kv / ctod_kv + hd * hidden / ctod_hidden;
        let compute = bls * (8.0 * s * h * h + 4.0 * s * h * ffn) / mm_prefill
            + 4.0 * bls * s * s * h / bmm_prefill;
        let prefill_s = (up + read).max(down + write).max(compute);
        let past = 4.0 * bls * (s + n / 2.0) * h;
        let row = 2.0 * h * bls;
        let up = ((wc + wd) * weights + (hc + hd) * row) / ctog;
        let down = (hc + hd) * row / gtoc_hidden;
        let read = (cd * past + wd * weights + hd * row) / dtoc;
        let write = 4.0 * cd * bls * h / ctod_kv + hd * row / ctod_hidden;
        let compute = bls * weights / mm_decode + cg * past / bmm_decode + (cc + cd) * past / cpu;
        let decode_s = up + down.max(read).max(write).max(compute);
        let layers = model.layers as f64;
        Some(bls * n / (layers * (prefill_s + (n - 1.0) * decode_s)))
    }
}
