//! The one place that turns a profile's figures into seconds of single operations. The closed-form
//! terms and the virtual-time machine both price with exactly these functions. No schedule and no
//! share is known here.
//!
//! Stand-ins: where a format was not measured, the nearest measured one stands in (bf16 and f16 for
//! each other, then f32; f16 for q4) and is never taken to be faster for it: seconds per element
//! stay, or grow with the bytes of an element.

use crate::dtype::Dtype;
use crate::policy::DeviceKind;
use crate::profile::{AttentionRates, DiskPoint, GemmCurve, HardwareProfile, QuantiseRates};
use crate::tier::{Lane, Tier};
use std::collections::BTreeMap;
use thiserror::Error;

/// Why a profile cannot price this device.
#[derive(Debug, Error, PartialEq)]
pub enum RatesError {
    #[error("profile \"{profile}\" has no {what}: probe this machine again or choose --device cpu")]
    Missing { profile: String, what: String },
    #[error(
        "profile \"{profile}\": [contention] names \"{pair}\", which is not a pair of lanes like \"cpu_compute+disk_to_cpu\""
    )]
    Contention { profile: String, pair: String },
}

/// Seconds per weight over M, for one measured shape.
#[derive(Clone, Debug)]
struct ShapeCurve {
    weights: f64,
    /// (M, seconds per weight), rising.
    points: Vec<(f64, f64)>,
}

/// What one computing tier does.
#[derive(Clone, Debug)]
struct ComputeRates {
    gemm: [Vec<ShapeCurve>; 4],
    attention: [AttentionRates; 4],
    memory_bytes_per_s: f64,
    rowwise_bytes_per_s: f64,
    quantise: QuantiseRates,
    launch_s: f64,
}

#[derive(Clone, Debug)]
struct LinkRates {
    latency_s: f64,
    /// (block bytes, bytes per second)
    pinned: Vec<(f64, f64)>,
    unpinned: Vec<(f64, f64)>,
}

/// All rates of one machine and device. Seconds of an operation are its own, with nothing else running.
#[derive(Clone, Debug)]
pub struct Rates {
    pub device: DeviceKind,
    pub dram_read_bytes_per_s: f64,
    pub dram_copy_bytes_per_s: f64,
    cpu: ComputeRates,
    gpu: Option<ComputeRates>,
    up: LinkRates,
    down: LinkRates,
    read: (f64, Vec<(f64, f64)>),
    write_fresh: (f64, Vec<(f64, f64)>),
    write_over: (f64, Vec<(f64, f64)>),
    /// keeps[a][b]: what lane a keeps of its rate while lane b runs.
    keeps: [[f64; 6]; 6],
    calibration: BTreeMap<String, f64>,
}

impl Rates {
    /// Rates for `device` with `threads` compute threads. Fewer threads than were measured slow the
    /// CPU in proportion; more bring nothing.
    pub fn new(
        profile: &HardwareProfile,
        device: DeviceKind,
        threads: usize,
    ) -> Result<Rates, RatesError> {
        let slow = (profile.machine.threads as f64 / threads.max(1) as f64).max(1.0);
        let cpu = cpu_rates(profile, slow)?;
        let gpu = match device {
            DeviceKind::Cpu => None,
            DeviceKind::Host => Some(cpu.clone()),
            DeviceKind::Cuda => Some(gpu_rates(profile)?),
        };
        let (up, down) = links(profile, device)?;
        let disk = &profile.links;
        let write = &disk.cpu_to_disk;
        Ok(Rates {
            device,
            dram_read_bytes_per_s: profile.cpu.dram_read_bytes_per_s,
            dram_copy_bytes_per_s: profile.cpu.dram_copy_bytes_per_s,
            cpu,
            gpu,
            up,
            down,
            read: disk_curve(disk.disk_to_cpu.latency_s, &disk.disk_to_cpu.direct),
            write_fresh: disk_curve(write.latency_s, &write.fresh),
            write_over: disk_curve(write.latency_s, &write.overwrite),
            keeps: contention(profile)?,
            calibration: profile.calibration.clone(),
        })
    }

