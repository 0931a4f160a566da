//! The decision: the eleven shares, the batch shape and the switches, checked against a model and a
//! device. How a share becomes rows and sequences is placement.rs; what it costs is cost/.

use crate::dtype::{Arithmetic, Dtype, WeightLayout};
use crate::tier::PerTier;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use crate::dtype::Compute;

/// Which machine computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The CPU computes; there is no Gpu tier.
    Cpu,
    /// A Gpu tier that DRAM plays, for tests.
    Host,
    /// A real GPU.
    Cuda,
}

impl DeviceKind {
    pub fn has_gpu(self) -> bool {
        self != DeviceKind::Cpu
    }

    /// The layout of the store that this device runs from.
    pub fn weight_layout(self) -> WeightLayout {
        match self {
            DeviceKind::Cuda => WeightLayout::GpuRowMajor,
            _ => WeightLayout::CpuPanel64,
        }
    }
}

/// Fractions of the weights: at home on the GPU, and for DRAM and disk whether they are shipped to
/// the compute device or multiplied on the CPU. Without a GPU everything counts as computed in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightShares {
    pub gpu: f64,
    pub cpu_ship: f64,
    pub cpu_compute: f64,
    pub disk_ship: f64,
    pub disk_compute: f64,
}

impl WeightShares {
    pub fn as_array(&self) -> [f64; 5] {
        [
            self.gpu,
            self.cpu_ship,
            self.cpu_compute,
            self.disk_ship,
            self.disk_compute,
        ]
    }

    pub fn from_array(a: [f64; 5]) -> Self {
        WeightShares {
            gpu: a[0],
            cpu_ship: a[1],
            cpu_compute: a[2],
            disk_ship: a[3],
            disk_compute: a[4],
        }
    }

    pub fn cpu(&self) -> f64 {
        self.cpu_ship + self.cpu_compute
    }

    pub fn disk(&self) -> f64 {
        self.disk_ship + self.disk_compute
    }

    /// What the CPU multiplies where it lies.
    pub fn by_cpu(&self) -> f64 {
        self.cpu_compute + self.disk_compute
    }
}

/// The eleven shares, each group summing to one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shares {
    pub weights: WeightShares,
    pub cache: PerTier<f64>,
    pub activations: PerTier<f64>,
}

impl Shares {
    /// FlexLLMGen's six percentages `wg wc cg cc hg hc` (disk is the rest), with the given part of the
    /// weights outside the GPU multiplied where they lie (1 without a GPU), those in DRAM first.
    pub fn from_percent(percent: [f64; 6], cpu_compute_share: f64) -> Result<Shares, PolicyError> {
        let [wg, wc, cg, cc, hg, hc] = percent.map(|p| p / 100.0);
        for (pair, gpu, cpu) in [
            ("weights", wg, wc),
            ("cache", cg, cc),
            ("activations", hg, hc),
        ] {
            let in_range = |x: f64| (0.0..=1.0 + 1e-9).contains(&x);
            if !in_range(gpu) || !in_range(cpu) || gpu + cpu > 1.0 + 1e-9 {
                return Err(PolicyError::Percent {
                    pair,
                    gpu: gpu * 100.0,
                    cpu: cpu * 100.0,
                });
            }
        }
        let rest = |gpu: f64, cpu: f64| (1.0 - gpu - cpu).max(0.0);
        let wd = rest(wg, wc);
        let [cpu_compute, disk_compute] = multiplied_in_place([wc, wd], cpu_compute_share);
        Ok(Shares {
            weights: WeightShares {
                gpu: wg,
                cpu_ship: wc - cpu_compute,
                cpu_compute,
                disk_ship: wd - disk_compute,
                disk_compute,
            },
            cache: PerTier {
                gpu: cg,
                cpu: cc,
                disk: rest(cg, cc),
            },
            activations: PerTier {
                gpu: hg,
                cpu: hc,
                disk: rest(hg, hc),
            },
        })
    }

    /// The six percentages.
    pub fn percent(&self) -> [f64; 6] {
        let w = &self.weights;
        [
            w.gpu,
            w.cpu(),
            self.cache.gpu,
            self.cache.cpu,
            self.activations.gpu,
            self.activations.cpu,
        ]
        .map(|x| 100.0 * x)
    }
}