    /// The same rates without what `calibrate` has learnt.
    pub fn uncalibrated(mut self) -> Rates {
        self.calibration.clear();
        self
    }

    fn on(&self, tier: Tier) -> &ComputeRates {
        match (&self.gpu, tier) {
            (Some(gpu), Tier::Gpu) => gpu,
            _ => &self.cpu,
        }
    }

    fn calibrated(&self, term: &str, on: &str, seconds: f64) -> f64 {
        if self.calibration.is_empty() {
            return seconds;
        }
        let general = self.calibration.get(term).copied().unwrap_or(1.0);
        let special = self.calibration.get(&format!("{term}.{on}"));
        seconds * special.copied().unwrap_or(general)
    }

    /// Seconds of `out[m][rows] = x[m][inputs] · w[rows][inputs]ᵀ`, without its launch.
    pub fn gemm_s(&self, on: Tier, format: Dtype, m: usize, inputs: usize, rows: usize) -> f64 {
        let weights = inputs as f64 * rows as f64;
        weights * self.weight_s(on, format, m as f64, weights)
    }

    /// Seconds per weight at M rows, for a matrix of `weights` elements.
    pub fn weight_s(&self, on: Tier, format: Dtype, m: f64, weights: f64) -> f64 {
        let rates = self.on(on);
        let floor_s = element_bytes(format) / rates.memory_bytes_per_s;
        let curves = &rates.gemm[format as usize];
        let at = |curve: &ShapeCurve| per_weight_s(&curve.points, m, floor_s);
        let above = curves.partition_point(|c| c.weights < weights);
        let seconds = match (curves.get(above.wrapping_sub(1)), curves.get(above)) {
            (Some(small), Some(large)) => {
                let t = (weights / small.weights).ln() / (large.weights / small.weights).ln();
                at(small) * (1.0 - t) + at(large) * t
            }
            (Some(only), None) | (None, Some(only)) => at(only),
            (None, None) => f64::INFINITY,
        };
        self.calibrated("gemm", on.name(), seconds)
    }

    /// Seconds of attention without its launch: one-token steps by the KV bytes they read, prompts by
    /// their FLOP (4 · hidden · keys seen, summed over the queries).
    pub fn attention_s(
        &self,
        on: Tier,
        format: Dtype,
        kv_bytes: f64,
        flop: f64,
        decode: bool,
    ) -> f64 {
        let rates = &self.on(on).attention[format as usize];
        let seconds = if decode {
            kv_bytes / rates.decode_bytes_per_s
        } else {
            flop / rates.prefill_flop_per_s
        };
        self.calibrated("attention", on.name(), seconds)
    }

    /// Seconds to turn `value_bytes` of fp32 K and V values into the cache's format and put them there.
    pub fn append_s(&self, on: Tier, format: Dtype, value_bytes: f64) -> f64 {
        let rates = self.on(on);
        let per_s = match format {
            Dtype::Q4 => rates.quantise.append_bytes_per_s,
            _ => rates.rowwise_bytes_per_s,
        };
        self.calibrated("append", on.name(), value_bytes / per_s)
    }

    /// Seconds of a norm or a residual add over `bytes` of activations, read and written together.
    pub fn rowwise_s(&self, on: Tier, bytes: f64) -> f64 {
        self.calibrated(
            "rowwise",
            on.name(),
            bytes / self.on(on).rowwise_bytes_per_s,
        )
    }

    /// Seconds to start one operation.
    pub fn launch_s(&self, on: Tier) -> f64 {
        self.calibrated("launch", on.name(), self.on(on).launch_s)
    }