/// Everything that `exec` needs to know about how to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    pub shares: Shares,
    /// Sequences that compute together.
    pub gpu_batch_size: usize,
    /// Batches that share one pass over the weights.
    pub num_gpu_batches: usize,
    pub pin_weight: bool,
    pub compress_weight: bool,
    pub compress_cache: bool,
    /// Attention over the cache's DRAM share on the CPU (always so without a GPU).
    pub cpu_cache_compute: bool,
    /// The GPU has room for two layers' streamed weights: a part of the next one's comes with each batch.
    #[serde(default)]
    pub double_buffer: bool,
    pub overlap: bool,
    pub compute: Compute,
    /// F16 or F32; with `compress_cache` the cache is q4 all the same.
    pub kv: Dtype,
    pub threads: usize,
}

impl Policy {
    /// Sequences of one block.
    pub fn slots(&self) -> usize {
        self.gpu_batch_size * self.num_gpu_batches
    }

    /// How weights stored in `format` are multiplied.
    pub fn arithmetic(&self, format: Dtype) -> Arithmetic {
        self.compute.arithmetic(format)
    }

    /// Activations stay in fp32 on a GPU, too.
    pub fn is_wide(&self) -> bool {
        self.compute == Compute::Fp32
    }

    pub fn kv_format(&self) -> Dtype {
        if self.compress_cache {
            Dtype::Q4
        } else {
            self.kv
        }
    }

    /// A policy that this device can carry out, or why not and what would be the nearest legal one.
    pub fn check(&self, device: DeviceKind) -> Result<(), PolicyError> {
        if self.gpu_batch_size == 0 || self.num_gpu_batches == 0 {
            return Err(PolicyError::EmptyBatch);
        }
        let s = &self.shares;
        if device == DeviceKind::Cuda && self.compute == Compute::Bf16 {
            return Err(PolicyError::Bf16OnGpu);
        }
        if device.has_gpu() {
            return Ok(());
        }
        let [wg, wc, cg, cc, hg, hc] = s.percent();
        if wg > 0.0 || cg > 0.0 || hg > 0.0 {
            let nearest = [0.0, wg + wc, 0.0, cg + cc, 0.0, hg + hc];
            return Err(PolicyError::NoGpu {
                nearest: show_percent(nearest),
            });
        }
        if s.weights.cpu_ship > 1e-9 || s.weights.disk_ship > 1e-9 {
            return Err(PolicyError::NothingToShipTo);
        }
        Ok(())
    }
}

/// A share this small is what rounding has left of a percentage.
const CRUMB: f64 = 1e-5;

/// Of weights in DRAM and on disk, what is multiplied where it lies when it is to be this part of both. DRAM
/// comes first: what is there is nearer, and beside a GPU rows on disk are turned again for every run.
pub fn multiplied_in_place([cpu, disk]: [f64; 2], part: f64) -> [f64; 2] {
    let all = part.clamp(0.0, 1.0) * (cpu + disk);
    let from_disk = if part < 1.0 { all - cpu } else { disk };
    match from_disk > CRUMB {
        true => [cpu, from_disk.min(disk)],
        false => [all.min(cpu), 0.0],
    }
}

/// "0 100 0 100 0 100", with decimals only where there are some.
pub fn show_percent(percent: [f64; 6]) -> String {
    percent
        .map(|p| format!("{}", (p * 100.0).round() / 100.0))
        .join(" ")
}

/// Why a policy cannot be.
#[derive(Debug, Error, PartialEq)]
pub enum PolicyError {
    #[error(
        "--percent: the {pair} shares {gpu} and {cpu} must each lie in 0..100 and sum to at most 100 (the rest goes to disk)"
    )]
    Percent {
        pair: &'static str,
        gpu: f64,
        cpu: f64,
    },
    #[error("--gpu-batch-size and --num-gpu-batches must be at least 1")]
    EmptyBatch,
    #[error(
        "this machine has no GPU, so the first, third and fifth percentage must be 0; the nearest plan here is --percent {nearest}"
    )]
    NoGpu { nearest: String },
    #[error(
        "--compute bf16 is the CPU's: a GPU multiplies weights as they are stored; leave it out"
    )]
    Bf16OnGpu,
    #[error("without a GPU nothing can be shipped to one: --cpu-compute-share is 100 here")]
    NothingToShipTo,
}