    /// Seconds of one copy of `bytes` over CpuToGpu or GpuToCpu (0 on other lanes and without a GPU).
    pub fn link_s(&self, lane: Lane, bytes: f64, pinned: bool) -> f64 {
        let link = match lane {
            Lane::CpuToGpu => &self.up,
            Lane::GpuToCpu => &self.down,
            _ => return 0.0,
        };
        if bytes <= 0.0 || self.gpu.is_none() {
            return 0.0;
        }
        let curve = if pinned { &link.pinned } else { &link.unpinned };
        let seconds = (bytes / rate_at(curve, bytes)).max(link.latency_s);
        self.calibrated("link", lane.name(), seconds)
    }

    /// Seconds to read `bytes` in requests of `block_bytes`.
    pub fn disk_read_s(&self, bytes: f64, block_bytes: f64) -> f64 {
        self.calibrated("disk_read", "disk", disk_s(&self.read, bytes, block_bytes))
    }

    /// Seconds to write `bytes` in requests of `block_bytes`; `fresh` where the file grows.
    pub fn disk_write_s(&self, bytes: f64, block_bytes: f64, fresh: bool) -> f64 {
        let curve = if fresh {
            &self.write_fresh
        } else {
            &self.write_over
        };
        self.calibrated("disk_write", "disk", disk_s(curve, bytes, block_bytes))
    }

    /// Part of its rate that `lane` keeps while all of `other_active` run.
    pub fn keep(&self, lane: Lane, other_active: &[Lane]) -> f64 {
        let others = other_active.iter().filter(|&&other| other != lane);
        others
            .map(|&other| self.keeps[lane as usize][other as usize])
            .product()
    }

    /// Fresh 4-bit (or copied native) weight bytes packed per second, by one CPU.
    pub fn pack_bytes_per_s(&self, compress: bool) -> f64 {
        if compress {
            self.cpu.quantise.pack_bytes_per_s
        } else {
            self.dram_copy_bytes_per_s
        }
    }
}

/// Bytes of one element in long rows.
pub fn element_bytes(format: Dtype) -> f64 {
    format.row_bytes(64) as f64 / 64.0
}

/// Piecewise linear between measured M; above the last by FLOPs; below the first in proportion, but
/// not under the time that reading the weight takes.
fn per_weight_s(points: &[(f64, f64)], m: f64, floor_s: f64) -> f64 {
    let (first, last) = (points[0], points[points.len() - 1]);
    if m <= first.0 {
        return (first.1 * m / first.0).max(floor_s).min(first.1);
    }
    if m >= last.0 {
        return last.1 * m / last.0;
    }
    let above = points.partition_point(|p| p.0 < m).max(1);
    let (a, b) = (points[above - 1], points[above]);
    a.1 + (b.1 - a.1) * (m - a.0) / (b.0 - a.0)
}

/// Rate for blocks of `block` bytes: linear in the block's logarithm, latency-bound below the curve.
fn rate_at(curve: &[(f64, f64)], block: f64) -> f64 {
    let (first, last) = (curve[0], curve[curve.len() - 1]);
    if block <= first.0 {
        return first.1 * (block / first.0).max(1e-6);
    }
    if block >= last.0 {
        return last.1;
    }
    let above = curve.partition_point(|p| p.0 < block).max(1);
    let (a, b) = (curve[above - 1], curve[above]);
    a.1 + (b.1 - a.1) * (block / a.0).ln() / (b.0 / a.0).ln()
}

fn disk_s((latency_s, curve): &(f64, Vec<(f64, f64)>), bytes: f64, block_bytes: f64) -> f64 {
    if bytes <= 0.0 {
        return 0.0;
    }
    (bytes / rate_at(curve, block_bytes.min(bytes))).max(*latency_s)
}

/// The best depth of each block size.
fn disk_curve(latency_s: f64, points: &[DiskPoint]) -> (f64, Vec<(f64, f64)>) {
    let mut best = BTreeMap::<u64, f64>::new();
    for &(block, _, rate, _) in points {
        let entry = best.entry(block.max(1)).or_default();
        *entry = entry.max(rate);
    }
    (
        latency_s,
        best.iter().map(|(&b, &r)| (b as f64, r)).collect(),
    )
}

fn missing(profile: &HardwareProfile, what: impl Into<String>) -> RatesError {
    RatesError::Missing {
        profile: profile.machine.name.clone(),
        what: what.into(),
    }
}

fn cpu_rates(profile: &HardwareProfile, slow: f64) -> Result<ComputeRates, RatesError> {
    let cpu = &profile.cpu;
    let rowwise = cpu.rowwise_bytes_per_s.unwrap_or(cpu.dram_copy_bytes_per_s);
    let quantise = cpu.quantise.unwrap_or(slow_quantise(rowwise));
    let attention = attention_rates(&cpu.attention);
    Ok(ComputeRates {
        gemm: gemm_curves(&cpu.gemm, slow).ok_or_else(|| missing(profile, "cpu.gemm table"))?,
        attention: attention
            .ok_or_else(|| missing(profile, "cpu.attention table"))?
            .map(|a| AttentionRates {
                decode_bytes_per_s: a.decode_bytes_per_s / slow,
                prefill_flop_per_s: a.prefill_flop_per_s / slow,
            }),
        memory_bytes_per_s: cpu.dram_read_bytes_per_s,
        rowwise_bytes_per_s: rowwise / slow,
        quantise,
        launch_s: cpu.launch_s,
    })
}

fn gpu_rates(profile: &HardwareProfile) -> Result<ComputeRates, RatesError> {
    let gpu = profile
        .gpu
        .as_ref()
        .ok_or_else(|| missing(profile, "[gpu]"))?;
    let attention = attention_rates(&gpu.attention);
    Ok(ComputeRates {
        gemm: gemm_curves(&gpu.gemm, 1.0).ok_or_else(|| missing(profile, "gpu.gemm table"))?,
        attention: attention.ok_or_else(|| missing(profile, "gpu.attention table"))?,
        memory_bytes_per_s: gpu.copy_bytes_per_s,
        rowwise_bytes_per_s: gpu.copy_bytes_per_s,
        quantise: gpu.quantise.unwrap_or(slow_quantise(gpu.copy_bytes_per_s)),
        launch_s: gpu.launch_s,
    })
}

/// Where (de)quantising was not measured, it takes four times as long as a row-wise pass.
fn slow_quantise(rowwise_bytes_per_s: f64) -> QuantiseRates {
    QuantiseRates {
        pack_bytes_per_s: rowwise_bytes_per_s / 4.0,
        append_bytes_per_s: rowwise_bytes_per_s / 4.0,
    }
}

fn links(
    profile: &HardwareProfile,
    device: DeviceKind,
) -> Result<(LinkRates, LinkRates), RatesError> {
    if device != DeviceKind::Cuda {
        // Host: a copy within DRAM. Cpu: never asked.
        let curve = vec![(1.0, profile.cpu.dram_copy_bytes_per_s)];
        let copy = LinkRates {
            latency_s: 0.0,
            pinned: curve.clone(),
            unpinned: curve,
        };
        return Ok((copy.clone(), copy));
    }
    let link = |facts: &Option<crate::profile::GpuLink>, name: &str| {
        let facts = facts.as_ref().filter(|f| !f.pinned.is_empty());
        let facts = facts.ok_or_else(|| missing(profile, format!("[links.{name}]")))?;
        let curve = |points: &[(u64, f64)]| -> Vec<(f64, f64)> {
            let sorted: BTreeMap<u64, f64> = points.iter().map(|&(b, r)| (b.max(1), r)).collect();
            sorted.into_iter().map(|(b, r)| (b as f64, r)).collect()
        };
        let unpinned = if facts.unpinned.is_empty() {
            &facts.pinned
        } else {
            &facts.unpinned
        };
        Ok(LinkRates {
            latency_s: facts.latency_s,
            pinned: curve(&facts.pinned),
            unpinned: curve(unpinned),
        })
    };
    let up = link(&profile.links.cpu_to_gpu, "cpu_to_gpu")?;
    Ok((up, link(&profile.links.gpu_to_cpu, "gpu_to_cpu")?))
}

/// Formats that stand in for one that was not measured, nearest first.
fn stand_ins(format: Dtype) -> [Dtype; 4] {
    match format {
        Dtype::F32 => [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Q4],
        Dtype::F16 => [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::Q4],
        Dtype::Bf16 => [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::Q4],
        Dtype::Q4 => [Dtype::Q4, Dtype::F16, Dtype::Bf16, Dtype::F32],
    }
}

fn gemm_curves(tables: &BTreeMap<String, GemmCurve>, slow: f64) -> Option<[Vec<ShapeCurve>; 4]> {
    let mut all: [Vec<ShapeCurve>; 4] = Default::default();
    for format in Dtype::ALL {
        let found = stand_ins(format)
            .into_iter()
            .find_map(|f| tables.get(f.name()).map(|t| (f, t)))?;
        let larger = (element_bytes(format) / element_bytes(found.0)).max(1.0);
        all[format as usize] = shape_curves(found.1, larger * slow);
    }
    Some(all)
}

fn shape_curves(table: &GemmCurve, factor: f64) -> Vec<ShapeCurve> {
    let mut shapes = BTreeMap::<u64, BTreeMap<usize, f64>>::new();
    for &(m, inputs, rows, seconds) in &table.points {
        let weights = (inputs * rows).max(1) as u64;
        let per_weight_s = factor * seconds / weights as f64;
        shapes
            .entry(weights)
            .or_default()
            .insert(m.max(1), per_weight_s);
    }
    let rising = |points: BTreeMap<usize, f64>| {
        let mut most = 0.0f64;
        let rise = |(m, s): (usize, f64)| {
            most = most.max(s);
            (m as f64, most)
        };
        points.into_iter().map(rise).collect()
    };
    let curve = |(weights, points)| ShapeCurve {
        weights: weights as f64,
        points: rising(points),
    };
    shapes.into_iter().map(curve).collect()
}

fn attention_rates(tables: &BTreeMap<String, AttentionRates>) -> Option<[AttentionRates; 4]> {
    let mut all = Vec::with_capacity(4);
    for format in Dtype::ALL {
        let found = stand_ins(format)
            .into_iter()
            .find_map(|f| tables.get(f.name()).map(|t| (f, *t)))?;
        let smaller = (element_bytes(format) / element_bytes(found.0)).min(1.0);
        all.push(AttentionRates {
            decode_bytes_per_s: found.1.decode_bytes_per_s * smaller,
            prefill_flop_per_s: found.1.prefill_flop_per_s,
        });
    }
    all.try_into().ok()
}

fn contention(profile: &HardwareProfile) -> Result<[[f64; 6]; 6], RatesError> {
    let mut keeps = [[1.0; 6]; 6];
    let lane = |name: &str| Lane::ALL.into_iter().find(|l| l.name() == name);
    for (pair, &[first, second]) in &profile.contention {
        let lanes = pair
            .split_once('+')
            .and_then(|(a, b)| Some((lane(a)?, lane(b)?)));
        let Some((a, b)) = lanes else {
            return Err(RatesError::Contention {
                profile: profile.machine.name.clone(),
                pair: pair.clone(),
            });
        };
        keeps[a as usize][b as usize] = first.min(1.0);
        keeps[b as usize][a as usize] = second.min(1.0);
    }
    if let (Some(up), Some(down)) = (&profile.links.cpu_to_gpu, &profile.links.gpu_to_cpu) {
        let (u, d) = (Lane::CpuToGpu as usize, Lane::GpuToCpu as usize);
        keeps[u][d] = (up.both_directions_pct / 100.0).clamp(0.05, 1.0);
        keeps[d][u] = (down.both_directions_pct / 100.0).clamp(0.05, 1.0);
    }
    Ok(keeps)
}
